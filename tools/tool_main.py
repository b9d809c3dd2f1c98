"""How a command of this folder ends: its answer as text or JSON, a user's mistake as a sentence and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, EXIT_REFUSED, UserError


def finish(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any] | None], describe: Callable[[dict[str, Any]], str]) -> int:
    """Run a command and print what it returns (None prints nothing); returns the exit code.

    A result whose `passed` is false, or whose exit is otherwise a refusal, ends with EXIT_REFUSED.
    """
    try:
        result = run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}{_goes_on(arguments)}", file=sys.stderr)
        return EXIT_OTHER
    except KeyboardInterrupt:
        print(f"interrupted{_goes_on(arguments)}", file=sys.stderr)
        return 130
    if result is None:
        return EXIT_DONE
    try:
        print(json.dumps(result, allow_nan=False) if arguments.json else describe(result), flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: the work is done, and its result cannot be printed ({error.strerror or error})", file=sys.stderr)
        return EXIT_OTHER
    return EXIT_REFUSED if result.get("passed") is False else EXIT_DONE


def _goes_on(arguments: argparse.Namespace) -> str:
    return "; the same command goes on where this one stopped" if hasattr(arguments, "out") else ""


def lines(result: dict[str, Any], indent: str = "") -> str:
    """A result as lines `name: value`; numbers by layer in one line, equal neighbours together."""
    found = []
    for name, value in result.items():
        if value is None or value == []:
            continue
        if isinstance(value, dict) and value and all(key.isdigit() for key in value):
            found.append(f"{indent}{name}: {_by_number(value)}")
        elif isinstance(value, dict):
            found += [f"{indent}{name}:", lines(value, indent + "  ")]
        elif name == "problems":
            found += [f"{indent}{name}:", *(f"{indent}  {_shown(item)}" for item in value)]
        else:
            found.append(f"{indent}{name}: {', '.join(map(_shown, value)) if isinstance(value, list) else _shown(value) if name != 'seed' else value}")
    return "\n".join(found)


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    # Names come from a stranger's folder: a line break or an escape sequence in one must not pass for output of ours.
    return f"{value:.6g}" if isinstance(value, float) else str(UserError(str(value))).replace("\n", "\\n")


def _by_number(values: dict[str, Any]) -> str:
    """`0-29: 1` for thirty equal values."""
    groups: list[tuple[str, str, str]] = []
    for key, value in values.items():
        if groups and groups[-1][2] == _shown(value):
            groups[-1] = (groups[-1][0], key, groups[-1][2])
        else:
            groups.append((key, key, _shown(value)))
    return ", ".join(f"{first if first == last else f'{first}-{last}'}: {value}" for first, last, value in groups)
