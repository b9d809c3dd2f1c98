"""Plots of who gets the tokens: every expert at the end and on the way there, how uneven that is, and who gets nothing.

Shapes: S recorded steps, L MoE layers, E experts, C columns (stretches of steps).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm

from megatron_skywork.report.averages import calm, nan_mean
from megatron_skywork.report.load import Run
from megatron_skywork.report.router_axes import axis_of_layers, bare, color_scale, layer_heatmap, over_time
from megatron_skywork.report.router_records import DEAD_BELOW, Router
from megatron_skywork.report.style import (
    BALANCE,
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    WARMTH,
    WIDE_INCHES,
    Plot,
    label_steps,
    legend,
    line,
    name_value,
    panel,
    png,
)

# Cells get their number only where it can be read.
_MAX_CELLS_WITH_NUMBERS = 130
_MAX_DEAD_NAMED = 24
_LARGEST_SHADE = 3.0
# Parts of the run at which the loads are shown; early ones are closer, for that is when most of it happens.
_MOMENTS = (0.0, 0.04, 0.12, 0.3, 0.6, 1.0)


def load_plots(run: Run) -> list[Plot]:
    """All of them, for a run that has routers."""
    router = run.router
    if router is None:
        return []
    text = "The busiest expert's load over the mean load. 1 is perfect balance; the capacity factor is where dropping starts."
    variation = router.per_layer["load_variation"]
    balance = over_time(router, "load_balance", "Busiest expert", text, "busiest / mean", router.per_layer["load_max_over_mean"])
    text = "Standard deviation of the load over its mean, which all experts count for: 0 is an even load. Dark bands are layers that do not spread."
    by_layer = layer_heatmap(router, "load_variation_by_layer", "Unevenness by layer", text, "std / mean", variation, WARMTH)
    plots = [load_at_end(run), _moments(router), _worst_layers(router), balance, by_layer, _spread(run, router), _dead(router)]
    return [plot for plot in plots if plot is not None]


def load_at_end(run: Run, key: str = "expert_load") -> Plot | None:
    """The layer x expert heatmap of one run."""
    router = run.router
    if router is None:
        return None
    relative_LE = router.relative_load_LE
    num_layers, num_experts = relative_LE.shape
    canvas, axes = panel(WIDE_INCHES, min(6.5, max(2.1, 1.05 + 0.24 * num_experts)))
    norm = load_scale(relative_LE)
    image = axes.imshow(relative_LE.T, aspect="auto", cmap=BALANCE, norm=norm, interpolation="nearest")
    axis_of_layers(axes.xaxis, axes.set_xticks, router.layers, most=26)
    axes.set_yticks(_expert_ticks(num_experts, 16))
    axes.set_title("expert", loc="left", fontsize=8.5, color=MUTED, pad=6)
    axes.set_xlabel("layer")
    bare(axes, separators=(num_layers, num_experts) if num_layers * num_experts <= 2000 else None)
    if num_layers * num_experts <= _MAX_CELLS_WITH_NUMBERS:
        _numbers(axes, relative_LE, float(norm.vmax or 2.0))
    load_color_scale(canvas, axes, image, relative_LE)
    text = f"Each cell is one expert of one layer, mean of the last {_records(router)}. "
    text += "Pale is a fair share; orange has too many tokens, blue too few; deep blue is an expert that gets almost nothing."
    low, high = (np.unravel_index(int(place), relative_LE.shape) for place in (relative_LE.argmin(), relative_LE.argmax()))
    shows = f"Most: expert {high[1]} of layer {router.layers[high[0]]}, {relative_LE[high]:.2f} times the even share. "
    shows += f"Least: expert {low[1]} of layer {router.layers[low[0]]}, {relative_LE[low]:.2f}."
    return Plot(key, "Load of every expert", text, png(canvas), wide=True, shows=shows)


def _numbers(axes: Any, relative_LE: np.ndarray, top: float) -> None:
    num_layers, num_experts = relative_LE.shape
    for layer in range(num_layers):
        for expert in range(num_experts):
            value = relative_LE[layer, expert]
            color = "white" if value < 0.3 or value > 1 + 0.7 * (top - 1) else INK
            axes.text(layer, expert, f"{value:.2f}" if num_layers <= 16 else f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=color)


def load_scale(relative: np.ndarray) -> TwoSlopeNorm:
    """Colours of a load over the even share: white at 1, and never so wide that a single hot expert pales all others."""
    return TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=min(_LARGEST_SHADE, max(2.0, float(np.percentile(relative, 99.9)))))


def load_color_scale(canvas: Any, axes: Any, image: Any, relative: np.ndarray, low: bool = False) -> None:
    """The scale beside a load's heatmap; `low` is one with little room."""
    top = image.norm.vmax
    ticks = [0, 1, top] if low else [0, 0.5, 1, (1 + top) / 2, top]
    labels = [f"{tick:.2g}" for tick in ticks]
    labels[-1] += "+" if float(relative.max()) > 1.01 * top else ""
    color_scale(canvas, axes, image, "" if low else "times the even share", ticks=dict(zip(ticks, labels, strict=True)))


