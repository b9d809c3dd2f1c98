"""Numbers as people read them, the same on the console and in the report."""

from __future__ import annotations

import math

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def count(number: float) -> str:
    """373100000 -> `373.1 M`."""
    for size, unit in _UNITS:
        if abs(number) >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """`8.1 s`, `2m 46s`, `1h 04m`, `3d 02h`: two units at most, because nobody plans by the second an hour ahead."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{int(seconds) // 60}m {int(seconds) % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = minutes // 60
    return f"{hours // 24}d {hours % 24:02d}h"


def percent(share: float) -> str:
    """0.0123 -> `1.23 %`, 0.346 -> `34.6 %`, 0 -> `0 %`."""
    value = 100 * share
    if value == 0:
        return "0 %"
    return f"{value:.1f} %" if abs(value) >= 10 else f"{value:.2g} %" if abs(value) < 1 else f"{value:.2f} %"
