"""What the loss, the gradients, the speed and the events of a run say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from megatron_skywork.metrics import wording
from megatron_skywork.report.averages import nan_mean
from megatron_skywork.report.finding import Finding, listed, plural, whole_percent
from megatron_skywork.report.key_figures import key_figures
from megatron_skywork.report.load import Run

# Of a step; below that a faster loader would not be felt.
_MUCH_WAITING = 0.05


def training_findings(run: Run) -> Iterator[Finding]:
    """Loss, stability, wrong numbers, speed."""
    yield from _loss(run)
    yield from _stability(run)
    yield from _wrong_numbers(run)
    yield from _speed(run)


def _loss(run: Run) -> Iterator[Finding]:
    figures = key_figures(run)
    if len(run.steps_S) > 1 and figures.first_loss is not None and figures.last_loss is not None:
        change = figures.last_loss - figures.first_loss
        moved = "fell" if change < 0 else "rose" if change > 0 else "stayed"
        level: Literal["good", "warn"] = "good" if change < 0 else "warn"
        yield Finding(level, f"Training loss {moved} from {figures.first_loss:.3f} to {figures.last_loss:.3f} over {plural(int(run.steps_S[-1]), 'step')}.")
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
        where = listed([str(step) for step in run.nonfinite_steps])
        yield Finding("warn", f"Values that are not finite were recorded at {plural(len(run.nonfinite_steps), 'step')}: {where}.")
    skipped = int(np.nansum(run.series("skipped")))
    if skipped:
        yield Finding("warn", f"The optimizer skipped {plural(skipped, 'recorded step')}.")
    norm = run.series("grad_norm")
    known = np.isfinite(norm)
    if not known.any():
        return
    limit = run.setting("optim.clip_grad")
    if isinstance(limit, (int, float)) and limit > 0:
        clipped = float((norm[known] > limit).mean())
        if clipped > 0.5 and len(norm) > 10:
            last = nan_mean(norm[-run.window :])
            yield Finding("note", f"Gradients were clipped at {whole_percent(clipped)} of the steps (limit {limit:g}); the norm at the end is {last:.2f}.")
    largest = int(np.nanargmax(norm))
    usual = float(np.median(norm[known]))
    if len(norm) > 20 and largest > len(norm) // 10 and norm[largest] > 10 * usual:
        times = norm[largest] / usual
        yield Finding("warn", f"The gradient norm spiked to {norm[largest]:.1f} at step {run.steps_S[largest]}, {times:.0f} times its usual value.")


def _wrong_numbers(run: Run) -> Iterator[Finding]:
    """Steps that were answered (train/answers.py): who made what was not finite, spikes and rewinds, copies that differed."""
    made = Counter(rank for event in _events(run, "nonfinite") for rank in event.get("ranks") or [])
    if made:
        rank, times = made.most_common(1)[0]
        others = f", and from {plural(len(made) - 1, 'other rank')} no more often" if len(made) > 1 else ""
        yield Finding("warn", f"What was not finite came from rank {rank} in {plural(times, 'step')}{others}: look at that machine, and at the steps' data.")
    spikes = [*_events(run, "spike"), *(event["spike"] | {"answer": "rewind"} for event in _events(run, "rewind"))]
    if spikes:
        highest = max(spikes, key=lambda event: event["score"])
        left_out = sum(event["answer"] == "its update was left out" for event in spikes)
        where = listed([str(step) for step in sorted(event["step"] for event in spikes)])
        text = f"The loss spiked at {plural(len(spikes), 'step')}: {where}; "
        text += f"most at step {highest['step']}, to {highest['loss']:.3f} from a median of {highest['median']:.3f}."
        yield Finding("warn", text + (f" Updates left out: {left_out}." if left_out else ""))
    for event in _events(run, "rewind"):
        first, last = event["passed_over"]
        where = f"After the spike of step {event['spike']['step']} the run went back to step {event['step']}"
        yield Finding("note", f"{where}, and passed over samples {first} to {last}.")
    for event in _events(run, "replicas"):
        outvoted = [suspect for suspect in event["suspects"] if suspect["outvoted"]]
        who = listed([f"rank {suspect['rank']} on {suspect['host']}" for suspect in outvoted or event["suspects"]])
        doubt = "" if outvoted else " (one of them, and no majority says which)"
        yield Finding("warn", f"Copies of parameters differed at step {event['step']}: {who}{doubt}.")


def _events(run: Run, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events if event.get("event") == name]


def _speed(run: Run) -> Iterator[Finding]:
    figures = key_figures(run)
    if figures.tokens_per_second is not None:
        text = f"Median speed {figures.tokens_per_second:,.0f} tokens per second"
        text += f", {figures.tflops_per_device:.3g} TFLOP/s per device" if figures.tflops_per_device is not None else ""
        text += f", {wording.percent(figures.mfu)} of peak" if figures.mfu is not None else ""
        yield Finding("note", text + ".")
    if figures.data_wait_share is not None and figures.data_wait_share > _MUCH_WAITING:
        share = whole_percent(figures.data_wait_share)
        workers = run.setting("data.num_workers")
        text = f"Waiting for data takes {share} of a step: raise data.num_workers" + (f" (it is {workers})" if workers is not None else "")
        yield Finding("warn", text + ", or move the data closer.")
    whole = run.series("seconds.step")
    known = whole[np.isfinite(whole) & (whole > 0)]
    slow = int((known > 3 * np.median(known)).sum()) if len(known) > 5 else 0
    if slow:
        yield Finding("note", f"{plural(slow, 'step')} took more than three times the usual {np.median(known):.2f} s.")


def continuity_findings(run: Run) -> Iterator[Finding]:
    """Where the run was resumed."""
    resumed = _events(run, "resume")
    if resumed:
        where = listed([f"step {event.get('step')}" for event in resumed])
        yield Finding("note", f"The run was resumed {'once' if len(resumed) == 1 else f'{len(resumed)} times'}, from {where}.")
