"""A wrong setting in a sentence: its dotted key, the value found, where it stands, and what to type instead.

The schema's checker speaks of its own types and links to its own pages; nobody who mistyped a number should have to read that, so each of its
errors is rewritten here. Unknown names get the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from megatron_skywork.config.manual import field_words, is_section, plain_words, section_names, section_of, settings
from megatron_skywork.config.schema import Config


def shown(value: Any) -> str:
    """A value as it stands in a configuration, cut at 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def kind(value: Any) -> str:
    """What a value is, in plain words."""
    if value is None:
        return "nothing"
    names: list[tuple[type, str]] = [(bool, "true/false"), (int, "a whole number"), (float, "a number"), (str, "text"), (list, "a list"), (dict, "a section")]
    return next((words for type_, words in names if isinstance(value, type_)), type(value).__name__)


def nearest(name: str, valid: Sequence[str], count: int = 1) -> list[str]:
    """The valid names closest to a mistyped one, best first; empty where none is near."""
    lower = {candidate.lower(): candidate for candidate in valid}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), list(lower), n=count, cutoff=0.6)]


def unknown_name(path: Sequence[str], section: type[BaseModel]) -> tuple[str, list[str]]:
    """What to type instead of an unknown name, and the settings it may have been meant for.

    Args:
        path: where the name stands, itself last.
        section: the section it stands in.
    """
    prefix, name = list(path[:-1]), str(path[-1])
    if "." in name and any(name == setting.name for setting in settings()):
        outer, _, inner = name.rpartition(".")
        return f"in a file a section is nested; write {outer}: and below it, indented, {inner}:", [name]
    close = [".".join([*map(str, prefix), match]) for match in nearest(name, list(section.model_fields), 2)]
    elsewhere = [full for full in [*(setting.name for setting in settings()), *section_names()] if full.split(".")[-1] == name]
    if not close or (elsewhere and nearest(name, list(section.model_fields))[0] != name and len(elsewhere) == 1):
        close = elsewhere or close
    if close:
        return f"there is no such setting; did you mean {' or '.join(close[:2])}?", close
    where = ".".join(map(str, prefix)) or "a configuration"
    return f"there is no such setting; {where} has {', '.join(section.model_fields)}", []


@dataclass(frozen=True)
class Place:
    """Where a path of keys and indices leads in the schema.

    Args:
        section: innermost section the path goes through or ends at.
        words: what belongs at its end, in plain words; empty if the schema has no such place.
        sentence: the description of the setting it ends at.
        is_section: True if a whole section belongs there.
    """

    section: type[BaseModel]
    words: str
    sentence: str = ""
    is_section: bool = False


def locate(path: Sequence[int | str]) -> Place:
    """Follows a path through sections, lists and mappings of the schema."""
    place = Place(Config, "sections", is_section=True)
    annotation: Any = Config
    for part in path:
        if isinstance(part, int):  # an item of what may also be a single value, or nothing
            annotation = next((inner for inner in get_args(annotation) if get_origin(inner) is list), annotation)
        if type(None) in get_args(annotation):
            annotation = next(inner for inner in get_args(annotation) if inner is not type(None))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if part not in annotation.model_fields:
                return Place(annotation, "")
            field = annotation.model_fields[str(part)]
            inner_section = section_of(field.annotation) if is_section(field) else None
            place = Place(inner_section or annotation, field_words(field), field.description or "", inner_section is not None)
            annotation = field.annotation
        else:
            annotation = get_args(annotation)[-1]
            place = Place(section_of(annotation) or place.section, plain_words(annotation))
    return place


# What the checker puts into the path of an error for one of several types that a value may have: no setting has such a name.
_ALTERNATIVE = re.compile(r"constrained-\w+|list\[.*\]")


def settle_alternatives(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """One error for a value that may be a number or a list and is neither, and those of its items for a list; the checker gives one for each type."""
    settled: list[ErrorDetails] = []
    of_value: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for error in errors:
        path = error["loc"]
        index = next((index for index, part in enumerate(path) if _ALTERNATIVE.fullmatch(str(part))), None)
        if index is None:
            settled.append(error)
        else:
            of_value.setdefault(path[:index], []).append({**error, "loc": (*path[:index], *path[index + 1 :])})  # type: ignore[typeddict-item]
    for path, found in of_value.items():
        of_items = [error for error in found if len(error["loc"]) > len(path)]
        out_of_range = [error for error in found if not error["type"].endswith("_type")]
        settled += of_items or out_of_range[:1] or found[:1]
    return settled


def rewrite(error: ErrorDetails, origins: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """One error of the schema's checker as sentences, and the dotted settings it makes unreliable.

    Args:
        error: as pydantic lists it.
        origins: where each dotted key was set ("file.yaml:12", "command line").
    """
    path, value, type_ = list(error["loc"]), error["input"], error["type"]
    key, place, origin = ".".join(map(str, path)), locate(path), _origin(path, origins)
    if type_ == "extra_forbidden":
        advice, meant = unknown_name([str(part) for part in path], locate(path).section)
        return [f"{key}={shown(value)}{origin}: {advice}"], [key, *meant]
    if type_ == "missing":
        needed = [name for name, field in place.section.model_fields.items() if field.is_required()]
        words = f"a section with at least {', '.join(needed)}" if place.is_section else place.words
        return [f"{key} is not set, and it is required: {words}. {place.sentence}".rstrip()], [key]
    if type_ == "value_error":  # rules of the section itself, a line each
        lines = str(error.get("ctx", {}).get("error", error["msg"])).splitlines()
        subjects = [re.split(r"[.= ]", line, maxsplit=1)[0] for line in lines]
        sentences = [broken_rule(key, line, _origin([*path, subject], origins)) for line, subject in zip(lines, subjects, strict=True)]
        return sentences, [f"{key}.{subject}" for subject in subjects]
    return [f"{key}={shown(value)}{origin}: {_wanted(type_, value, place)}"], [key]


def broken_rule(section: str, sentence: str, origin: str = "") -> str:
    """A sentence of `Section.rules`, which begins with a setting's name inside its section, as one of the whole configuration."""
    return f"{section}.{sentence}{origin}"


def _origin(path: Sequence[int | str], origins: Mapping[str, str]) -> str:
    for end in range(len(path), 0, -1):
        origin = origins.get(".".join(map(str, path[:end])))
        if origin:
            return f" ({origin})"
    return ""


def _wanted(type_: str, value: Any, place: Place) -> str:
    """What belongs where a wrong value was found."""
    words = place.words or "something else"
    if type_ == "finite_number":
        return f"this must be a finite number ({words})"
    if type_ == "literal_error":
        choices = words.split("one of ", 1)[-1].replace(", or null", "").split(", ")
        match = nearest(str(value), choices) if isinstance(value, str) else []
        return f"this must be {words}" + (f"; did you mean {match[0]}?" if match else "")
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "y", "n") and words == "true or false":
        return f"this must be {words}; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if type_.startswith(("greater_than", "less_than")):
        return f"this must be {words}"
    return f"this must be {words}, not {kind(value)}"
