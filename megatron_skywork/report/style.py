"""The look of every plot: one palette, one type size, no more ink than the data needs.

Plots are drawn for white paper; the page turns them for dark screens. A panel is as wide as a phone shows it without scaling its letters away.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")

INK, MUTED, GRID = "#22303c", "#6b7785", "#e7eaee"
BLUE, ORANGE, GREEN, PURPLE, OCHRE, TEAL = "#2b6cb0", "#cf5f36", "#3a8a68", "#7b5bb5", "#b98a1d", "#2f9aa8"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, OCHRE, TEAL)
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f6f8fb", "#c9ddf0", "#7fb0da", "#2b6cb0", "#143a63"])
WARMTH = LinearSegmentedColormap.from_list("warmth", ["#faf7f3", "#f6d6b4", "#e79a63", "#cf5f36", "#7d2416"])
BALANCE = LinearSegmentedColormap.from_list("balance", ["#1f5a9c", "#8db8dd", "#f5f4f1", "#eda880", "#b8451f"])

PANEL_INCHES = (5.3, 3.0)
WIDE_INCHES = 8.8
_DPI = 170
_MAX_COLUMNS = 120
_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#b9c1ca",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=CYCLE),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Plot:
    """A drawn plot with what the page says about it."""

    key: str
    """File name without suffix, and anchor."""
    title: str
    how_to_read: str
    png: bytes
    wide: bool = False


def panel(width: float = PANEL_INCHES[0], height: float = PANEL_INCHES[1]) -> tuple[Canvas, Any]:
    """An empty plot in the report's style, without matplotlib's global state."""
    with matplotlib.rc_context(_SETTINGS):
        canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="white")
        axes = canvas.subplots()
    return canvas, axes


def png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        canvas.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def label_steps(axes: Any, what: str) -> None:
    """Name the value above its axis, where it is read without tilting the head, and the steps below."""
    axes.set_title(what, loc="left", fontsize=8.5, color=MUTED, pad=8)
    axes.set_xlabel("step")
    left, right = axes.get_xlim()
    if right - left < 1.05:  # a lone step: fractions of a step mean nothing
        axes.set_xticks([round((left + right) / 2)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def legend(axes: Any, columns: int = 4) -> None:
    """A legend above the plot, at the right, where no line runs through it."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    short = [label if len(label) <= 24 else label[:23] + "…" for label in labels]
    spacing = {"handlelength": 1.1, "columnspacing": 1.1, "borderaxespad": 0.2}
    with matplotlib.rc_context(_SETTINGS):
        axes.legend(handles, short, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=min(columns, len(labels)), **spacing)


def line(axes: Any, steps: np.ndarray, values: np.ndarray, **options: Any) -> None:
    """A line; a lone point gets a mark, for a line through one point cannot be seen."""
    if np.isfinite(values).sum() <= 1:
        options.setdefault("marker", "o")
        options.setdefault("markersize", 4)
    axes.plot(steps, values, **options)


def _width(values: np.ndarray) -> int | None:
    """Points that a running statistic covers: a twentieth of a long series, odd; None for a short one, which is its own best picture."""
    return None if len(values) < 60 else max(7, len(values) // 20) | 1


def smoothed(values: np.ndarray) -> np.ndarray | None:
    """A centred, bell-weighted running mean of a long series, NaN left out; None for a short one."""
    width = _width(values)
    if width is None:
        return None
    known = np.isfinite(values)
    kernel = np.hanning(width + 2)
    # Both ends are divided by the weight they really have.
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    weight = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(weight > 0, total / np.maximum(weight, 1e-12), np.nan)


def running_median(values: np.ndarray) -> np.ndarray | None:
    """A centred running median of a long series, for values with spikes, which a mean would smear; None for a short one."""
    width = _width(values)
    if width is None:
        return None
    padded = np.pad(np.where(np.isfinite(values), values, np.nan), width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    known = np.isfinite(windows).any(axis=1)
    medians = np.full(len(values), np.nan)
    medians[known] = np.nanmedian(windows[known], axis=1)
    return medians


def binned(steps_S: np.ndarray, values_SL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of consecutive records, so that a heatmap has no more columns than it has pixels: edges [C+1] in steps, values [C, L]."""
    chunks = np.array_split(np.arange(len(steps_S)), min(_MAX_COLUMNS, len(steps_S)))
    means = np.stack([_mean_of_known(values_SL[chunk]) for chunk in chunks])
    starts = [float(steps_S[chunk[0]]) for chunk in chunks]
    spacing = (steps_S[-1] - steps_S[0]) / max(1, len(steps_S) - 1) if len(steps_S) > 1 else 1.0
    return np.array([*starts, float(steps_S[-1]) + spacing]) - spacing / 2, means


def _mean_of_known(values_CL: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values_CL)
    return np.where(known.any(axis=0), np.where(known, values_CL, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)
