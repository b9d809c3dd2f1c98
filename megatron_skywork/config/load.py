"""From files and overrides to a checked `Config`; all problems of a configuration are reported together.

Files are merged in the order given: sections field by field, anything else as a whole, the later wins. Then each override
`section.field=value` sets exactly what it names (a list or section given there replaces the old one). Then the schema checks each value and
`validate.py` the rules between sections. A rule is not applied to a setting that already has a problem, so that one mistake is one line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_skywork.config.manual import is_section, section_of
from megatron_skywork.config.problems import broken_rule, kind, nearest, rewrite, settle_alternatives, shown
from megatron_skywork.config.rules import overlap
from megatron_skywork.config.schema import Config
from megatron_skywork.config.section import VALUES_ONLY, Section
from megatron_skywork.config.validate import find_problems
from megatron_skywork.config.yaml_strict import Document, read_yaml, write_yaml
from megatron_skywork.errors import ConfigError

COMMAND_LINE = "command line"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*(\.[A-Za-z0-9_\-]+)*$")


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """Reads, merges, overrides and checks a configuration.

    Args:
        paths: YAML files, later ones win field by field.
        overrides: `section.field=value`, values in YAML.
        world_size: number of ranks, or None to leave out the rules that need it.

    Raises:
        ConfigError: with every problem that was found.
    """
    values, origins, problems = _gather(paths, overrides)
    if problems:  # a file that cannot be read leaves nothing sound to check
        raise ConfigError(problems)
    config, problems, doubtful = _check(values, origins)
    problems += find_problems(config, world_size, doubtful)
    if problems:
        raise ConfigError(problems)
    return config


def unchecked_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """A configuration whose values are possible one by one, rules between them not applied: what a nearby valid one is looked for from.

    Raises:
        ConfigError: a value is not possible.
    """
    values, origins, problems = _gather(paths, overrides)
    if not problems:
        config, problems, _ = _check(values, origins)
    if problems:
        raise ConfigError(problems)
    return config


def stated_run_dir(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> str | None:
    """The run's folder that a configuration names, also one that is wrong elsewhere; None where it names none."""
    stated = _gather(paths, overrides)[0].get("run_dir")
    return stated if isinstance(stated, str) and stated else None


def check_config(config: Config, world_size: int | None = None) -> None:
    """Applies the rules between sections to a configuration that was made in Python.

    Raises:
        ConfigError: with every problem that was found.
    """
    problems = find_problems(config, world_size, set())
    if problems:
        raise ConfigError(problems)


def dump_config(config: Config | Section) -> str:
    """A configuration as YAML: every setting, defaults included; loading it gives an equal configuration."""
    return write_yaml(config.model_dump(mode="python"))


def read_file(path: str | Path) -> Document:
    """Reads one configuration file; problems are in the document, nothing is raised."""
    name = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return Document(problems=[f"{name}: there is no such file{_similar_file(Path(path))}"])
    except IsADirectoryError:
        return Document(problems=[f"{name}: this is a folder; --config takes a YAML file"])
    except UnicodeDecodeError as error:
        return Document(problems=[f"{name}: not a text file in UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})"])
    except OSError as error:
        return Document(problems=[f"{name}: cannot be read ({error.strerror})"])
    document = read_yaml(text, name)
    if document.problems:
        return document
    if document.values is None:
        document.problems.append(f"{name}: the file is empty; it needs at least the sections model and train")
    elif not isinstance(document.values, dict):
        document.problems.append(f"{name}: the file holds {kind(document.values)}, not sections such as `model:`")
    return document


def _similar_file(path: Path) -> str:
    folder = path.parent
    names = sorted(item.name for item in folder.iterdir() if item.suffix in (".yaml", ".yml")) if folder.is_dir() else []
    match = nearest(path.name, names)
    return f"; did you mean {folder / match[0]}?" if match else ""


