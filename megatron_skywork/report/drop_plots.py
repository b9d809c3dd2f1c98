"""Plots of what is dropped and of what the coefficients do about it, cause above response.

An adaptive coefficient follows alpha <- beta * alpha + (1 - beta) * min(xi * d, alpha_max) (Skywork-MoE report, section 4.2), so where the drop rate d is
steady and below the cap, alpha / d settles at xi. That ratio is drawn too: it says whether a coefficient has arrived.

Shapes: S recorded steps, L MoE layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from megatron_skywork.metrics import wording
from megatron_skywork.report.averages import calm, nan_mean, nan_range
from megatron_skywork.report.load import Run
from megatron_skywork.report.router_axes import draw_layers, in_words, layer_heatmap, percent
from megatron_skywork.report.router_records import Router
from megatron_skywork.report.style import (
    AMOUNT,
    GREEN,
    MUTED,
    OCHRE,
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

_WORST = 3
# A wider range than this is drawn on a logarithmic scale.
_LOG_FROM = 8.0


def moves(values_SL: np.ndarray) -> bool:
    """Whether the value of any layer changes over the steps."""
    low_L, high_L = nan_range(values_SL, axis=0)
    return bool(np.any(high_L > low_L))


def drop_plots(run: Run) -> list[Plot]:
    """Lines of the layers that drop most, and both quantities layer by layer; nothing where nothing is dropped and no coefficient moves."""
    router = run.router
    if router is None:
        return []
    drops, coefficients = router.per_layer["drop_rate"], router.per_layer["coefficient"]
    dropping, moving = bool(np.nansum(drops) > 0), moves(coefficients)
    plots = [_cause_and_response(run, router, dropping, moving)] if dropping or moving else []
    if dropping:
        text = "Assignments thrown away because an expert was full. Bands that stay dark are layers whose router does not spread its tokens."
        plots.append(layer_heatmap(router, "drop_rate_by_layer", "Drop rate by layer", text, "drop rate", drops, WARMTH, form=percent))
    if moving:
        text = "A layer that drops gets more of the balancing loss, up to the maximum; a balanced one is left in peace. Compare with the drop rate beside it."
        known = coefficients[np.isfinite(coefficients)]
        norm = LogNorm(float(known.min()), float(known.max())) if known.min() > 0 and known.max() > _LOG_FROM * known.min() else None
        title = "Auxiliary coefficient by layer"
        plots.append(layer_heatmap(router, "coefficient_by_layer", title, text, "coefficient", coefficients, AMOUNT, norm, lambda value, _: f"{value:.2g}"))
    return [plot for plot in plots if plot is not None]


def _cause_and_response(run: Run, router: Router, dropping: bool, moving: bool) -> Plot | None:
    """Drop rate, coefficient and their ratio under each other, for the layers that drop most."""
    drops_SL, coefficients_SL = router.per_layer["drop_rate"], router.per_layer["coefficient"]
    adaptive = dropping and moving and run.setting("moe.adaptive.enabled") is True and bool(np.isfinite(coefficients_SL).any())
    heights = [1.15] * dropping + [1.0] * moving + [0.8] * adaptive
    canvas, axes_of = panel(WIDE_INCHES, 0.7 + 1.75 * sum(heights), rows=len(heights), sharex=True, squeeze=False, height_ratios=heights)
    rows = list(axes_of[:, 0])
    named = _worst(router)
    text, shows = "", ""
    if dropping:
        axes = rows[0]
        draw_layers(axes, router.steps_S, drops_SL, router.layers, named)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
        name_value(axes, "drop rate")
        text += f"{'Above: dropped' if moving else 'Dropped'} over routed assignments, in the {_layers(len(named))} that drop most at the end. "
        shows += "Drop rate: " + in_words(router, drops_SL, wording.percent) + " "
    if moving:
        axes = rows[int(dropping)]
        draw_layers(axes, router.steps_S, coefficients_SL, router.layers, named)
        _coefficient_axis(run, axes, coefficients_SL)
        text += "Below it: the weight that their balancing loss gets. " if dropping else "The weight of the balancing loss. "
        shows += "Coefficient: " + in_words(router, coefficients_SL, "{:.4f}".format)
    elif np.isfinite(coefficients_SL).any():
        low, high = f"{np.nanmin(coefficients_SL):.4g}", f"{np.nanmax(coefficients_SL):.4g}"
        shows += f"The auxiliary coefficient is {low}{'' if low == high else f' to {high}, by layer,'} throughout."
    if adaptive:
        text += _ratio(run, rows[-1], router, named)
    label_steps(rows[-1], rows[-1].get_title(loc="left"))
    legend(rows[0], columns=5)
    title = "What is dropped, and what the coefficient does about it" if dropping and moving else "Drop rate over time" if dropping else "Coefficient over time"
    return Plot("drop_and_coefficient", title, text.strip() + " Grey: all layers." * (len(router.layers) > 3), png(canvas), wide=True, shows=shows.strip())


def _layers(number: int) -> str:
    return "layer" if number == 1 else f"{number} layers"


def _worst(router: Router) -> dict[int, str]:
    """The layers that drop most at the end, and their colours."""
    end_L = np.nan_to_num(router.at_end(router.per_layer["drop_rate"]), nan=-1.0)
    order = np.argsort(-end_L, kind="stable")[:_WORST]
    return dict(zip((int(index) for index in order), (ORANGE, PURPLE, GREEN), strict=False))


def _coefficient_axis(run: Run, axes: Any, coefficients_SL: np.ndarray) -> None:
    known = coefficients_SL[np.isfinite(coefficients_SL)]
    maximum = run.setting("moe.adaptive.maximum") if run.setting("moe.adaptive.enabled") is True else None
    if isinstance(maximum, (int, float)) and known.max() > 0.5 * maximum:
        axes.axhline(maximum, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        _beside(axes, f"maximum\n{maximum:g}", maximum, MUTED)
    if known.min() > 0 and known.max() > _LOG_FROM * known.min():
        _log_axis(axes)
    else:
        axes.set_ylim(bottom=0)
    name_value(axes, "coefficient")


def _beside(axes: Any, text: str, value: float, color: str) -> None:
    """A word at the right edge, outside, where no line runs through it."""
    axes.annotate(text, (1.005, value), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=7.5, color=color)


def _log_axis(axes: Any) -> None:
    """Labels at 1, 2 and 5 of every power of ten, as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ratio(run: Run, axes: Any, router: Router, named: dict[int, str]) -> str:
    """Coefficient over drop rate, both smoothed, with the steady state; what to say of it."""
    sensitivity = run.setting("moe.adaptive.sensitivity")
    drops_SL, coefficients_SL = router.per_layer["drop_rate"], router.per_layer["coefficient"]

    def over(index: int | None) -> np.ndarray:
        drop_S, coefficient_S = (calm(nan_mean(v, axis=1) if index is None else v[:, index]) for v in (drops_SL, coefficients_SL))
        return np.where(drop_S > 0, coefficient_S / np.maximum(drop_S, 1e-12), np.nan)

    for index, color in named.items():
        line(axes, router.steps_S, over(index), color=color, linewidth=1.2)
    if len(router.layers) > 1:
        line(axes, router.steps_S, over(None), color="#2b6cb0", linewidth=2.2)
    axes.set_yscale("log")
    name_value(axes, "coefficient / drop rate")
    if not isinstance(sensitivity, (int, float)):
        return ""
    axes.axhline(sensitivity, color=OCHRE, linewidth=1.4, linestyle=(0, (4, 3)))
    shown = np.concatenate([over(index) for index in named])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (sensitivity, sensitivity)
    axes.set_ylim(max(sensitivity / 30, min(0.6 * low, 0.6 * sensitivity)), min(30 * sensitivity, max(1.6 * high, 1.6 * sensitivity)))
    _log_axis(axes)
    _beside(axes, f"steady\nstate {sensitivity:g}", sensitivity, OCHRE)
    text = f"Last: their ratio. At {sensitivity:g} a coefficient has settled; above, it still remembers a larger drop rate or its first value; "
    return text + "below, the maximum holds it down or it is on its way up."