def _expert_ticks(num_experts: int, most: int) -> list[int]:
    return list(range(0, num_experts, -(-num_experts // most)))


def _records(router: Router) -> str:
    return "record" if router.window == 1 else f"{router.window} records"


def _moments(router: Router) -> Plot | None:
    """Small multiples: layer x expert at several moments."""
    history = router.history
    last = len(history.load_CLE) - 1
    if last < 2:
        return None
    places = list(dict.fromkeys(round(part * last) for part in _MOMENTS))
    num_layers, num_experts = router.load_LE.shape
    canvas, axes_of = panel(WIDE_INCHES, min(4.6, max(1.6, 1.0 + 0.065 * num_layers)), columns=len(places), sharey=True)
    norm = load_scale(history.relative_CLE[places])
    for axes, place in zip(axes_of, places, strict=True):
        image = axes.imshow(history.relative_CLE[place], aspect="auto", cmap=BALANCE, norm=norm, interpolation="nearest")
        first, end = history.edges[place], history.edges[place + 1]
        first_step, last_step = int(np.ceil(first)), max(int(np.ceil(first)), int(np.ceil(end)) - 1)
        axes.set_title(f"step {first_step}" + (f"–{last_step}" if last_step > first_step else ""), fontsize=8.5, color=MUTED, pad=5)
        axes.set_xticks(_expert_ticks(num_experts, 4))
        bare(axes, separators=(num_experts, num_layers) if num_layers <= 12 and num_experts <= 16 else None)
    axis_of_layers(axes_of[0].yaxis, axes_of[0].set_yticks, router.layers, most=12)
    axes_of[0].set_ylabel("layer")
    canvas.supxlabel("expert", fontsize=8.5, color=MUTED)
    load_color_scale(canvas, list(axes_of), image, history.relative_CLE[places], low=num_layers < 10)
    text = "The same heatmap on the way there: layers downwards, experts across. Columns that keep their colour are experts whose fate was settled early."
    return Plot("load_moments", "Load over time", text, png(canvas), wide=True)


def _worst_layers(router: Router) -> Plot | None:
    """Expert x step of the layer that is least even, of the one that drops most, and of one with dead experts."""
    history = router.history
    if len(history.load_CLE) < 3:
        return None
    reasons: dict[int, list[str]] = {}
    for values_L, reason in (
        (router.at_end(router.per_layer["load_variation"]), "least even"),
        (router.at_end(router.per_layer["drop_rate"]), "drops most"),
        ((router.relative_load_LE < DEAD_BELOW).sum(axis=1).astype(float), "most dead experts"),
    ):
        if np.isfinite(values_L).any() and np.nanmax(values_L) > 0:
            reasons.setdefault(int(np.nanargmax(values_L)), []).append(reason)
    if not reasons:
        return None
    num_experts = router.num_experts
    height = min(2.4, max(0.9, 0.11 * num_experts))
    canvas, axes_of = panel(WIDE_INCHES, 0.75 + (height + 0.3) * len(reasons), rows=len(reasons), sharex=True, squeeze=False)
    relative_CLE = history.relative_CLE
    norm = load_scale(relative_CLE[:, list(reasons)])
    for axes, (index, why) in zip(axes_of[:, 0], reasons.items(), strict=True):
        image = axes.pcolormesh(history.edges, np.arange(num_experts + 1) - 0.5, relative_CLE[:, index].T, cmap=BALANCE, norm=norm, rasterized=True)
        axes.invert_yaxis()
        axes.set_yticks(_expert_ticks(num_experts, 8))
        bare(axes)
        name_value(axes, f"expert of layer {router.layers[index]} ({', '.join(why)})")
    label_steps(axes, f"expert of layer {router.layers[index]} ({', '.join(why)})")
    load_color_scale(canvas, list(axes_of[:, 0]), image, relative_CLE[:, list(reasons)])
    text = "Every expert of the layers that stand out, over all steps. A row that turns deep blue is an expert that dies; an orange one takes its tokens."
    return Plot("load_of_worst_layers", "Load in the layers that stand out", text, png(canvas), wide=True)


def _spread(run: Run, router: Router) -> Plot | None:
    """Percentiles over experts, as a fan: the mean over layers, and the layer that is least even."""
    fan = [router.per_layer[name] for name in ("load_p10", "load_p50", "load_p90", "load_max_over_mean")]
    if len(router.steps_S) < 2 or not all(np.isfinite(values_SL).any() for values_SL in fan):
        return None
    worst = int(np.nanargmax(router.at_end(router.per_layer["load_variation"])))
    shown = {"mean over layers": [nan_mean(values_SL, axis=1) for values_SL in fan]}
    if len(router.layers) > 1:
        shown[f"layer {router.layers[worst]}, the least even"] = [values_SL[:, worst] for values_SL in fan]
    canvas, axes_of = panel(WIDE_INCHES, 3.0, columns=len(shown), sharey=True, squeeze=False)
    capacity = run.setting("moe.capacity_factor")
    for axes, (name, series) in zip(axes_of[0], shown.items(), strict=True):
        p10, p50, p90, most = (calm(values_S) for values_S in series)
        axes.fill_between(router.steps_S, p10, p90, color=BLUE, alpha=0.18, linewidth=0, label="10th to 90th percentile")
        line(axes, router.steps_S, p50, color=BLUE, linewidth=2, label="median")
        line(axes, router.steps_S, most, color=ORANGE, linewidth=1.2, label="busiest")
        axes.axhline(1.0, color=MUTED, linewidth=0.8)
        if isinstance(capacity, (int, float)):
            axes.axhline(capacity, color=PURPLE, linewidth=1, linestyle=(0, (4, 3)), label=f"capacity factor {capacity:g}")
        label_steps(axes, f"times the even share: {name}")
    axes_of[0][0].set_ylim(bottom=0)
    legend(axes_of[0][0], columns=4, below=canvas)
    text = "How far apart experts are. A narrow fan around 1 is a fair layer. What stands above the capacity factor is dropped, in training."
    end = [float(nan_mean(router.at_end(values_SL))) for values_SL in fan]
    shows = f"At the end, mean over layers: 10th percentile {end[0]:.2f}, median {end[1]:.2f}, 90th {end[2]:.2f}, busiest {end[3]:.2f}."
    return Plot("load_percentiles", "Spread of the load", text, png(canvas), wide=True, shows=shows)


def _dead(router: Router) -> Plot | None:
    """How many experts are dead, and which, over time; nothing to see where none ever was."""
    dead_CLE, edges = router.history.dead_CLE, router.history.edges
    width_C = np.diff(edges)
    length_LE = np.tensordot(width_C, dead_CLE, axes=(0, 0))
    if not dead_CLE.any() or len(router.steps_S) < 2:
        return None
    order = np.argsort(-length_LE, axis=None, kind="stable")
    places = [np.unravel_index(int(place), length_LE.shape) for place in order[: int((length_LE > 0).sum())]]
    named = sorted(places[:_MAX_DEAD_NAMED])
    canvas, (top, below) = panel(WIDE_INCHES, 2.1 + 0.19 * len(named) + 0.3, rows=2, sharex=True, height_ratios=[1.5, 0.3 + 0.19 * len(named)])
    total_S = np.nansum(router.per_layer["dead_experts"], axis=1)
    top.step(router.steps_S, total_S, where="mid", color=ORANGE, linewidth=1.4)
    top.set_ylim(0, max(1.0, 1.1 * float(total_S.max())))
    top.yaxis.get_major_locator().set_params(integer=True)
    name_value(top, f"dead experts, of {router.load_LE.size:,}")
    rows = np.stack([dead_CLE[:, layer, expert] for layer, expert in named])
    below.pcolormesh(edges, np.arange(len(named) + 1) - 0.5, rows, cmap=WARMTH, vmin=0, vmax=1, rasterized=True)
    below.set_yticks(range(len(named)), [f"layer {router.layers[layer]} : expert {expert}" for layer, expert in named], fontsize=7.5)
    below.invert_yaxis()
    bare(below)
    label_steps(below, "dark: dead")
    text = f"Experts with less than {100 * DEAD_BELOW:g} % of the even share: how many, and which. "
    text += "A dark bar that reaches the right edge is an expert that did not come back."
    if len(places) > len(named):
        text += f" The {len(named)} that were dead longest are named, of {len(places)}."
    ending = f"{int(nan_mean(total_S[-router.window :]) + 0.5)} at the end, {int(total_S.max())} at most."
    return Plot("dead_experts", "Dead experts", text, png(canvas), wide=True, shows=ending)
