"""Plots of what every run has: loss, learning rate, gradient norm, speed, and where the time of a step goes.

With several runs each is one line of its own colour; with one run there is room for detail (raw and smoothed, validation sets, medians).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter

from megatron_skywork.report.load import Run
from megatron_skywork.report.style import (
    BLUE,
    CYCLE,
    GREEN,
    MUTED,
    OCHRE,
    ORANGE,
    PURPLE,
    WIDE_INCHES,
    Plot,
    label_steps,
    legend,
    line,
    panel,
    png,
    running_median,
    smoothed,
)


def training_plots(runs: Sequence[Run]) -> list[Plot]:
    """The plots that the runs have data for."""
    candidates = [_loss(runs), _learning_rate(runs), _gradient_norm(runs), _speed(runs)]
    if len(runs) == 1:
        candidates.append(_phases(runs[0]))
    return [plot for plot in candidates if plot is not None]


def _recorded(runs: Sequence[Run], name: str) -> bool:
    return any(np.isfinite(run.series(name)).any() for run in runs)


def _loss(runs: Sequence[Run]) -> Plot | None:
    if not _recorded(runs, "loss"):
        return None
    canvas, axes = panel(WIDE_INCHES, 3.4)
    single = len(runs) == 1
    seen = []
    for run, color in zip(runs, CYCLE * len(runs), strict=False):
        loss = run.series("loss")
        smooth = smoothed(loss)
        if smooth is not None:
            if single:
                line(axes, run.steps_S, loss, color=color, alpha=0.25, linewidth=0.8)
            line(axes, run.steps_S, smooth, color=color, label="training" if single else run.name)
        else:
            line(axes, run.steps_S, loss, color=color, label="training" if single else run.name)
        seen.append(loss)
        for (name, (steps, losses)), validation_color in zip(run.evaluations.items(), (ORANGE, GREEN, PURPLE, OCHRE) * 9, strict=False):
            shade = validation_color if single else color
            line(axes, steps, losses, color=shade, marker="o", markersize=4, linewidth=1, linestyle=":", label=f"validation: {name}" if single else None)
            seen.append(losses)
    _leave_out_the_first_cliff(axes, seen)
    label_steps(axes, "cross-entropy per token")
    legend(axes, columns=3)
    text = "Lower is better. Pale: every step; strong: running mean. " if single and len(runs[0].steps_S) >= 60 else "Lower is better. "
    text += "Dots are held-out documents: when they rise while training falls, the model memorizes." if any(run.evaluations for run in runs) else ""
    return Plot("loss", "Loss", text.strip(), png(canvas), wide=True)


def _leave_out_the_first_cliff(axes, series: list[np.ndarray]) -> None:
    """A few steps far above all others must not flatten the rest; what is cut is said by the axis."""
    values = np.concatenate(series)
    values = values[np.isfinite(values)]
    if len(values) < 40:
        return
    low, high, top = np.percentile(values, 0), np.percentile(values, 99), values.max()
    if top - low > 3 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _learning_rate(runs: Sequence[Run]) -> Plot | None:
    if not _recorded(runs, "learning_rate"):
        return None
    canvas, axes = panel()
    for run, color in zip(runs, CYCLE * len(runs), strict=False):
        line(axes, run.steps_S, run.series("learning_rate"), color=color, label=run.name if len(runs) > 1 else None)
    top = max(float(np.nanmax(run.series("learning_rate"))) for run in runs if np.isfinite(run.series("learning_rate")).any())
    axes.set_ylim(0, 1.08 * top if top > 0 else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    label_steps(axes, "learning rate")
    legend(axes, columns=3)
    return Plot(
        "learning_rate", "Learning rate", "The schedule as it was applied: warm-up, then decay. A jump would be a resume that lost its place.", png(canvas)
    )


def _gradient_norm(runs: Sequence[Run]) -> Plot | None:
    if not _recorded(runs, "grad_norm"):
        return None
    canvas, axes = panel()
    values = np.concatenate([run.series("grad_norm") for run in runs])
    values = values[np.isfinite(values) & (values > 0)]
    for run, color in zip(runs, CYCLE * len(runs), strict=False):
        norm = run.series("grad_norm")
        smooth = running_median(norm)
        line(axes, run.steps_S, norm, color=color, alpha=0.3 if smooth is not None else 1.0, linewidth=0.8 if smooth is not None else 1.6)
        if smooth is not None or len(runs) > 1:
            line(axes, run.steps_S, norm if smooth is None else smooth, color=color, label=run.name if len(runs) > 1 else None)
    limit = runs[0].setting("optim.clip_grad") if len(runs) == 1 else None
    if isinstance(limit, (int, float)) and limit > 0 and len(values) and values.max() > 0.5 * limit:
        axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"clipped above {limit:g}")
    if len(values) and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
    label_steps(axes, "global gradient norm, before clipping")
    legend(axes, columns=3)
    text = "Pale: every step; strong: running median. " if any(len(run.steps_S) >= 60 for run in runs) else ""
    return Plot("grad_norm", "Gradient norm", text + "Steady or falling is healthy; spikes announce trouble before the loss does.", png(canvas))


def _speed(runs: Sequence[Run]) -> Plot | None:
    if not _recorded(runs, "tokens_per_second"):
        return None
    canvas, axes = panel()
    for run, color in zip(runs, CYCLE * len(runs), strict=False):
        speed = run.series("tokens_per_second")
        line(axes, run.steps_S, speed, color=color, linewidth=1.2, label=run.name if len(runs) > 1 else None)
        median = float(np.nanmedian(speed)) if np.isfinite(speed).any() else float("nan")
        if len(runs) == 1:
            axes.axhline(median, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"median {median:,.0f}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label_steps(axes, "tokens per second, all devices")
    legend(axes, columns=3)
    return Plot("throughput", "Speed", "Should be flat. Single dips are saves and evaluations; a slope is a leak or a slow disk.", png(canvas))


def _phases(run: Run) -> Plot | None:
    names = [name for name in run.scalars if name.startswith("seconds.") and name != "seconds.step" and np.isfinite(run.series(name)).any()]
    if not names:
        return None
    parts = {name.removeprefix("seconds."): np.nan_to_num(run.series(name)) for name in names}
    whole = run.series("seconds.step")
    if np.isfinite(whole).any():
        rest = np.maximum(0.0, np.nan_to_num(whole) - sum(parts.values()))
        if rest.sum() > 0.01 * np.nansum(whole):
            parts["rest"] = rest
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].sum()))
    canvas, axes = panel()
    colors = [color for color, _ in zip((BLUE, OCHRE, GREEN, PURPLE, ORANGE) * len(parts), parts, strict=False)]
    if "rest" in parts:
        colors[list(parts).index("rest")] = "#c3cad2"
    if len(run.steps_S) == 1:
        axes.bar(list(parts), [values[0] for values in parts.values()], color=colors, width=0.5)
        axes.set_title("seconds of the step", loc="left", fontsize=8.5, color=MUTED, pad=8)
        axes.grid(False, axis="x")
    else:
        axes.stackplot(run.steps_S, list(parts.values()), labels=[name.replace("_", " ") for name in parts], colors=colors, alpha=0.85, linewidth=0)
        axes.set_ylim(0, 1.35 * float(np.percentile(sum(parts.values()), 98)))
        axes.set_xlim(run.steps_S[0], run.steps_S[-1])
        label_steps(axes, "seconds per step")
        legend(axes, columns=4)
    return Plot("phases", "Where a step's time goes", "The band for data should be thin: devices wait while it is read.", png(canvas))
