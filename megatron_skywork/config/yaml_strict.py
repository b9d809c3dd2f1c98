"""YAML without its surprises, and where in a file every value stands.

YAML 1.1 reads `010` as 8, `12:30:00` as 45000, `no` as false, `3e-4` as text, and keeps the last of two equal keys without a word. A training run
that was started with such a value is noticed days later, so here: `010` and `12:30:00` are errors that name the line (quote them if text is
meant), only true and false are booleans, `3e-4` is a number, equal keys, anchors, tags and a second document are errors. All problems of a
text are collected. The writer quotes exactly what this reader would take for something else, so what is written reads back the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_OCTAL = re.compile(r"[-+]?0[0-9_]+$")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")

_TAG = "tag:yaml.org,2002:"
_OCTAL_TAG, _SEXAGESIMAL_TAG = "!octal", "!sexagesimal"
_RESOLVERS = [
    (_TAG + "null", _NULL, ["~", "n", "N", ""]),
    (_TAG + "bool", _BOOL, list("tTfF")),
    (_OCTAL_TAG, _OCTAL, list("-+0")),
    (_SEXAGESIMAL_TAG, _SEXAGESIMAL, list("-+0123456789")),
    (_TAG + "int", _INT, list("-+0123456789")),
    (_TAG + "float", _FLOAT, list("-+0123456789.")),
]
_MAX_DEPTH = 40


class _Refused(yaml.MarkedYAMLError):
    """YAML that is well formed and not wanted here."""


class StrictLoader(yaml.SafeLoader):
    """SafeLoader with the reading rules of this module; used to compose nodes, never to construct objects."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            problem = f"anchors and aliases (&{event.anchor}, *{event.anchor}) are not read here; write the value out"
            raise _Refused(problem=problem, problem_mark=event.start_mark)
        if getattr(event, "tag", None):
            raise _Refused(problem=f"tags ({event.tag}) are not read here; write the plain value", problem_mark=event.start_mark)
        if self.depth >= _MAX_DEPTH:
            raise _Refused(problem=f"nested deeper than {_MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever `StrictLoader` would not read back as the same text."""

    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # lists stand deeper than their key


def _represent_list(dumper: StrictDumper, data: list) -> yaml.Node:
    """A list of plain values stands on one line, as a person writes it."""
    return dumper.represent_sequence(_TAG + "seq", data, flow_style=not any(isinstance(item, (list, dict)) for item in data))


StrictDumper.add_representer(list, _represent_list)
for _tag, _pattern, _first in _RESOLVERS:
    StrictLoader.add_implicit_resolver(_tag, _pattern, _first)
    StrictDumper.add_implicit_resolver(_tag, _pattern, _first)
# Only quoting is at stake: without it a YAML 1.1 reader elsewhere would see booleans, dates and merge keys in our resolved configs.
_YAML_1_1_WORD = re.compile(r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|y|Y|n|N|<<|=|[0-9]{4}-[0-9][-0-9]*.*)$")
StrictDumper.add_implicit_resolver("!word", _YAML_1_1_WORD, list("yYnNoO<=0123456789"))


@dataclass
class Document:
    """What a text says, where each value stands, and what is wrong with it.

    Args:
        values: plain Python (dict, list, str, int, float, bool, None); None if the text is not readable.
        lines: 1-based line of every key, under its dotted path.
        problems: one sentence each, beginning with the source and, for files, the line.
    """

    values: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Reader:
    """Turns composed nodes into plain Python values and collects problems on the way."""

    def __init__(self, source: str, with_lines: bool):
        self.source, self.with_lines = source, with_lines
        self.document = Document()

    def problem(self, mark: Any, text: str) -> None:
        where = f"{self.source}:{mark.line + 1}" if self.with_lines and mark is not None else self.source
        self.document.problems.append(f"{where}: {text}")

    def value(self, node: yaml.Node, path: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{path}.{index}") for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = name if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.problem(key_node.start_mark, f"{path + ': ' if path else ''}the key {shown} is not text; quote it if it is a name")
                continue
            dotted = f"{path}.{name}" if path else name
            if name in values:
                self.problem(key_node.start_mark, f"{dotted} is set twice (first on line {first_line[name]}); keep one")
                continue
            first_line[name] = self.document.lines[dotted] = key_node.start_mark.line + 1
            values[name] = self.value(value_node, dotted)
        return values

    def scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        text, tag = node.value, node.tag
        key = f"{path}={text}" if path else text
        if tag == _OCTAL_TAG:
            number = int(text.replace("_", ""))
            self.problem(node.start_mark, f'{key} would be an octal number to some YAML readers; write {number}, or "{text}" in quotes if text is meant')
        elif tag == _SEXAGESIMAL_TAG:
            advice = f'write seconds as one number, or "{text}" in quotes if text is meant'
            self.problem(node.start_mark, f"{key} would be a base-60 number to some YAML readers; {advice}")
        elif tag == _TAG + "null":
            return None
        elif tag == _TAG + "bool":
            return text.lower() == "true"
        elif tag == _TAG + "int":
            return self.integer(node, key)
        elif tag == _TAG + "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower()))
        return text

    def integer(self, node: yaml.ScalarNode, key: str) -> int | None:
        number = int(node.value.replace("_", ""), 16 if "x" in node.value else 10) if len(node.value) <= 100 else 2**63
        if abs(number) >= 2**63:
            self.problem(node.start_mark, f"{key if len(key) < 60 else key[:60] + '...'}: more than 64 bits hold; use a smaller number")
            return None
        return number


def read_yaml(text: str, source: str, with_lines: bool = True, path: str = "") -> Document:
    """Reads one YAML document strictly.

    Args:
        text: the YAML.
        source: what to call it in problems (a file name, an override).
        with_lines: say line numbers (pointless for a one-line override).
        path: dotted path the value will stand under, for problems.

    Returns:
        the values and every problem found; nothing is raised for bad YAML.
    """
    reader = _Reader(source, with_lines)
    try:
        loader = StrictLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is not None:
            reader.document.values = reader.value(node, path)
    except _Refused as error:
        reader.problem(error.problem_mark, str(error.problem))
    except yaml.MarkedYAMLError as error:
        reader.problem(error.problem_mark, _sentence(error.problem or "not readable as YAML"))
    except yaml.YAMLError as error:
        reader.problem(None, f"not readable as YAML: {str(error).splitlines()[0]}")
    except RecursionError:
        reader.problem(None, f"nested deeper than {_MAX_DEPTH} levels")
    return reader.document


def _sentence(problem: str) -> str:
    """PyYAML's few common complaints in plain words; the rest as they are."""
    plain = {
        "mapping values are not allowed here": "a `:` stands where a value was expected; is a line indented wrongly, or does a text with `: ` need quotes?",
        "found character '\\t' that cannot start any token": "a tab is used for indentation; use spaces",
    }
    if "another document" in problem or "single document" in problem:
        return "a second document begins here (---); one file is one document"
    return plain.get(problem) or f"not readable as YAML: {problem}"


def write_yaml(values: Any) -> str:
    """YAML text which `read_yaml` reads back as exactly the same values."""
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=140, default_flow_style=False)
