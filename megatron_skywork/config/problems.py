"""A wrong setting in a sentence: its dotted key, the value found, where it stands, and what to type instead.

The schema's checker speaks of its own types and links to its own pages; nobody who mistyped a number should have to read that, so each of its
errors is rewritten here. Unknown names get the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_skywork.config.manual import field_words, is_section, section_names, section_of, settings
from megatron_skywork.config.schema import Config, Source


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


def locate(path: Sequence[int | str]) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The section a path ends in and the field it ends at, whichever exist in the schema."""
    section: type[BaseModel] | None = Config
    field: FieldInfo | None = None
    for part in path:
        if isinstance(part, int) or section is None:
            continue
        if part in section.model_fields:
            field = section.model_fields[part]
            section = section_of(field.annotation) or section
        elif section is not Source:
            field = None
    return section, field


def lookup(values: Any, path: Sequence[int | str]) -> Any:
    """The value at a path of keys and indices."""
    for part in path:
        values = values[part]
    return values


def rewrite(error: ErrorDetails, origins: Mapping[str, str]) -> tuple[str, list[str]]:
    """One error of the schema's checker as a sentence, and the dotted settings it makes unreliable.

    Args:
        error: as pydantic lists it.
        origins: where each dotted key was set ("file.yaml:12", "command line").
    """
    path, value, type_ = list(error["loc"]), error["input"], error["type"]
    key = ".".join(map(str, path)) or "the configuration"
    parent, field = locate(path[:-1])[0] if path else None, locate(path)[1]
    origin = _origin(path, origins)
    if type_ == "extra_forbidden":
        advice, meant = unknown_name([str(part) for part in path], parent if parent is not None else Config)
        return f"{key}={shown(value)}{origin}: {advice}", [key, *meant]
    if type_ == "missing":
        words = field_words(field) if field is not None else "a value"
        return f"{key} is not set, and it is required: {words}. {field.description if field is not None else ''}".rstrip(), [key]
    if type_ == "value_error":
        section_key = key if path else ""
        text = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
        section = locate(path)[0]
        name = text.split("=")[0].split(" ")[0]
        joined = f"{section_key}.{text}" if section is not None and name.split(".")[0] in section.model_fields else f"{section_key}: {text}"
        return joined.lstrip(".") + origin, [key]
    found = f"{key}={shown(value)}{origin}"
    return f"{found}: {_wanted(type_, value, path, field)}", [key]


def _origin(path: Sequence[int | str], origins: Mapping[str, str]) -> str:
    for end in range(len(path), 0, -1):
        origin = origins.get(".".join(map(str, path[:end])))
        if origin:
            return f" ({origin})"
    return ""


def _wanted(type_: str, value: Any, path: Sequence[int | str], field: FieldInfo | None) -> str:
    """What belongs where a wrong value was found."""
    words = "something else" if field is None else field_words(field)
    if field is not None and is_section(field):
        return f"this must be a {words}, not {kind(value)}"
    if field is not None and path and isinstance(path[-1], int):
        inner = section_of(field.annotation)
        words = "a path or {path: ..., weight: ...}" if inner is not None else words
    inner = section_of(field.annotation) if field is not None else None
    if inner is Source and path and path[-1] in Source.model_fields:
        words = field_words(Source.model_fields[str(path[-1])])
    if type_ == "finite_number":
        return f"this must be a finite number ({words})"
    if type_ == "literal_error":
        choices = words.split("one of ", 1)[-1].replace(", or null", "").split(", ")
        match = nearest(str(value), choices) if isinstance(value, str) else []
        return f"this must be {words}" + (f"; did you mean {match[0]}?" if match else "")
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "y", "n") and "true or false" in words:
        return f"this must be {words}; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if type_.startswith(("greater_than", "less_than")):
        return f"this must be {words}"
    return f"this must be {words}, not {kind(value)}"
