"""The settings as a person reads them: dotted names, types in plain words, defaults, sentences.

Everything is generated from `schema.py`, so that `--help`, the error messages and the code cannot disagree.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_skywork.config.schema import Config, Source
from megatron_skywork.config.yaml_strict import write_yaml

REQUIRED = "required"


@dataclass(frozen=True)
class Setting:
    """One line of the manual.

    Args:
        name: dotted name, as in an override.
        type: plain words.
        default: as YAML would write it, or "required".
        sentence: what it does.
    """

    name: str
    type: str
    default: str
    sentence: str


def field_words(field: FieldInfo) -> str:
    """What a field accepts, in plain words: "whole number above 0, or null"."""
    return plain_words(field.annotation, field.metadata)


def plain_words(annotation: Any, metadata: list[Any] | None = None) -> str:
    """What a type annotation accepts, in plain words."""
    limits = list(metadata or [])
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            limits.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        words = " or ".join(plain_words(part, limits) for part in arguments if part is not type(None))
        return words + (", or null" if type(None) in arguments else "")
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if annotation is Source:
        return "a path or {path: ..., weight: ...}"
    if annotation is list or origin is list:
        if arguments and arguments[0] is Source:
            return "a path, or a list of paths and {path: ..., weight: ...}"
        return "a list, each item " + plain_words(arguments[0]) if arguments else "a list"
    if annotation is dict or origin is dict:
        return "names, each with " + plain_words(arguments[1]) if arguments else "names with values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section with " + ", ".join(annotation.model_fields)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "any value"}.get(annotation, str(annotation))
    return " ".join([words, " and ".join(_limit_words(limits))]).strip()


def _limit_words(limits: list[Any]) -> Iterator[str]:
    for limit in limits:
        for name, form in (("gt", "above {}"), ("ge", "from {} up"), ("lt", "below {}"), ("le", "up to {}")):
            bound = getattr(limit, name, None)
            if bound is not None:
                yield form.format(f"{bound:g}" if isinstance(bound, float) else bound)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class behind an annotation such as `Moe | None`, or None for a plain value."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def is_section(field: FieldInfo) -> bool:
    """True for a field that holds a section itself (not a list or mapping of sections)."""
    return get_origin(field.annotation) not in (list, dict) and section_of(field.annotation) is not None


def default_words(field: FieldInfo) -> str:
    """The default as YAML writes it."""
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) and value else write_yaml({"default": value}).strip().removeprefix("default: ")


def settings(section: type[BaseModel] = Config, prefix: str = "") -> list[Setting]:
    """Every setting below a section, depth first, in the schema's order."""
    found: list[Setting] = []
    for name, field in section.model_fields.items():
        if is_section(field):
            inner = section_of(field.annotation)
            assert inner is not None
            found.extend(settings(inner, f"{prefix}{name}."))
        else:
            found.append(Setting(prefix + name, field_words(field), default_words(field), field.description or ""))
    return found


def section_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of the sections themselves: model, moe, moe.adaptive, ..."""
    found = []
    for name, field in section.model_fields.items():
        if is_section(field):
            inner = section_of(field.annotation)
            assert inner is not None
            found += [prefix + name, *section_names(inner, f"{prefix}{name}.")]
    return found


def manual_text(width: int = 120) -> str:
    """Every setting, grouped by section, for `--help`."""
    lines: list[str] = []
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation) if is_section(field) else None
        if section is None:
            continue
        optional = "; may be left out" if not field.is_required() else ""
        lines += ["", f"{name}:  {(section.__doc__ or '').strip().splitlines()[0]}{optional and ' (' + optional[2:] + ')'}"]
        for setting in settings(section, f"{name}."):
            lines += _setting_lines(setting, width)
    top = [setting for setting in settings() if "." not in setting.name]
    return "\n".join(["whole run:", *(line for setting in top for line in _setting_lines(setting, width)), *lines])


def _setting_lines(setting: Setting, width: int) -> list[str]:
    indent = " " * 6
    default = REQUIRED if setting.default == REQUIRED else f"default {setting.default}"
    head = f"  {setting.name}  ({setting.type}; {default})"
    return [*textwrap.wrap(head, width, subsequent_indent=indent), *textwrap.wrap(setting.sentence, width, initial_indent=indent, subsequent_indent=indent)]
