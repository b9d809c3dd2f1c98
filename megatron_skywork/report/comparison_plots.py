"""Plots of several runs over each other: one line per variant, the mean of its seeds with their range.

Shapes: S recorded steps, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from megatron_skywork.metrics import wording
from megatron_skywork.report.averages import nan_mean, window_of
from megatron_skywork.report.key_figures import Column, KeyFigures, cells
from megatron_skywork.report.load import Run
from megatron_skywork.report.load_plots import load_color_scale, load_scale
from megatron_skywork.report.router_axes import axis_of_layers, bare, percent
from megatron_skywork.report.router_records import Router
from megatron_skywork.report.style import (
    BALANCE,
    CYCLE,
    DASHES,
    INK,
    MUTED,
    PANEL_INCHES,
    WIDE_INCHES,
    Plot,
    label_steps,
    legend,
    line,
    name_value,
    panel,
    png,
)
from megatron_skywork.report.training_plots import leave_out_the_first_cliff
from megatron_skywork.report.variants import Curve, Series, Variant

# With more lines than this a small plot has no legend of its own; the page's key tells colours.
_MAX_IN_SMALL_LEGEND = 10
_MAX_LOADS_SHOWN = 24


def look(index: int) -> tuple[str, Any]:
    """Colour and dashes of the variant with this index: ten colours, then the same dashed, then dotted."""
    return CYCLE[index % len(CYCLE)], DASHES[index // len(CYCLE) % len(DASHES)]


def training_comparison(found: Sequence[Variant]) -> list[Plot]:
    """Loss, its last part enlarged, held-out losses, learning rate, gradient norm, speed."""
    band = _band_text(found)
    text = f"Lower is better, smoothed.{band}"
    plots = [_curves(found, "loss", "Loss", text, "cross-entropy per token", _scalar("loss"), wide=True, cliff=True)]
    text = f"The second half of the same curves, enlarged, for that is where variants are told apart.{band}"
    plots.append(_curves(found, "loss_end", "Loss, second half", text, "cross-entropy per token", _scalar("loss"), wide=True, second_half=True, smooth=8))
    for number, name in enumerate(dict.fromkeys(name for variant in found for run in variant.runs for name in run.evaluations), start=1):
        text = f"Documents that were not trained on. Lower is better.{band}"
        plots.append(_curves(found, f"held_out_{number}", f"Held-out loss: {name}", text, "cross-entropy per token", _held_out(name), smooth=0))
    plots.append(_curves(found, "learning_rate", "Learning rate", "The schedule as it was applied.", "learning rate", _scalar("learning_rate"), smooth=0))
    text = f"Before clipping, smoothed. Spikes announce trouble before the loss does.{band}"
    plots.append(_curves(found, "grad_norm", "Gradient norm", text, "global gradient norm", _scalar("grad_norm")))
    what, speed = "tokens per second, all devices", _scalar("tokens_per_second")
    plots.append(_curves(found, "throughput", "Speed", f"Smoothed.{band}", what, speed, from_zero=True, whole=True))
    return [plot for plot in plots if plot is not None]


def router_comparison(found: Sequence[Variant]) -> list[Plot]:
    """Means over layers of what routers record, and the loads at the end."""
    plots = []
    for key, title, what, text, options in _ROUTER_CURVES:
        plots.append(_curves(found, key, title, text + _band_text(found), what, _router(_READ[key]), **options))
    for key, title, text, values_of, options in (
        ("changed_experts", "Tokens that changed experts", "Since the evaluation before, mean over layers.", _changed, {"as_percent": True}),
        ("expert_similarity", "Expert similarity", "Mean cosine between experts: 1 for copies, about 0 for strangers.", _similarity, {}),
    ):
        plots.append(_curves(found, key, title, text + _band_text(found), "mean over layers", values_of, smooth=0, **options))
    plots.append(_loads(found))
    return [plot for plot in plots if plot is not None]


_READ: dict[str, Callable[[Router], np.ndarray]] = {
    "drop_rate": lambda router: router.per_layer["drop_rate"],
    "coefficient": lambda router: router.per_layer["coefficient"],
    "max1_over_max2": lambda router: router.per_layer["max1_over_max2"],
    "max2_over_max3": lambda router: router.per_layer["max2_over_max3"],
    "entropy": lambda router: router.entropy_SL,
    "load_variation": lambda router: router.per_layer["load_variation"],
    "load_balance": lambda router: router.per_layer["load_max_over_mean"],
    "dead_experts": lambda router: router.per_layer["dead_experts"] * len(router.layers),
    "aux_loss": lambda router: router.per_layer["aux_loss"],
    "z_loss": lambda router: router.per_layer["z_loss"],
}
_ROUTER_CURVES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("drop_rate", "Drop rate", "dropped assignments, mean over layers", "Dropped over routed assignments.", {"as_percent": True, "needed": True}),
    ("coefficient", "Auxiliary coefficient", "coefficient, mean over layers", "The weight of the balancing loss.", {}),
    ("max1_over_max2", "Sharpness: Max1 / Max2", "Max1 / Max2, mean over layers", "Near 1 the choice of experts is a coin toss.", {}),
    ("max2_over_max3", "Sharpness: Max2 / Max3", "Max2 / Max3, mean over layers", "Near 1 the second expert is chosen by chance.", {}),
    ("entropy", "Gate entropy", "entropy / log E, mean over layers", "1 is a gate without an opinion, 0 one that is always certain.", {}),
    ("load_variation", "Unevenness of the load", "std / mean of the load, mean over layers", "0 is an even load.", {"from_zero": True}),
    ("load_balance", "Busiest expert", "busiest / mean, mean over layers", "Above the capacity factor tokens are dropped.", {}),
    ("dead_experts", "Dead experts", "dead experts, sum over layers", "Experts below 1 % of the even share.", {"needed": True, "smooth": 0}),
    ("aux_loss", "Auxiliary loss", "auxiliary loss, mean over layers", "Before its coefficient: comparable where the kind and the scope are the same.", {}),
    ("z_loss", "Router z-loss", "z-loss, mean over layers", "Before its coefficient.", {"needed": True}),
]


def _scalar(name: str) -> Callable[[Run], Series | None]:
    return lambda run: (run.steps_S, run.series(name))


def _held_out(name: str) -> Callable[[Run], Series | None]:
    return lambda run: run.evaluations.get(name)


def _router(values_of: Callable[[Router], np.ndarray]) -> Callable[[Run], Series | None]:
    return lambda run: (run.router.steps_S, nan_mean(values_of(run.router), axis=1)) if run.router else None


def _changed(run: Run) -> Series | None:
    return _of_evaluations(run, "changed_VL")


def _similarity(run: Run) -> Series | None:
    return _of_evaluations(run, "similarity_VL")


def _of_evaluations(run: Run, name: str) -> Series | None:
    if run.router is None or run.router.evaluations is None:
        return None
    return run.router.evaluations.steps_V, nan_mean(getattr(run.router.evaluations, name), axis=1)


def _band_text(found: Sequence[Variant]) -> str:
    return " Lines are means over seeds, bands their whole range." if any(len(variant.runs) > 1 for variant in found) else ""


def _curves(
    found: Sequence[Variant],
    key: str,
    title: str,
    text: str,
    what: str,
    series_of: Callable[[Run], Series | None],
    *,
    smooth: int = 20,
    whole: bool = False,
    wide: bool = False,
    cliff: bool = False,
    second_half: bool = False,
    as_percent: bool = False,
    from_zero: bool = False,
    needed: bool = False,
) -> Plot | None:
    """One line per variant; None where none has it, or, for what is `needed` to be worth a plot, where all of it is 0."""
    curves = {index: curve for index, variant in enumerate(found) if (curve := variant.curve(series_of, smooth)) is not None}
    if not curves or (needed and not any(np.nansum(np.abs(curve.mean_S)) > 0 for curve in curves.values())):
        return None
    if second_half:
        curves = {index: half for index, curve in curves.items() if len((half := _second_half(curve)).steps_S) > 10}
        if not curves:
            return None
    has_legend = wide or len(found) <= _MAX_IN_SMALL_LEGEND
    in_row = 4 if wide else 3 if max(len(variant.name) for variant in found) <= 18 else 2
    extra = 0.17 * -(-len(curves) // in_row) if has_legend else 0.0
    canvas, axes = panel(WIDE_INCHES, 3.2 + extra) if wide else panel(height=PANEL_INCHES[1] - 0.1 + extra)
    for index, curve in curves.items():
        color, dashes = look(index)
        if len(found[index].runs) > 1:
            axes.fill_between(curve.steps_S, curve.low_S, curve.high_S, color=color, alpha=0.13 if len(curves) <= 5 else 0.08, linewidth=0)
        mark: dict[str, Any] = {} if smooth or len(curve.steps_S) > 40 else {"marker": "o", "markersize": 2.5}
        line(axes, curve.steps_S, curve.mean_S, color=color, linestyle=dashes, linewidth=1.4, label=found[index].label if wide else found[index].name, **mark)
    if cliff:
        leave_out_the_first_cliff(axes, [curve.mean_S for curve in curves.values()])
    if as_percent:
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
    if as_percent or from_zero:
        axes.set_ylim(bottom=0)
    label_steps(axes, what)
    if has_legend:
        legend(axes, columns=in_row, below=canvas)
    if key == "dead_experts":
        axes.yaxis.get_major_locator().set_params(integer=True)
    if whole:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    form = wording.percent if as_percent else "{:,.0f}".format if whole else "{:.4g}".format
    return Plot(key, title, text, png(canvas), wide=wide, shows=_extremes(found, curves, form))


def _second_half(curve: Curve) -> Curve:
    later = curve.steps_S > (curve.steps_S[0] + curve.steps_S[-1]) / 2
    return Curve(curve.steps_S[later], curve.mean_S[later], curve.low_S[later], curve.high_S[later])


def _extremes(found: Sequence[Variant], curves: dict[int, Curve], form: Callable[[float], str]) -> str:
    """Lowest and highest at the end of the lines."""
    ends = {index: float(known[-window_of(len(known)) :].mean()) for index, curve in curves.items() if len(known := curve.mean_S[np.isfinite(curve.mean_S)])}
    low, high = min(ends, key=lambda index: ends[index]), max(ends, key=lambda index: ends[index])
    if form(ends[low]) == form(ends[high]):
        return f"At the end {form(ends[low])} in " + ("all." if len(ends) > 1 else f"{found[low].name}.")
    return f"At the end lowest in {found[low].name} ({form(ends[low])}), highest in {found[high].name} ({form(ends[high])})."


def glance_plot(found: Sequence[Variant], columns: Sequence[Column], figures: Mapping[str, KeyFigures]) -> Plot | None:
    """Key figures as points, a row per variant: every run a dot, the mean a bar. What differs by more than its seeds is seen at once."""
    shown = [column for column in columns if len({cell.mean for cell in cells(column, found, figures) if cell is not None}) > 1]
    in_row = 4 if len(found) <= _MAX_IN_SMALL_LEGEND else 5
    shown = shown[: 2 * in_row if len(found) <= _MAX_IN_SMALL_LEGEND else in_row]
    if len(found) < 2 or not shown:
        return None
    rows = -(-len(shown) // in_row)
    canvas, axes_of = panel(WIDE_INCHES, rows * (0.62 + 0.2 * len(found)), rows=rows, columns=min(in_row, len(shown)), sharey=True, squeeze=False)
    flat = list(axes_of.flat)
    for axes, column in zip(flat, shown, strict=False):
        for index, (variant, cell) in enumerate(zip(found, cells(column, found, figures), strict=True)):
            color = look(index)[0]
            values = [value for run in variant.runs if (value := column.of(figures[run.name])) is not None]
            axes.plot(values, [index] * len(values), "o", color=color, markersize=3.8, alpha=0.6 if len(values) > 1 else 1.0, markeredgewidth=0)
            if cell is not None and len(values) > 1:
                axes.plot([cell.mean, cell.mean], [index - 0.36, index + 0.36], color=color, linewidth=2)
        better = {"low": ", ← better", "high": ", better →", None: ""}[column.better]
        name_value(axes, f"{column.name}{better}")
        axes.xaxis.get_major_locator().set_params(nbins=3)
        axes.margins(x=0.12)
        axes.tick_params(axis="x", labelsize=7.5)
        if column.show is wording.percent:
            axes.xaxis.set_major_formatter(FuncFormatter(percent))
        axes.set_yticks(range(len(found)), [_short(variant.name) for variant in found], fontsize=8, color=INK)
        axes.set_ylim(len(found) - 0.4, -0.6)
    for axes in flat[len(shown) :]:
        axes.set_visible(False)
    text = "A row is a variant, a dot a run."
    if any(len(variant.runs) > 1 for variant in found):
        text = "A row is a variant, a dot a run, a bar the mean over its seeds. Rows whose dots do not overlap differ by more than their seeds do."
    return Plot("at_a_glance", "At a glance", text, png(canvas), wide=True)


def _short(name: str) -> str:
    return name if len(name) <= 26 else "…" + name[-25:]


def _loads(found: Sequence[Variant]) -> Plot | None:
    """Small multiples: layer x expert at the end, experts of a layer sorted by load, so that seeds can be averaged."""
    shown = [(index, variant) for index, variant in enumerate(found) if any(run.router for run in variant.runs)][:_MAX_LOADS_SHOWN]
    if len(shown) < 2:
        return None
    loads = []
    for _, variant in shown:
        routers = [run.router for run in variant.runs if run.router is not None]
        same = [router for router in routers if router.load_LE.shape == routers[0].load_LE.shape]
        loads.append((routers[0].layers, np.mean([-np.sort(-router.relative_load_LE, axis=1) for router in same], axis=0)))
    in_row = min(len(shown), 6 if len(shown) > 8 else 4)
    rows = -(-len(shown) // in_row)
    height = min(2.6, max(0.9, 0.6 + 0.05 * max(len(layers) for layers, _ in loads)))
    canvas, axes_of = panel(WIDE_INCHES, 0.4 + (height + 0.25) * rows, rows=rows, columns=in_row, squeeze=False)
    together = np.concatenate([load.ravel() for _, load in loads])
    norm = load_scale(together)
    flat = list(axes_of.flat)
    for axes, (_, variant), (layers, load_LE) in zip(flat, shown, loads, strict=False):
        image = axes.imshow(load_LE, aspect="auto", cmap=BALANCE, norm=norm, interpolation="nearest")
        axes.set_title(_short(variant.name), fontsize=8, color=INK, pad=4)
        axes.set_xticks([])
        axis_of_layers(axes.yaxis, axes.set_yticks, layers, most=5)
        axes.tick_params(labelsize=7)
        bare(axes)
    for axes in flat[len(shown) :]:
        axes.set_visible(False)
    canvas.supxlabel("experts, the busiest first", fontsize=8.5, color=MUTED)
    canvas.supylabel("layer", fontsize=8.5, color=MUTED)
    load_color_scale(canvas, flat, image, together)
    text = "Experts of each layer sorted by load, mean over seeds at the end. Pale all over is a fair router; a deep blue right edge is experts without tokens."
    if len(shown) < len(found):
        text += f" {len(shown)} of {len(found)} variants are shown."
    return Plot("expert_load_by_variant", "Load of every expert", text, png(canvas), wide=True)
