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
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, OCHRE, TEAL, "#c2487a", "#8a5a3b", "#7fa22e", "#55606e")
# Beyond ten lines colours repeat, dashed and then dotted.
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f6f8fb", "#c9ddf0", "#7fb0da", "#2b6cb0", "#143a63"])
WARMTH = LinearSegmentedColormap.from_list("warmth", ["#faf7f3", "#f6d6b4", "#e79a63", "#cf5f36", "#7d2416"])
BALANCE = LinearSegmentedColormap.from_list("balance", ["#1f5a9c", "#8db8dd", "#f5f4f1", "#eda880", "#b8451f"])

PANEL_INCHES = (5.3, 3.0)
WIDE_INCHES = 8.8
_DPI = 170
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
    shows: str = ""
    """The plot's main numbers in words, for those who do not see it and for those who want them exact."""


def panel(width: float = PANEL_INCHES[0], height: float = PANEL_INCHES[1], rows: int = 1, columns: int = 1, **options: Any) -> tuple[Canvas, Any]:
    """An empty plot in the report's style, without matplotlib's global state; several axes where rows or columns are more than one."""
    with matplotlib.rc_context(_SETTINGS):
        canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="white")
        axes = canvas.subplots(rows, columns, **options)
    return canvas, axes


def png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        canvas.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def name_value(axes: Any, what: str) -> None:
    """Name the value above its axis, where it is read without tilting the head."""
    axes.set_title(what, loc="left", fontsize=8.5, color=MUTED, pad=8)


def label_steps(axes: Any, what: str) -> None:
    """Name the value above its axis and the steps below."""
    name_value(axes, what)
    axes.set_xlabel("step")
    left, right = axes.get_xlim()
    if right - left < 1.05:  # a lone step: fractions of a step mean nothing
        axes.set_xticks([round((left + right) / 2)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def legend(axes: Any, columns: int = 4, below: Canvas | None = None) -> None:
    """A legend where no line runs through it: above the axes, at the right, or below the whole of `below`."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = min(columns, len(labels))
    spacing = {"handlelength": 1.1, "columnspacing": 1.1, "borderaxespad": 0.2}
    with matplotlib.rc_context(_SETTINGS):
        if below is not None:
            below.legend(handles, labels, loc="outside lower center", ncols=columns, **spacing)
            return
        short = [label if len(label) <= 24 else label[:23] + "…" for label in labels]
        axes.legend(handles, short, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, **spacing)


def line(axes: Any, steps: np.ndarray, values: np.ndarray, **options: Any) -> None:
    """A line; a lone point gets a mark, for a line through one point cannot be seen."""
    if np.isfinite(values).sum() <= 1:
        options.setdefault("marker", "o")
        options.setdefault("markersize", 4)
    axes.plot(steps, values, **options)
