"""Plots of the routers: who gets the tokens, what is dropped and what is done about it, and how sure the gates are.

Shapes: S recorded steps, L MoE layers, E experts, C columns of a heatmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_skywork.report.load import Router, Run, nan_mean
from megatron_skywork.report.style import (
    AMOUNT,
    BALANCE,
    BLUE,
    CYCLE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    WARMTH,
    WIDE_INCHES,
    Plot,
    binned,
    label_steps,
    legend,
    line,
    panel,
    png,
    smoothed,
)

# Cells get their number only where it can be read.
_MAX_CELLS_WITH_NUMBERS = 130


def load_plot(run: Run, key: str = "expert_load") -> Plot | None:
    """The layer x expert heatmap of one run."""
    router = run.router
    if router is None:
        return None
    relative_LE = router.relative_load_LE
    num_layers, num_experts = relative_LE.shape
    canvas, axes = panel(WIDE_INCHES, min(6.5, max(2.1, 1.05 + 0.24 * num_experts)))
    top = max(2.0, float(relative_LE.max()))
    image = axes.imshow(relative_LE.T, aspect="auto", cmap=BALANCE, norm=TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top), interpolation="nearest")
    _axis_of_layers(axes.xaxis, axes.set_xticks, router.layers, most=26)
    axes.set_yticks(range(num_experts) if num_experts <= 16 else range(0, num_experts, -(-num_experts // 16)))
    axes.set_title("expert", loc="left", fontsize=8.5, color=MUTED, pad=6)
    axes.set_xlabel("layer")
    _bare(axes, separators=(num_layers, num_experts) if num_layers * num_experts <= 2000 else None)
    if num_layers * num_experts <= _MAX_CELLS_WITH_NUMBERS:
        for layer in range(num_layers):
            for expert in range(num_experts):
                value = relative_LE[layer, expert]
                color = "white" if value < 0.3 or value > 1 + 0.7 * (top - 1) else INK
                axes.text(layer, expert, f"{value:.2f}" if num_layers <= 16 else f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=color)
    _scale(canvas, axes, image, "times the even share", ticks=[0, 0.5, 1.0, (1 + top) / 2, top])
    text = f"Each cell is one expert of one layer, mean of the last {_records(router)}. "
    text += "Pale is a fair share; orange has too many tokens, blue too few; deep blue is an expert that gets almost nothing."
    return Plot(key, "Load of every expert", text, png(canvas), wide=True)


def balance_over_time(runs: Sequence[Run]) -> Plot | None:
    text = "The busiest expert's load over the mean load. 1 is perfect balance; the capacity factor is where dropping starts."
    return _over_time(
        runs, "load_balance", "Balance over time", text, "busiest expert over the mean", lambda router: router.max_over_mean_SL, wide=len(runs) == 1
    )


def drop_plots(runs: Sequence[Run]) -> list[Plot]:
    """Drop rates and, where they move, the coefficients that answer them; for one run also layer by layer."""
    lines: list[Plot | None] = []
    heatmaps: list[Plot | None] = []
    if any(run.router and np.nansum(run.router.per_layer["drop_rate"]) > 0 for run in runs):
        text = "Dropped over routed assignments. It should fall as the routers learn to share."
        lines.append(
            _over_time(runs, "drop_rate", "Drop rate over time", text, "dropped assignments", lambda router: router.per_layer["drop_rate"], percent=True)
        )
        text = "Assignments thrown away because an expert was full. Bands that stay dark are layers whose router does not spread its tokens."
        heatmaps.append(_heatmap(runs, "drop_rate", "Drop rate by layer", text, "drop rate", WARMTH, _percent))
    if any(run.router and _moves(run.router.per_layer["coefficient"]) for run in runs):
        text = "The weight of the balancing loss. It follows the drop rate slowly, keeping most of its old value at each step."
        lines.append(_over_time(runs, "coefficient", "Auxiliary coefficient over time", text, "coefficient", _per_layer("coefficient")))
        text = "A layer that drops gets more of the balancing loss, up to the maximum; a balanced one is left in peace."
        heatmaps.append(_heatmap(runs, "coefficient", "Auxiliary coefficient by layer", text, "coefficient", AMOUNT, lambda value, _: f"{value:.4f}"))
    return [plot for plot in lines + heatmaps if plot is not None]


def sharpness_plots(runs: Sequence[Run]) -> list[Plot]:
    """Entropy and Max1/Max2 of the gates."""
    text = "Entropy of the gate over its largest possible value: 1 is a gate that cannot tell experts apart, 0 one that is always certain."
    entropy = _over_time(runs, "entropy", "Gate entropy", text, "entropy / log E", lambda router: router.entropy_SL)
    text = "Mean ratio of the two largest gate probabilities. Near 1 the choice is a coin toss; gate-logit normalization keeps it away from there."
    ratio = _over_time(runs, "max1_over_max2", "Sharpness: Max1 / Max2", text, "Max1 / Max2", _per_layer("max1_over_max2"))
    return [plot for plot in (entropy, ratio) if plot is not None]


def _per_layer(name: str) -> Callable[[Router], np.ndarray]:
    return lambda router: router.per_layer[name]


def _moves(values_SL: np.ndarray) -> bool:
    known = values_SL[np.isfinite(values_SL)]
    return len(known) > 0 and bool(known.max() > known.min())


def _records(router: Router) -> str:
    return "record" if router.window == 1 else f"{router.window} records"


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.3g} %"


def _over_time(
    runs: Sequence[Run],
    key: str,
    title: str,
    text: str,
    what: str,
    values_of: Callable[[Router], np.ndarray],
    percent: bool = False,
    wide: bool = False,
) -> Plot | None:
    """Lines over the steps: for one run its mean and a few layers over the range of all; for several runs the mean of each."""
    known = [run for run in runs if run.router is not None and np.isfinite(values_of(run.router)).any()]
    if not known:
        return None
    canvas, axes = panel(WIDE_INCHES, 2.7) if wide else panel()
    if len(runs) == 1:
        router = known[0].router
        assert router is not None
        _lines(axes, router, values_of(router))
        text += " Grey: the range over all layers." if len(router.layers) > 3 and len(router.steps_S) > 1 else ""
    else:
        for run, color in zip(runs, CYCLE * len(runs), strict=False):
            if run in known and run.router is not None:
                mean_S = nan_mean(values_of(run.router), axis=1)
                smooth = smoothed(mean_S)
                line(axes, run.router.steps_S, mean_S if smooth is None else smooth, color=color, label=run.name)
        what = f"{what}, mean over layers"
    if percent:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    label_steps(axes, what)
    legend(axes, columns=4)
    return Plot(key, title, text, png(canvas), wide=wide)


def _lines(axes: Any, router: Router, values_SL: np.ndarray) -> None:
    """Range over layers as a band, the mean, and three layers worth a name: the first, the highest at the end, the last."""
    steps = router.steps_S

    def calm(values_S: np.ndarray) -> np.ndarray:
        smooth = smoothed(values_S)
        return values_S if smooth is None else smooth

    known_SL = np.ma.masked_invalid(values_SL)
    if len(router.layers) > 3 and len(steps) > 1:
        low, high = calm(known_SL.min(axis=1).filled(np.nan)), calm(known_SL.max(axis=1).filled(np.nan))
        axes.fill_between(steps, low, high, color="#8a97a6", alpha=0.16, linewidth=0)
    highest = int(np.nanargmax(np.where(np.isnan(router.at_end(values_SL)), -np.inf, router.at_end(values_SL))))
    named: dict[int, str] = {}
    for index, color in ((0, GREEN), (highest, ORANGE), (len(router.layers) - 1, PURPLE)):
        named.setdefault(index, color)
    named[highest] = ORANGE
    for index in sorted(named):
        line(axes, steps, calm(values_SL[:, index]), color=named[index], linewidth=1.2, label=f"layer {router.layers[index]}")
    if len(router.layers) > 1:
        line(axes, steps, calm(nan_mean(values_SL, axis=1)), color=BLUE, linewidth=2.2, label="mean")


def _heatmap(runs: Sequence[Run], name: str, title: str, text: str, what: str, colors: Any, form: Callable[[float, Any], str]) -> Plot | None:
    """Layer x step of one run; several runs cannot share one."""
    router = runs[0].router
    if len(runs) > 1 or router is None or not np.isfinite(router.per_layer[name]).any():
        return None
    edges, means_CL = binned(router.steps_S, router.per_layer[name])
    canvas, axes = panel()
    known = means_CL[np.isfinite(means_CL)]
    # One early outlier would leave the rest without colour.
    top = max(float(np.percentile(known, 99)), 1e-12)
    image = axes.pcolormesh(
        edges, np.arange(len(router.layers) + 1) - 0.5, means_CL.T, cmap=colors, vmin=min(0.0, float(known.min())), vmax=top, rasterized=True
    )
    axes.invert_yaxis()
    _axis_of_layers(axes.yaxis, axes.set_yticks, router.layers, most=10)
    _bare(axes)
    label_steps(axes, "layer")
    _scale(canvas, axes, image, what, form=form)
    return Plot(f"{name}_by_layer", title, text, png(canvas))


def _axis_of_layers(axis: Any, set_ticks: Callable[..., Any], layers: list[int], most: int) -> None:
    stride = -(-len(layers) // most)
    places = list(range(0, len(layers), stride))
    set_ticks(places, [str(layers[place]) for place in places])


def _bare(axes: Any, separators: tuple[int, int] | None = None) -> None:
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


def _scale(canvas: Any, axes: Any, image: Any, what: str, form: Callable[[float, Any], str] | None = None, ticks: list[float] | None = None) -> None:
    bar = canvas.colorbar(image, ax=axes, fraction=0.03, pad=0.015, aspect=22)
    bar.outline.set_visible(False)
    if ticks is not None:
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    if form is not None:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(form))
    bar.ax.tick_params(length=0, labelsize=8, colors=MUTED)
    bar.set_label(what, fontsize=8, color=MUTED)
