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


def sized(num_bytes: float) -> str:
    """263000000000 -> `263.0 GB`, in powers of ten."""
    for size, unit in _UNITS:
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {'G' if unit == 'B' else unit}B"
    return f"{num_bytes:.0f} bytes"


def gibibytes(num_bytes: float) -> str:
    """85520809984 -> `79.6 GiB`, for memory, as torch and nvidia-smi count it; less than one in MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


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
