"""Averages that know about gaps and about length: what was not recorded is NaN and is left out, and a long series is summarized before it is drawn.

Shapes: S recorded steps, L series side by side (layers), C columns of a heatmap.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MAX_COLUMNS = 120
_MAX_MEDIANS = 2000


def window_of(num_records: int) -> int:
    """How many records "at the end" are: the last tenth."""
    return max(1, num_records // 10)


def nan_mean(values: np.ndarray, axis: int | None = None) -> Any:
    """Mean of what is there; NaN, without a warning, where nothing is."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=axis, dtype=np.float64)
    count = known.sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan) if np.ndim(total) else (float(total / count) if count else float("nan"))


def nan_range(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest of what is there along an axis."""
    known = np.ma.masked_invalid(values)
    return np.ma.filled(known.min(axis=axis), np.nan), np.ma.filled(known.max(axis=axis), np.nan)


def _width(values: np.ndarray, part: int = 20) -> int | None:
    """Points that a running statistic covers: a twentieth of a long series, odd; None for a short one, which is its own best picture."""
    return None if len(values) < 60 else max(7, len(values) // part) | 1


def smoothed(values: np.ndarray, part: int = 20) -> np.ndarray | None:
    """A centred, bell-weighted running mean of a long series over the `part`-th part of it, NaN left out; None for a short one."""
    width = _width(values, part)
    if width is None:
        return None
    known = np.isfinite(values)
    kernel = np.hanning(width + 2)
    # Both ends are divided by the weight they really have.
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    weight = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(weight > 0, total / np.maximum(weight, 1e-12), np.nan)


def calm(values: np.ndarray, part: int = 20) -> np.ndarray:
    """Smoothed where it is long, as it is where it is short."""
    smooth = smoothed(values, part)
    return values if smooth is None else smooth


def running_median(values: np.ndarray) -> np.ndarray | None:
    """A centred running median of a long series, for values with spikes, which a mean would smear; None for a short one.

    A very long series gets some thousand medians and straight lines between them.
    """
    width = _width(values)
    if width is None:
        return None
    stride = -(-len(values) // _MAX_MEDIANS)
    padded = np.pad(np.where(np.isfinite(values), values, np.nan), width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[::stride]
    known = np.isfinite(windows).any(axis=1)
    medians = np.full(len(windows), np.nan)
    medians[known] = np.nanmedian(windows[known], axis=1)
    places = np.arange(0, len(values), stride)
    return medians if stride == 1 else np.interp(np.arange(len(values)), places, medians)


def binned(steps_S: np.ndarray, values_SL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of consecutive records, so that a heatmap has no more columns than it has pixels: edges [C+1] in steps, values [C, L]."""
    chunks = np.array_split(np.arange(len(steps_S)), min(_MAX_COLUMNS, len(steps_S)))
    means = np.stack([nan_mean(values_SL[chunk], axis=0) for chunk in chunks])
    return edges_of(np.array([steps_S[chunk[0]] for chunk in chunks]), int(steps_S[0]), int(steps_S[-1]), len(steps_S)), means


def edges_of(starts_C: np.ndarray, first: int, last: int, num_records: int) -> np.ndarray:
    """Edges of columns that start at these steps: half a record before each, and half a record after the last step, [C+1]."""
    spacing = (last - first) / max(1, num_records - 1) if num_records > 1 else 1.0
    return np.array([*starts_C.astype(float), float(last) + spacing]) - spacing / 2
