"""A finding, and how its sentences are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_MOST_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One sentence or two of plain text."""

    level: Literal["good", "note", "warn"]
    text: str


def whole_percent(share: Any) -> str:
    """0.234 -> `23 %`."""
    return f"{100 * share:.0f} %"


def plural(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(parts: list[str]) -> str:
    """`a, b and c`; of many the first three and how many more."""
    more = len(parts) - _MOST_NAMED
    shown = parts[:_MOST_NAMED] + ([f"{more} more"] if more > 0 else [])
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def cosine(value: float) -> str:
    """Three decimals, and no `-0.000`."""
    return f"{round(value, 3) + 0.0:.3f}"
