"""Settings that are wrong, through the command line: each is answered at once with exit code 2 and a sentence that names what is wrong, never a traceback."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fault import Fault, Outcome


def command_line(*arguments: str) -> tuple[object, str]:
    """Exit code and stderr of launch/pretrain_moe.py, or the exception that a user would see as a traceback."""
    from megatron_skywork.cli import pretrain

    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            pretrain(arguments)
    except SystemExit as end:
        return end.code, said.getvalue()
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"[:300], said.getvalue()


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Paths that a setting names are meant from here."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _parts(overrides: str) -> list[str]:
    return re.split(r" (?=[a-z0-9_.]+=)", overrides)


def _settings() -> list[tuple[list[str], int | None, list[str]]]:
    """Overrides, number of ranks, and what the answer must say. The tests' own table, and its cases pass here through the command line."""
    from test_config_errors import WRONG

    found = []
    for overrides, world_size, start, advice in WRONG:
        # A number of ranks is an argument of the command line, which is the one to name it.
        found.append((_parts(overrides), world_size, ["--world-size 0"] if world_size == 0 else [start, advice]))
    return found


def _refusal(arguments: list[str], said: list[str]) -> str | None:
    code, text = command_line(*arguments)
    if code != 2:
        return f"{arguments[2:]}: answered with {code!r}"
    missing = [words for words in said if words not in text]
    return f"{arguments[2:]}: the answer does not say {missing}: {text}" if missing or "Traceback" in text else None


def wrong_settings(folder: Path, short: bool) -> Outcome:
    from test_config_errors import BASE

    outcome = Outcome()
    (folder / "base.yaml").write_text(BASE)
    with inside(folder):
        for overrides, world_size, said in _settings()[:: 8 if short else 1]:
            ranks = [] if world_size is None else ["--world-size", str(world_size)]
            outcome.add(_refusal(["--config", "base.yaml", *overrides, "--dry-run", *ranks], said))
    return outcome


def wrong_files(folder: Path, short: bool) -> Outcome:
    from test_config_errors import WRONG_FILES
    from test_config_yaml import REFUSED

    outcome = Outcome()
    contents = [*WRONG_FILES, *((text.encode(), expected) for text, expected in REFUSED)]
    with inside(folder):
        for content, expected in contents[:: 4 if short else 1]:
            Path("x.yaml").write_bytes(content)
            outcome.add(_refusal(["--config", "x.yaml", "--dry-run"], [expected]))
        for arguments, expected in (
            (["--config", "."], "this is a folder"), (["--config", "nowhere.yaml"], "nowhere.yaml"), (["--steps", "3", "--config", "x.yaml"], "--steps"),
            (["--config", "x.yaml", "--world-size", "many"], "--world-size"), (["--json", "--config", "x.yaml"], "--json"), ([], "--config"),
        ):  # fmt: skip
            outcome.add(_refusal(arguments, [expected]))
    return outcome


def odd_values(folder: Path, short: bool) -> Outcome:
    """Every setting with values of every kind: a plan or a refusal, and nothing else."""
    from test_config_errors import BASE, ODD_VALUES

    from megatron_skywork.config.manual import section_names, settings

    outcome = Outcome()
    (folder / "base.yaml").write_text(BASE)
    names = [*(setting.name for setting in settings()), *section_names()]
    with inside(folder):
        for name in names[:: 20 if short else 1]:
            for value in ODD_VALUES:
                code, text = command_line("--config", "base.yaml", f"{name}={value}", "--dry-run", "--world-size", "4")
                whole = code == 0 or (code == 2 and "Traceback" not in text and name.split(".")[0] in text)
                outcome.add(None if whole else f"{name}={value}: answered with {code!r}")
    return outcome


def _naively_read(text: str, overrides: list[str]) -> Any:
    """The settings as a short script reads them: PyYAML, a split at the first `=`, and a class made of the result."""
    import yaml

    from megatron_skywork.config.schema import Config

    values = yaml.safe_load(text)
    for override in overrides:
        name, _, value = override.partition("=")
        *sections, field = name.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[field] = yaml.safe_load(value)
    return Config(**values)


def naive_settings(folder: Path, short: bool) -> Outcome:
    """Of the same cases, those that the naive reader takes without a word are lost; those that it meets with any exception are not counted against it."""
    from test_config_errors import BASE
    from test_config_yaml import REFUSED

    outcome = Outcome(note="taken without a word")
    limit = sys.getrecursionlimit()
    for text, overrides in [*((BASE, overrides) for overrides, _, _ in _settings()), *((BASE + text, []) for text, _ in REFUSED)][:: 8 if short else 1]:
        try:
            _naively_read(text, overrides)
        except Exception:
            outcome.add(None)
        else:
            outcome.add(f"{overrides or text!r}: taken")
        sys.setrecursionlimit(limit)
    return outcome


FAULTS = [
    Fault("settings that are wrong, on the command line", wrong_settings),
    Fault("files of settings that are wrong", wrong_files),
    Fault("every setting with a value of every kind", odd_values),
    Fault("control: wrong settings read by PyYAML and a class alone", naive_settings, is_control=True),
]
