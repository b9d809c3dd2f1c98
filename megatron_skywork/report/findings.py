"""What a run's numbers say, in sentences: the part of the report that is read when nothing else is.

Each finding is computed from the records and carries how serious it is: `good`, `note` or `warn`. "At the end" is the mean over the last records (see
`load.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_skywork.metrics import wording
from megatron_skywork.report.load import Router, Run, nan_mean

# Parts of the even share below which an expert counts as dead or as starved.
DEAD_BELOW = 0.01
STARVED_BELOW = 0.10
_MOST_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One sentence or two of plain text."""

    level: Literal["good", "note", "warn"]
    text: str


@dataclass(frozen=True)
class KeyFigures:
    """A run in a few numbers; None where a run has no such thing."""

    steps: int
    tokens: float | None
    first_loss: float | None
    last_loss: float | None
    validation: dict[str, tuple[float, float]]
    """Set -> first and last loss."""
    tokens_per_second: float | None
    tflops_per_device: float | None
    mfu: float | None
    seconds: float | None
    drop_rate: float | None
    max_over_mean: float | None
    dead_experts: int | None
    num_experts: int | None
    """Of all layers together."""


def key_figures(run: Run) -> KeyFigures:
    """The numbers of the tiles at the top of the page, and of `--json`."""
    loss = run.series("loss")
    validation = {}
    for name, (_, losses) in run.evaluations.items():
        known = losses[np.isfinite(losses)]
        if len(known):
            validation[name] = (float(known[0]), float(known[-1]))
    router = run.router
    times = run.series("time")
    return KeyFigures(
        steps=int(run.steps_S[-1]),
        tokens=_or_none(run.series("tokens")[-1]),
        first_loss=_or_none(nan_mean(loss[: run.window])),
        last_loss=_or_none(nan_mean(loss[-run.window :])),
        validation=validation,
        tokens_per_second=_median(run.series("tokens_per_second")),
        tflops_per_device=_median(run.series("tflops_per_device")),
        mfu=_median(run.series("mfu")),
        seconds=_or_none(times[-1] - times[0]) if len(times) > 1 else None,
        drop_rate=_or_none(nan_mean(router.at_end(router.per_layer["drop_rate"]))) if router else None,
        max_over_mean=_or_none(nan_mean(router.at_end(router.max_over_mean_SL))) if router else None,
        dead_experts=int((router.relative_load_LE < DEAD_BELOW).sum()) if router else None,
        num_experts=int(router.load_LE.size) if router else None,
    )


def findings(run: Run) -> list[Finding]:
    """All findings of a run, the serious ones first."""
    found = [*_loss(run), *_stability(run), *_speed(run)]
    if run.router is not None:
        found += [*_experts(run.router), *_drops(run, run.router), *_coefficients(run, run.router), *_sharpness(run.router)]
    found += _continuity(run)
    return sorted(found, key=lambda finding: ("warn", "good", "note").index(finding.level))


def _or_none(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(parts: list[str]) -> str:
    more = len(parts) - _MOST_NAMED
    shown = parts[:_MOST_NAMED] + ([f"{more} more"] if more > 0 else [])
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _loss(run: Run) -> Iterator[Finding]:
    figures = key_figures(run)
    if len(run.steps_S) > 1 and figures.first_loss is not None and figures.last_loss is not None:
        change = figures.last_loss - figures.first_loss
        moved = "fell" if change < 0 else "rose" if change > 0 else "stayed"
        level: Literal["good", "warn"] = "good" if change < 0 else "warn"
        yield Finding(level, f"Training loss {moved} from {figures.first_loss:.3f} to {figures.last_loss:.3f} over {_plural(int(run.steps_S[-1]), 'step')}.")
    for name, (steps, losses) in run.evaluations.items():
        known = np.isfinite(losses)
        if known.sum() < 2:
            continue
        steps, losses = steps[known], losses[known]
        best = int(np.argmin(losses))
        if losses[-1] < losses[0]:
            text = f"Held-out loss on {name} fell from {losses[0]:.3f} to {losses[-1]:.3f} (perplexity {_perplexity(losses[0])} to {_perplexity(losses[-1])})."
            yield Finding("good", text)
        else:
            yield Finding("warn", f"Held-out loss on {name} did not fall: {losses[0]:.3f} at step {steps[0]}, {losses[-1]:.3f} at step {steps[-1]}.")
        if best < len(losses) - 1 and losses[-1] > losses[best] + 0.01:
            yield Finding("warn", f"Held-out loss on {name} was lowest at step {steps[best]} ({losses[best]:.3f}) and has risen since.")


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.3g}" if loss < 100 else "beyond reason"