def _gather(paths: Sequence[str | Path], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Merged raw values, where each was set, and the problems of reading."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    if not paths:
        problems.append("no configuration file: give at least one --config FILE")
    for path in paths:
        document = read_file(path)
        problems += document.problems
        if not document.problems:
            _merge(values, document.values, Config)
            origins.update({key: f"{path}:{line}" for key, line in document.lines.items()})
    for override in overrides:
        problem = _apply_override(values, origins, override)
        if problem:
            problems.append(problem)
    return values, origins, problems


def _merge(target: dict[str, Any], later: dict[str, Any], section: type[BaseModel] | None) -> None:
    """Lays `later` over `target`: sections and mappings key by key, other values whole."""
    for name, value in later.items():
        field = section.model_fields.get(name) if section is not None else None
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value, section_of(field.annotation) if field is not None and is_section(field) else None)
        else:
            target[name] = value


def _apply_override(values: dict[str, Any], origins: dict[str, str], override: str) -> str | None:
    """Sets what one override names; returns the problem if it cannot."""
    key, equals, text = override.partition("=")
    if not equals or not _NAME.match(key):
        return f"{override}: an override is section.field=value, with no spaces around ="
    if not text:
        return f"{override}: there is no value; write {key}=null for nothing, or {key}='\"\"' for an empty text"
    document = read_yaml(text, COMMAND_LINE, with_lines=False, path=key)
    if document.problems:
        return "; ".join(problem if key in problem else f"{problem} (in {override})" for problem in document.problems)
    *parents, name = key.split(".")
    inner = values
    for depth, parent in enumerate(parents):
        if inner.get(parent) is None:
            inner[parent] = {}
        if not isinstance(inner[parent], dict):
            reached = ".".join(parents[: depth + 1])
            return f"{override}: {reached} is {kind(inner[parent])} ({shown(inner[parent])}), not a section; set {reached} as a whole"
        inner = inner[parent]
    inner[name] = document.values
    for old in [old for old in origins if old == key or old.startswith(key + ".")]:
        del origins[old]
    origins[key] = COMMAND_LINE
    return None


def _check(values: dict[str, Any], origins: dict[str, str]) -> tuple[Config, list[str], set[str]]:
    """The configuration, the schema's complaints as sentences, and the settings that cannot be relied on."""
    try:
        return Config.model_validate(values), [], set()
    except ValidationError as error:
        problems: list[str] = []
        doubtful: set[str] = set()
        for detail in settle_alternatives(error.errors(include_url=False)):
            sentences, keys = rewrite(detail, origins)
            problems += sentences
            doubtful.update(keys)
        config = _best_effort(values)
        return config, problems + _remaining_rules(config, problems, doubtful), doubtful


def _remaining_rules(config: Config, found: list[str], doubtful: set[str]) -> list[str]:
    """Broken rules inside sections that the schema did not come to, because a value of the section is wrong by itself."""
    problems: list[str] = []
    for name in Config.model_fields:
        section = getattr(config, name)
        if isinstance(section, Section) and all(hasattr(section, setting) for setting in type(section).model_fields):
            broken = [broken_rule(name, sentence) for reads, sentence in section.rules() if not overlap([f"{name}.{setting}" for setting in reads], doubtful)]
            problems += [problem for problem in broken if not any(other.startswith(problem) for other in found)]
    return problems


def _best_effort(values: dict[str, Any]) -> Config:
    """A configuration of the sections that are sound, so that the rules between them can still be checked."""
    sections: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation) if is_section(field) else None
        given = values.get(name)
        if section is None:
            sections[name] = given if type(given) is type(field.get_default(call_default_factory=True)) else field.get_default(call_default_factory=True)
        elif given is None and not field.is_required():
            sections[name] = field.get_default(call_default_factory=True)
        else:
            sections[name] = _sound_section(section, given if isinstance(given, dict) else {})
    return Config.model_construct(**sections)


def _sound_section(section: type[BaseModel], given: dict[str, Any]) -> BaseModel:
    """A section with its unsound fields left out, and whatever its rules say; fields without a default that are unsound stay unset."""
    try:
        return section.model_validate(given, context=VALUES_ONLY)
    except ValidationError as error:
        bad = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
        sound = {name: value for name, value in given.items() if name not in bad and name in section.model_fields}
        try:
            return section.model_validate(sound, context=VALUES_ONLY)
        except ValidationError:
            return section.model_construct(**sound)
