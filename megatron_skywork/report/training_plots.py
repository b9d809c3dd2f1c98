"""Plots of what every run has: loss, learning rate, gradient norm, speed, and where the time of a step goes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from megatron_skywork.report.averages import nan_mean, running_median, smoothed
from megatron_skywork.report.load import Run
from megatron_skywork.report.style import BLUE, GREEN, MUTED, OCHRE, ORANGE, PURPLE, WIDE_INCHES, Plot, label_steps, legend, line, panel, png


def training_plots(run: Run) -> list[Plot]:
    """The plots that the run has data for."""
    candidates = [_loss(run), _learning_rate(run), _gradient_norm(run), _speed(run), _phases(run)]
    return [plot for plot in candidates if plot is not None]


def _recorded(run: Run, name: str) -> bool:
    return bool(np.isfinite(run.series(name)).any())


def _loss(run: Run) -> Plot | None:
    if not _recorded(run, "loss"):
        return None
    canvas, axes = panel(WIDE_INCHES, 3.4)
    loss = run.series("loss")
    smooth = smoothed(loss)
    if smooth is not None:
        line(axes, run.steps_S, loss, color=BLUE, alpha=0.25, linewidth=0.8)
    line(axes, run.steps_S, loss if smooth is None else smooth, color=BLUE, label="training")
    seen = [loss]
    shows = [f"Training: {nan_mean(loss[: run.window]):.3f} at the start, {nan_mean(loss[-run.window :]):.3f} at the end."]
    for (name, (steps, losses)), color in zip(run.evaluations.items(), (ORANGE, GREEN, PURPLE, OCHRE) * 9, strict=False):
        line(axes, steps, losses, color=color, marker="o", markersize=4, linewidth=1, linestyle=":", label=f"validation: {name}")
        seen.append(losses)
        shows.append(f"{name}: {losses[0]:.3f} at step {steps[0]}, {losses[-1]:.3f} at step {steps[-1]}.")
    leave_out_the_first_cliff(axes, seen)
    label_steps(axes, "cross-entropy per token")
    legend(axes, columns=3)
    text = "Lower is better. " + ("Pale: every step; strong: running mean. " if smooth is not None else "")
    text += "Dots are held-out documents: when they rise while training falls, the model memorizes." if run.evaluations else ""
    return Plot("loss", "Loss", text.strip(), png(canvas), wide=True, shows=" ".join(shows))


def leave_out_the_first_cliff(axes: Any, series: list[np.ndarray]) -> None:
    """A few steps far above all others must not flatten the rest; what is cut is said by the axis."""
    values = np.concatenate(series)
    values = values[np.isfinite(values)]
    if len(values) < 40:
        return
    low, high, top = np.percentile(values, 0), np.percentile(values, 99), values.max()
    if top - low > 3 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _learning_rate(run: Run) -> Plot | None:
    if not _recorded(run, "learning_rate"):
        return None
    canvas, axes = panel()
    rate = run.series("learning_rate")
    line(axes, run.steps_S, rate, color=BLUE)
    top = float(np.nanmax(rate))
    axes.set_ylim(0, 1.08 * top if top > 0 else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    label_steps(axes, "learning rate")
    text = "The schedule as it was applied: warm-up, then decay. A jump would be a resume that lost its place."
    return Plot("learning_rate", "Learning rate", text, png(canvas), shows=f"Highest {top:.2e}, {rate[np.isfinite(rate)][-1]:.2e} at the end.")


def _gradient_norm(run: Run) -> Plot | None:
    if not _recorded(run, "grad_norm"):
        return None
    canvas, axes = panel()
    norm = run.series("grad_norm")
    smooth = running_median(norm)
    values = norm[np.isfinite(norm) & (norm > 0)]
    line(axes, run.steps_S, norm, color=BLUE, alpha=0.3 if smooth is not None else 1.0, linewidth=0.8 if smooth is not None else 1.6)
    if smooth is not None:
        line(axes, run.steps_S, smooth, color=BLUE)
    limit = run.setting("optim.clip_grad")
    if isinstance(limit, (int, float)) and limit > 0 and len(values) and values.max() > 0.5 * limit:
        axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"clipped above {limit:g}")
    if len(values) and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
    label_steps(axes, "global gradient norm, before clipping")
    legend(axes, columns=3)
    text = "Pale: every step; strong: running median. " if smooth is not None else ""
    shows = f"Median {np.nanmedian(norm):.3g}, largest {np.nanmax(norm):.3g}, {nan_mean(norm[-run.window :]):.3g} at the end."
    return Plot("grad_norm", "Gradient norm", text + "Steady or falling is healthy; spikes announce trouble before the loss does.", png(canvas), shows=shows)


def _speed(run: Run) -> Plot | None:
    if not _recorded(run, "tokens_per_second"):
        return None
    canvas, axes = panel()
    speed = run.series("tokens_per_second")
    line(axes, run.steps_S, speed, color=BLUE, linewidth=1.2)
    median = float(np.nanmedian(speed))
    axes.axhline(median, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"median {median:,.0f}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label_steps(axes, "tokens per second, all devices")
    legend(axes, columns=3)
    text = "Should be flat. Single dips are saves and evaluations; a slope is a leak or a slow disk."
    return Plot("throughput", "Speed", text, png(canvas), shows=f"Median {median:,.0f} tokens per second, slowest record {np.nanmin(speed):,.0f}.")


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
    total = sum(values.sum() for values in parts.values())
    shows = ", ".join(f"{name.replace('_', ' ')} {100 * values.sum() / total:.0f} %" for name, values in parts.items()) + " of the time." if total > 0 else ""
    text = "The band for data should be thin: devices wait while it is read."
    return Plot("phases", "Where a step's time goes", text, png(canvas), shows=shows)
