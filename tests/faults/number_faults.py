"""Numbers that go wrong on one rank: NaN and Inf in its loss, its activations, its gradient or one of its experts, and a bit that flips in its copy of a
parameter. Every rank decides alike, nothing of it comes into the model, and the rank is named.

What ranks do here are the bodies of `test_wrong_numbers`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fault import Fault, Outcome
from ranks import shared_pool

NAN, INF = math.nan, math.inf


def _wrong(answers: list[dict[str, Any]], run_dir: Path, rank: int, expected: tuple[list[str], list[int], list[str]]) -> str | None:
    """What is not as it should be after three steps, the second of which was poisoned."""
    from training_bodies import records

    what, named, first = expected
    for number, answer in enumerate(answers):
        if answer["applied"] != [True, False, True]:
            return f"rank {number} applied {answer['applied']}"
        if answer["changed"][1]:
            return f"rank {number} changed {answer['changed'][1][:3]} in the refused step"
        if not (answer["changed"][0] and answer["changed"][2]):
            return f"rank {number} changed nothing in a good step"
    if len({str(answer["refused"]) for answer in answers}) != 1:
        return "ranks decided differently"
    events = [event for event in records(run_dir, "event") if event["event"] == "nonfinite"]
    if [event["step"] for event in events] != [2] or events[0]["samples"] != [8, 15]:
        return f"recorded as {events}"
    if rank not in events[0]["ranks"] or events[0]["ranks"] != named or events[0]["what"] != what or events[0]["sources"][0]["first"] != first:
        return f"named as {events[0]}"
    return None


def not_finite(folder: Path, short: bool) -> Outcome:
    from test_wrong_numbers import POISONS, SHORT, steps_with_a_poison
    from training_bodies import merged

    outcome = Outcome()
    for name, (world_size, more, kind, value, rank, *expected) in list(POISONS.items())[: 1 if short else None]:
        for number in (value,) if short else (NAN, INF, -INF):
            run_dir = folder / f"{name} {number}"
            settings = merged(SHORT, {"run_dir": str(run_dir), "optim": {"warmup_steps": 10}}, more)
            answers = shared_pool().run(world_size, steps_with_a_poison, settings, kind, number, rank)
            failure = _wrong(answers, run_dir, rank, tuple(expected))
            outcome.add(f"{name}, {number}: {failure}" if failure else None)
    return outcome


def not_finite_for_long(folder: Path, short: bool) -> Outcome:
    """The loss is NaN from the third step on: the run ends, having saved what it held after the second, and the next start goes on from there."""
    from test_wrong_numbers import SHORT, three_refused
    from training_bodies import merged, records, train

    outcome = Outcome()
    for limit in (2,) if short else (1, 2, 3):
        run_dir = folder / str(limit)
        settings = merged(SHORT, {"run_dir": str(run_dir), "parallel": {"ep": 2}, "train": {"steps": 6, "max_nonfinite_steps": limit}})
        failure = None
        for text, good, end in shared_pool().run(2, three_refused, settings, 3):
            if f"saved as step {2 + limit}" not in text or good != end:
                failure = f"ended with {text!r}, and {'with' if good == end else 'without'} what it held"
        shared_pool().run(2, train, settings)
        steps = [(record["step"], record["skipped"]) for record in records(run_dir)]
        if steps != [(step, 3 <= step < 3 + limit) for step in range(1, 7)]:
            failure = f"went on as {steps}"
        outcome.add(f"{limit} in a row: {failure}" if failure else None)
    return outcome


def flipped_bits(folder: Path, short: bool) -> Outcome:
    """One bit at a time in one rank's copy, between the gradients and the update, with `train.check_replicas=1`."""
    from test_wrong_numbers import LAYOUTS, SHORT, clean_steps_then_flips
    from training_bodies import merged, records

    outcome = Outcome()
    for layout, (more, flips) in list(LAYOUTS.items())[-1 if short else 0 :]:
        run_dir = folder / layout
        settings = merged(SHORT, {"parallel": {}}, more, {"run_dir": str(run_dir), "train": {"check_replicas": 1}})
        answers = shared_pool().run(4, clean_steps_then_flips, settings, flips)
        events = [event for event in records(run_dir, "event") if event["event"] == "replicas"]
        for number, (ending, _, named, by_majority) in enumerate(flips):
            told = [answer[number] for answer in answers]
            outvoted = [suspect["rank"] for suspect in events[number]["suspects"] if suspect["outvoted"]]
            found = outvoted or [suspect["rank"] for suspect in events[number]["suspects"]]
            failure = None
            if any(one != told[0] for one in told) or not told[0][0] or told[0][1]:
                failure = f"ranks ended with {told}"
            elif found != named or bool(outvoted) != by_majority:
                failure = f"named {found}, by {'majority' if outvoted else 'difference'}"
            outcome.add(f"{layout}, {ending}: {failure}" if failure else None)
    return outcome


def unwatched_bits(folder: Path, short: bool) -> Outcome:
    """The same flips where nobody compares: training goes on with copies that differ."""
    from test_wrong_numbers import LAYOUTS, SHORT, clean_steps_then_flips
    from training_bodies import merged

    outcome = Outcome(note="trained on")
    more, flips = LAYOUTS["pp2, overlapping"]
    settings = merged(SHORT, {"parallel": {}}, more, {"run_dir": str(folder), "train": {"check_replicas": 0}})
    answers = shared_pool().run(4, clean_steps_then_flips, settings, flips)
    for (ending, *_), (text, changed) in zip(flips, answers[0], strict=True):
        outcome.add(f"{ending}: the step was {'applied' if changed else 'left out'}" if not text else None)
    return outcome


def naive_step(value: float) -> bool:
    """A step as it is often written, on two ranks, one of which has a gradient that is not finite; whether the parameters are still finite."""
    import torch

    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), value if torch.distributed.get_rank() == 1 else 0.5)
    torch.distributed.all_reduce(weight.grad)
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    torch.optim.AdamW([weight]).step()
    return bool(weight.isfinite().all())


def naive_numbers(folder: Path, short: bool) -> Outcome:
    outcome = Outcome(note="went into the parameters")
    for value in (NAN, INF, -INF):
        kept = all(shared_pool().run(2, naive_step, value))
        outcome.add(None if kept else f"{value}: parameters of NaN")
    return outcome


FAULTS = [
    Fault("NaN and Inf in one rank's loss, gradient or expert", not_finite),
    Fault("NaN for several steps in a row", not_finite_for_long),
    Fault("a bit flipped in one rank's copy of a parameter", flipped_bits),
    Fault("control: NaN and Inf in a plain step", naive_numbers, is_control=True),
    Fault("control: the same bits where copies are not compared", unwatched_bits, is_control=True, in_short=False),
]
