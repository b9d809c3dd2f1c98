"""What the routers' plots share: lines of a few layers over the range of all, heatmaps of layers, and the numbers of a plot in words.

Shapes: S recorded steps, L MoE layers, C columns of a heatmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from megatron_skywork.metrics import wording
from megatron_skywork.report.averages import binned, calm, nan_mean, nan_range
from megatron_skywork.report.router_records import Router
from megatron_skywork.report.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, Plot, label_steps, legend, line, panel, png

BAND = "#8a97a6"


def percent(value: float, _: Any = None) -> str:
    """An axis label."""
    return f"{100 * value:.3g} %"


def in_words(router: Router, values_SL: np.ndarray, form: Callable[[float], str]) -> str:
    """Start, end, and the layers at both extremes."""
    start_L, end_L = router.at_start(values_SL), router.at_end(values_SL)
    if not np.isfinite(end_L).any():
        return ""
    low, high = int(np.nanargmin(end_L)), int(np.nanargmax(end_L))
    if len(end_L) == 1:
        return f"Layer {router.layers[0]}: {form(float(start_L[0]))} at the start, {form(float(end_L[0]))} at the end."
    text = f"Mean over layers {form(nan_mean(start_L))} at the start, {form(nan_mean(end_L))} at the end"
    if len(values_SL) == 1:
        text = f"Mean over layers {form(nan_mean(end_L))}"
    if form(float(end_L[high])) == form(float(end_L[low])):
        return f"{text}, the same in every layer."
    shown = [f"in layer {router.layers[index]} ({form(float(end_L[index]))})" for index in (high, low)]
    return f"{text}; {'then ' if len(values_SL) > 1 else ''}highest {shown[0]}, lowest {shown[1]}."


def over_time(
    router: Router, key: str, title: str, text: str, what: str, values_SL: np.ndarray, form: Callable[[float], str] = "{:.3g}".format, low: bool = False,
    dots: bool = False,
) -> Plot | None:
    """Lines over the steps: the mean and a few layers, over the range of all.

    Args:
        low: whether the lowest layer is the one to look at; else the highest.
        dots: whether every value is marked, where they are few.
    """
    if not np.isfinite(values_SL).any():
        return None
    canvas, axes = panel()
    draw_layers(axes, router.steps_S, values_SL, router.layers, chosen_layers(router, values_SL, low))
    for drawn in axes.get_lines() if dots else []:
        drawn.set(marker="o", markersize=2.5)
    if form is wording.percent:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
    label_steps(axes, what)
    legend(axes, columns=4)
    text += " Grey: the range over all layers." if has_band(router.layers, router.steps_S) else ""
    return Plot(key, title, text, png(canvas), shows=in_words(router, values_SL, form))


def has_band(layers: Sequence[int], steps_S: np.ndarray) -> bool:
    return len(layers) > 3 and len(steps_S) > 1


def chosen_layers(router: Router, values_SL: np.ndarray, low: bool = False) -> dict[int, str]:
    """Three layers worth a name, with their colours: the first, the highest or the lowest at the end, the last."""
    named = {0: GREEN, len(router.layers) - 1: PURPLE}
    return dict(sorted({**named, _extreme(router.at_end(values_SL), low): ORANGE}.items()))


def _extreme(end_L: np.ndarray, low: bool = False) -> int:
    """The index of the highest or lowest value; 0 where there is none."""
    return int(np.argmax(np.where(np.isnan(end_L), -np.inf, -end_L if low else end_L)))


def draw_layers(axes: Any, steps_S: np.ndarray, values_SL: np.ndarray, layers: Sequence[int], named: dict[int, str]) -> None:
    """The range over layers as a band, named layers, and the mean."""
    if has_band(layers, steps_S):
        low_S, high_S = nan_range(values_SL, axis=1)
        axes.fill_between(steps_S, calm(low_S), calm(high_S), color=BAND, alpha=0.16, linewidth=0)
    for index, color in named.items():
        line(axes, steps_S, calm(values_SL[:, index]), color=color, linewidth=1.2, label=f"layer {layers[index]}")
    if len(layers) > 1:
        line(axes, steps_S, calm(nan_mean(values_SL, axis=1)), color=BLUE, linewidth=2.2, label="mean")


def layer_heatmap(
    router: Router, key: str, title: str, text: str, what: str, values_SL: np.ndarray, colors: Any, norm: Normalize | None = None, form: Any = None
) -> Plot | None:
    """Layer x step."""
    if not np.isfinite(values_SL).any() or len(router.steps_S) < 2:
        return None
    edges, means_CL = binned(router.steps_S, values_SL)
    canvas, axes = panel(height=3.0 if len(router.layers) > 6 else 2.4)
    known = means_CL[np.isfinite(means_CL)]
    # One early outlier would leave the rest without colour.
    norm = norm or Normalize(min(0.0, float(known.min())), max(float(np.percentile(known, 99)), 1e-12))
    image = axes.pcolormesh(edges, np.arange(len(router.layers) + 1) - 0.5, means_CL.T, cmap=colors, norm=norm, rasterized=True)
    axes.invert_yaxis()
    axis_of_layers(axes.yaxis, axes.set_yticks, router.layers, most=10)
    bare(axes)
    label_steps(axes, "layer")
    color_scale(canvas, axes, image, what, form=form)
    end_L = router.at_end(values_SL)
    darkest = _extreme(end_L)
    value = form(float(end_L[darkest]), None) if form else f"{end_L[darkest]:.3g}"
    return Plot(key, title, text, png(canvas), shows=f"Darkest at the end: layer {router.layers[darkest]}, {value}." if len(router.layers) > 1 else "")


def axis_of_layers(axis: Any, set_ticks: Callable[..., Any], layers: Sequence[int], most: int) -> None:
    stride = -(-len(layers) // most)
    places = list(range(0, len(layers), stride))
    set_ticks(places, [str(layers[place]) for place in places])


def bare(axes: Any, separators: tuple[int, int] | None = None) -> None:
    """No frame, no grid; thin white seams between the cells of a heatmap where there are few."""
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if separators is not None:
        columns, rows = separators
        for column in range(1, columns):
            axes.axvline(column - 0.5, color="white", linewidth=0.8)
        for row in range(1, rows):
            axes.axhline(row - 0.5, color="white", linewidth=0.8)


def color_scale(canvas: Any, axes: Any, image: Any, what: str, form: Callable[[float, Any], str] | None = None, ticks: dict[float, str] | None = None) -> None:
    bar = canvas.colorbar(image, ax=axes, fraction=0.03, pad=0.015, aspect=22)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    if ticks is not None:
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
    elif isinstance(image.norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    if form is not None and ticks is None:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(form))
    bar.ax.tick_params(length=0, labelsize=8, colors=MUTED)
    bar.set_label(what, fontsize=8, color=MUTED)
