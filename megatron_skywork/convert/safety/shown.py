"""How values that were read from a stranger's file are quoted in messages: in a few words, and of a long list its first lines."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

SHOWN_LINES = 40

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxother = 2, 80, 80


def shown(value: Any) -> str:
    """A value in a few words: one of nested references could be exponentially long, a number have a million digits."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return _brief.repr(value)


def brief(name: str) -> str:
    """A name from a file, or of a very long one its beginning."""
    return name if len(name) <= 300 else f"{name[:300]}... ({len(name)} characters)"


def first_lines(lines: Sequence[str], limit: int = SHOWN_LINES) -> list[str]:
    """At most `limit` lines, and how many more there are: a folder can be wrong in a million places, and its message is read by a person."""
    more = len(lines) - limit
    return [*lines[:limit], *([f"and {more} more"] if more > 0 else [])]


def reason(error: BaseException) -> str:
    """An exception in a few words of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
