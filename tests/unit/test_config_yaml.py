"""The strict YAML reader and the writer that agrees with it."""

import datetime
import math

import pytest
import yaml

from megatron_skywork.config.yaml_strict import read_yaml, write_yaml


def value_of(text: str):
    document = read_yaml(f"key: {text}\n", "x.yaml")
    assert document.problems == []
    return document.values["key"]


@pytest.mark.parametrize(("text", "value"), [
    ("3e-4", 3e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.", 1.0), (".5", 0.5), ("10", 10), ("-10", -10), ("0", 0), ("1_000_000", 1000000), ("0x1f", 31),
    ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("0o10", "0o10"), ("2024-01-31", "2024-01-31"), ("'010'", "010"),
    ('"12:30:00"', "12:30:00"), ("a:b", "a:b"), ("[1, 2.0, x, {y: 3e-4}]", [1, 2.0, "x", {"y": 3e-4}]), ("e5", "e5"), (".inf", math.inf),
])
def test_what_a_scalar_means(text, value):
    found = value_of(text)
    assert found == value and type(found) is type(value)


REFUSED = [
    ("a: 1\nb: 010\n", "x.yaml:2: b=010 would be an octal number"),
    ("a: 1\nb: -0_7\n", "write -7"),
    ("a:\n  b: 12:30:00\n", "x.yaml:2: a.b=12:30:00 would be a base-60 number"),
    ("a: 1:30\n", "base-60"),
    ("a: 1\nb: 2\na: 3\n", "x.yaml:3: a is set twice (first on line 1)"),
    ("a:\n  b: 1\n  b: 1\n", "x.yaml:3: a.b is set twice (first on line 2)"),
    ("a: &anchor 1\n", "x.yaml:1: anchors and aliases"),
    ("a: &x [*x]\n", "anchors and aliases"),
    ("a: !!python/object/apply:os.system [ls]\n", "tags (tag:yaml.org,2002:python/object/apply:os.system)"),
    ("a: !mine 1\n", "tags (!mine)"),
    ("a: 1\n---\nb: 2\n", "a second document"),
    ("1: a\n", "x.yaml:1: the key 1 is not text"),
    ("true: a\n", "the key true is not text"),
    ("[a, b]: c\n", "not text"),
    ("a: [1, 2\n", "x.yaml:2: not readable as YAML"),
    ("a: b: c\n", "x.yaml:1: a `:` stands where a value was expected"),
    ("a:\n\t- b\n", "x.yaml:2: a tab is used for indentation"),
    ("a: " + "[" * 60 + "]" * 60 + "\n", "nested deeper than"),
    ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested deeper than"),
    ("a: " + "9" * 5000 + "\n", "64 bits"),
    ("a: \x07\n", "not readable as YAML"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_what_is_refused(text, expected):
    problems = read_yaml(text, "x.yaml").problems
    assert len(problems) == 1 and expected in problems[0], problems


def test_all_problems_of_a_text_are_collected():
    problems = read_yaml("a: 010\nb: {c: 1:30, d: 2}\na: 3\n", "x.yaml").problems
    assert [problem.split(" ")[0] for problem in problems] == ["x.yaml:1:", "x.yaml:2:", "x.yaml:3:"]


def test_lines_are_known_for_every_key():
    assert read_yaml("a:\n  b: 1\n  c:\n    - {d: 2}\ne: 3\n", "x.yaml").lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c.0.d": 4, "e": 5}


ODD_TEXTS = ["", " ", "010", "0", "12:30:00", "3e-4", "1e5", ".5", "1_0", "true", "True", "null", "~", "yes", "no", "on", "off", "n", "2024-01-31", "<<",
             "=", "a: b", "# no comment", "- x", "[x]", "{x: 1}", "*x", "&x", "!x", "%x", "@x", "`x`", "a\nb",
             "\ttab", "trailing ", " leading", "\u00e9\u4e2d\u6587", "'", '"',
             "\\", "0x1f", ".inf", ".nan", "-", "?", "|", ">", "x" * 400, "word " * 60]


def test_what_is_written_reads_back_the_same():
    numbers = [0, -5, 10**18, 0.0, -0.1, 1e-8, 3e-4, 1e20, 1e300, math.inf]
    values = {"texts": ODD_TEXTS, "deep": [{"a": [], "b": {}, "c": [[1, 2], [3]]}, None, True, False], "numbers": numbers}
    values["named"] = {text: index for index, text in enumerate(ODD_TEXTS)}
    document = read_yaml(write_yaml(values), "x.yaml")
    assert document.problems == [] and document.values == values
    assert all(type(a) is type(b) for a, b in zip(document.values["numbers"], numbers, strict=True))


def test_yaml_1_1_readers_understand_what_is_written():
    """The stock reader of PyYAML, with its other rules, sees the same texts."""
    read = yaml.safe_load(write_yaml({"texts": ODD_TEXTS}))["texts"]
    assert read == ODD_TEXTS and not any(isinstance(item, (bool, datetime.date)) for item in read)