def _stability(run: Run) -> Iterator[Finding]:
    if run.nonfinite_steps:
        where = _listed([str(step) for step in run.nonfinite_steps])
        yield Finding("warn", f"Values that are not finite were recorded at {_plural(len(run.nonfinite_steps), 'step')}: {where}.")
    skipped = int(np.nansum(run.series("skipped")))
    if skipped:
        yield Finding("warn", f"The optimizer skipped {_plural(skipped, 'recorded step')}.")
    norm = run.series("grad_norm")
    known = np.isfinite(norm)
    if not known.any():
        return
    limit = run.setting("optim.clip_grad")
    if isinstance(limit, (int, float)) and limit > 0:
        clipped = float((norm[known] > limit).mean())
        if clipped > 0.5 and len(norm) > 10:
            last = nan_mean(norm[-run.window :])
            yield Finding("note", f"Gradients were clipped at {_whole_percent(clipped)} of the steps (limit {limit:g}); the norm at the end is {last:.2f}.")
    largest = int(np.nanargmax(norm))
    usual = float(np.median(norm[known]))
    if len(norm) > 20 and largest > len(norm) // 10 and norm[largest] > 10 * usual:
        times = norm[largest] / usual
        yield Finding("warn", f"The gradient norm spiked to {norm[largest]:.1f} at step {run.steps_S[largest]}, {times:.0f} times its usual value.")


def _speed(run: Run) -> Iterator[Finding]:
    figures = key_figures(run)
    if figures.tokens_per_second is not None:
        text = f"Median speed {figures.tokens_per_second:,.0f} tokens per second"
        text += f", {figures.tflops_per_device:.3g} TFLOP/s per device" if figures.tflops_per_device is not None else ""
        text += f", {wording.percent(figures.mfu)} of peak" if figures.mfu is not None else ""
        yield Finding("note", text + ".")
    data, whole = run.series("seconds.data"), run.series("seconds.step")
    both = np.isfinite(data) & np.isfinite(whole) & (whole > 0)
    if both.sum() > 5:
        share = float(np.median(data[both] / whole[both]))
        if share > 0.10:
            yield Finding("warn", f"Waiting for data takes {_whole_percent(share)} of a step: raise data.num_workers, or move the data closer.")
        slow = int((whole[both] > 3 * np.median(whole[both])).sum())
        if slow:
            yield Finding("note", f"{_plural(slow, 'step')} took more than three times the usual {np.median(whole[both]):.2f} s.")


def _experts(router: Router) -> Iterator[Finding]:
    relative_LE = router.relative_load_LE
    for label, chosen_LE, below in (
        ("dead", relative_LE < DEAD_BELOW, DEAD_BELOW),
        ("starved", (relative_LE >= DEAD_BELOW) & (relative_LE < STARVED_BELOW), STARVED_BELOW),
    ):
        places = np.argwhere(chosen_LE)
        if len(places):
            named = _listed([f"expert {expert} of layer {router.layers[layer]} ({_whole_percent(relative_LE[layer, expert])})" for layer, expert in places])
            verb = "receives" if len(places) == 1 else "receive"
            count = f"{_plural(len(places), f'{label} expert')} of {relative_LE.size}"
            yield Finding("warn", f"{count}: {named} {verb} less than {_whole_percent(below)} of an even share at the end.")
    if not (relative_LE < STARVED_BELOW).any():
        layer, expert = np.unravel_index(int(relative_LE.argmin()), relative_LE.shape)
        text = f"Every one of the {relative_LE.size} experts is in use; the least, expert {expert} of layer {router.layers[layer]}"
        yield Finding("good", f"{text}, receives {_whole_percent(relative_LE[layer, expert])} of an even share.")
    balance_L = router.at_end(router.max_over_mean_SL)
    if not np.isfinite(balance_L).any():
        return
    worst = int(np.nanargmax(balance_L))
    text = f"Load is least even in layer {router.layers[worst]}: its busiest expert has {balance_L[worst]:.2f} times the even share"
    yield Finding("note", text + (f" (mean over layers {nan_mean(balance_L):.2f})." if len(balance_L) > 1 else "."))


