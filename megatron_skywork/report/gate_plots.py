"""Plots of the gates and of the experts behind them: how sure the choice is, what the losses on it are, who changed experts, how alike experts are.

Shapes: S recorded steps, L MoE layers, V evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from matplotlib.ticker import FuncFormatter

from megatron_skywork.metrics import wording
from megatron_skywork.report.averages import nan_mean
from megatron_skywork.report.finding import cosine
from megatron_skywork.report.load import Run
from megatron_skywork.report.router_axes import over_time, percent
from megatron_skywork.report.router_records import Router
from megatron_skywork.report.style import BLUE, MUTED, WIDE_INCHES, Plot, legend, line, name_value, panel, png


def gate_plots(run: Run) -> list[Plot]:
    """Entropy, the two ratios, and the losses that were on."""
    router = run.router
    if router is None:
        return []
    series = router.per_layer
    text = "Mean ratio of the two largest gate probabilities. Near 1 the choice is a coin toss; gate-logit normalization keeps it away from there."
    plots = [over_time(router, "max1_over_max2", "Sharpness: Max1 / Max2", text, "Max1 / Max2", series["max1_over_max2"], "{:.2f}".format, low=True)]
    text = "The same between the second and the third: near 1, which expert comes second is chance."
    if router.num_experts > 2:
        plots.append(over_time(router, "max2_over_max3", "Sharpness: Max2 / Max3", text, "Max2 / Max3", series["max2_over_max3"], "{:.2f}".format, low=True))
    text = "Entropy of the gate over its largest possible value: 1 is a gate that cannot tell experts apart, 0 one that is always certain."
    plots.append(over_time(router, "entropy", "Gate entropy", text, "entropy / log E", router.entropy_SL, "{:.3f}".format))
    text = "The balancing loss before its coefficient: what it pushes against. It falls as the gates learn to share."
    plots.append(over_time(router, "aux_loss", "Auxiliary loss", text, "auxiliary loss", series["aux_loss"]))
    for name, values_SL in router.extra_aux_losses.items():
        shown = name.replace("_", " over each " if name.endswith("sequence") else " over the ", 1).replace("_", "-")
        text = "A further balancing loss, before its coefficient."
        plots.append(over_time(router, f"extra_{name}", f"Auxiliary loss: {shown}", text, "auxiliary loss", values_SL, "{:.3g}".format))
    if np.nansum(np.abs(series["z_loss"])) > 0:
        text = "Mean squared log-sum-exp of the raw logits, before its coefficient. Growth means logits that drift, which costs precision."
        plots.append(over_time(router, "z_loss", "Router z-loss", text, "z-loss", series["z_loss"], "{:.3g}".format))
    return [plot for plot in plots if plot is not None]


def expert_plots(run: Run) -> list[Plot]:
    """What evaluations say: tokens that changed experts, and how alike experts are."""
    router = run.router
    if router is None or router.evaluations is None:
        return []
    steps_V, changed_VL, similarity_VL = router.evaluations.steps_V, router.evaluations.changed_VL, router.evaluations.similarity_VL
    text = "Share of the probe's tokens whose set of experts is not the one of the evaluation before. It should fall: a router that keeps changing its mind "
    text += "trains no specialists. The first evaluation of a process has nothing to compare with."
    plots = [_per_evaluation(router, "changed_experts", "Tokens that changed experts", text, "share of tokens", changed_VL, wording.percent)]
    text = "Mean cosine between the weights of two experts of a layer: 1 for copies, as after upcycling, about 0 for experts that never met. "
    text += "Lower at the end is more specialized."
    name = "Expert similarity"
    plots.append(_per_evaluation(router, "expert_similarity", name, text, "mean cosine", similarity_VL, cosine))
    return [plot for plot in plots if plot is not None and len(steps_V)]


def _per_evaluation(router: Router, key: str, title: str, text: str, what: str, values_VL: np.ndarray, form: Callable[[float], str]) -> Plot | None:
    assert router.evaluations is not None
    known = np.isfinite(values_VL).any(axis=1)
    seen = replace(router, steps_S=router.evaluations.steps_V[known], window=1)
    return over_time(seen, key, title, text, what, values_VL[known], form, dots=True)


def depth_plot(run: Run) -> Plot | None:
    """Every layer at the start and at the end, over depth: which layers are the odd ones, in everything that is measured."""
    router = run.router
    if router is None or len(router.layers) < 3:
        return None
    series = router.per_layer
    candidates = [
        ("drop rate", series["drop_rate"], True),
        ("coefficient", series["coefficient"], False),
        ("busiest expert / mean", series["load_max_over_mean"], False),
        ("Max1 / Max2", series["max1_over_max2"], False),
        ("entropy / log E", router.entropy_SL, False),
    ]
    shown = [(what, router.at_start(values), router.at_end(values), share) for what, values, share in candidates if np.isfinite(router.at_end(values)).any()]
    if router.evaluations is not None and np.isfinite(router.evaluations.similarity_VL).any():
        known = router.evaluations.similarity_VL[np.isfinite(router.evaluations.similarity_VL).any(axis=1)]
        shown.append(("expert similarity", known[0], known[-1], False))
    columns = 3 if len(shown) > 4 else max(1, len(shown))
    rows = -(-len(shown) // columns)
    canvas, axes_of = panel(WIDE_INCHES, 0.5 + 1.75 * rows, rows=rows, columns=columns, sharex=True, squeeze=False)
    flat = list(axes_of.flat)
    for axes, (what, start_L, end_L, share) in zip(flat, shown, strict=False):
        mark = {"marker": "o", "markersize": 2.5} if len(router.layers) <= 60 else {}
        line(axes, np.array(router.layers), start_L, color=MUTED, alpha=0.6, linewidth=1, label="start", **mark)
        line(axes, np.array(router.layers), end_L, color=BLUE, linewidth=1.4, label="end", **mark)
        if share:
            axes.yaxis.set_major_formatter(FuncFormatter(percent))
        axes.margins(y=0.12)
        name_value(axes, what)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in flat[len(shown) :]:
        axes.set_visible(False)
    for axes in flat[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("layer")
    legend(flat[0], columns=2)
    worst = [what for what, _, end_L, _ in shown if np.nanmax(end_L) > 2 * abs(float(nan_mean(end_L))) > 0]
    shows = f"At the end some layer is above twice the mean in: {', '.join(worst)}." if worst else "At the end no layer is above twice the mean in any."
    text = "Every layer from the first to the last: grey at the start, blue at the end. A point far from its neighbours is a layer to look at."
    return Plot("over_depth", "Layer by layer", text, png(canvas), wide=True, shows=shows)