def _drops(run: Run, router: Router) -> Iterator[Finding]:
    drops_SL = router.per_layer["drop_rate"]
    if not np.isfinite(drops_SL).any():
        return
    if np.nansum(drops_SL) == 0:
        capacity = run.setting("moe.capacity_factor")
        reason = "no capacity factor is set" if capacity is None else f"the capacity factor of {capacity:g} was never reached"
        yield Finding("note", f"Nothing was dropped: {reason}.")
        return
    drops_L = router.at_end(drops_SL)
    worst = int(np.nanargmax(drops_L))
    mean, before = float(nan_mean(drops_L)), float(nan_mean(drops_SL[: router.window]))
    text = f"Layer {router.layers[worst]} drops most: {wording.percent(float(drops_L[worst]))} of its assignments at the end"
    text += f", against {wording.percent(mean)} on average over layers" if len(drops_L) > 1 else ""
    yield Finding("warn" if drops_L[worst] > 0.10 else "note", text + ".")
    if len(router.steps_S) > 2 * router.window:
        direction = "fell" if mean < before else "rose"
        yield Finding("good" if mean < before else "warn", f"The mean drop rate {direction} from {wording.percent(before)} to {wording.percent(mean)}.")


def _coefficients(run: Run, router: Router) -> Iterator[Finding]:
    coefficients_SL = router.per_layer["coefficient"]
    if run.setting("moe.adaptive.enabled") is not True or not np.isfinite(coefficients_SL).any():
        return
    end_L = router.at_end(coefficients_SL)
    low, high = int(np.nanargmin(end_L)), int(np.nanargmax(end_L))
    text = f"Adaptive coefficients end between {end_L[low]:.4f} (layer {router.layers[low]}) and {end_L[high]:.4f} (layer {router.layers[high]})."
    maximum, momentum = run.setting("moe.adaptive.maximum"), run.setting("moe.adaptive.momentum")
    if isinstance(maximum, (int, float)):
        capped = int((end_L > 0.98 * maximum).sum())
        text += f" {_plural(capped, 'layer')} {'is' if capped == 1 else 'are'} at the maximum of {maximum:g}." if capped else ""
    steps = int(run.steps_S[-1])
    if isinstance(momentum, (int, float)) and 0 < momentum < 1 and steps < 3 / (1 - momentum):
        left = _whole_percent(momentum**steps)
        text += f" They keep {momentum:g} of their value each step, so after {_plural(steps, 'step')} {left} of the starting value is still in them."
    yield Finding("note", text)


def _sharpness(router: Router) -> Iterator[Finding]:
    entropy_L = router.at_end(router.entropy_SL)
    if np.isfinite(entropy_L).any():
        flat = [str(router.layers[index]) for index in np.flatnonzero(entropy_L > 0.98)]
        certain = [str(router.layers[index]) for index in np.flatnonzero(entropy_L < 0.15)]
        for layers, state in (
            (flat, "is almost flat: its entropy is above 98 % of the largest possible"),
            (certain, "has all but collapsed onto one expert per token"),
        ):
            if layers:
                yield Finding("warn", f"The gate of {'layer' if len(layers) == 1 else 'layers'} {_listed(layers)} {state}.")
    ratio_L = router.at_end(router.per_layer["max1_over_max2"])
    if np.isfinite(ratio_L).any():
        lowest = int(np.nanargmin(ratio_L))
        text = f"The first choice is on average {nan_mean(ratio_L):.2f} times as probable as the second"
        text += f"; least so in layer {router.layers[lowest]}, {ratio_L[lowest]:.2f} times" if len(ratio_L) > 1 else ""
        yield Finding("warn" if ratio_L[lowest] < 1.02 else "note", text + ".")


def _continuity(run: Run) -> Iterator[Finding]:
    resumed = [event for event in run.events if event.get("event") == "resume"]
    if resumed:
        where = _listed([f"step {event.get('step')}" for event in resumed])
        yield Finding("note", f"The run was resumed {'once' if len(resumed) == 1 else f'{len(resumed)} times'}, from {where}.")
