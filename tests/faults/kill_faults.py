"""A run that is killed again and again, at chosen places and at random times, and started again each time: in the end it is the run that nobody touched.

Compared are the record of every step, each there once, and every item of the last checkpoint, bit for bit.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault import Fault, Outcome
from run_bodies import SETTINGS, in_memory, merged
from warm import Child, warm

_STEPS = 12
_KILLS, _KILLS_SHORT = 110, 5
_OFTEN = 5
_SETTINGS = {"train": {"steps": _STEPS}, "checkpoint": {"every": 2, "keep": 2}}
# Where a process is killed, as `die_at` of run_bodies.py takes it, and at the how-many-th time at most; only a resumed run comes to the last ones.
_STEP = [("megatron_skywork.train.step:forward_step", 20), ("megatron_skywork.train.training:Training.log", 10),
         ("megatron_skywork.train.training:Training.log+", 10), ("megatron_skywork.optim.step:OptimizerStep.__call__+", 10)]  # fmt: skip
_SAVE = [(f"megatron_skywork.{name}", 3) for name in (
    "checkpoint.save:Saver.begin", "checkpoint.save:capture+", "checkpoint.save:write_part", "checkpoint.save:write_part+", "checkpoint.save:commit",
    "convert.streaming.file_writer:FileWriter.finish", "checkpoint.commit:_put_in_place", "checkpoint.commit:_put_in_place+", "checkpoint.save:point_to",
    "checkpoint.save:retain", "checkpoint.save:retain+", "checkpoint.commit:fsync", "train.training:Training.settle_save+",
)] + [("megatron_skywork.checkpoint.commit:write_durably", 16)]  # fmt: skip
_START = [(f"megatron_skywork.{name}", 1) for name in (
    "checkpoint.verify:problem_of", "checkpoint.load:check_metadata", "checkpoint.load:_read+", "checkpoint.load:put_weights+", "metrics.jsonl:_keep_up_to",
    "metrics.jsonl:_keep_up_to+", "metrics.jsonl:JsonlWriter._append",
)]  # fmt: skip
Aim = tuple[str, int] | None


def _aims(draw: random.Random) -> Iterator[list[Aim]]:
    """Of each run, where it is killed: None stands for a random time."""
    steps, saves, starts = ([_shuffled(places, draw) for places in (_STEP, _SAVE, _START)][kind] for kind in range(3))
    while True:
        chosen = [next(saves), None, next(starts), next(steps), next(starts), None, next(saves), next(saves), None, next(steps)]
        # The first kill is late enough for a checkpoint to be there, so that all others find something to go on from.
        yield [None if aim is None else (aim[0], draw.randint(1 if number else aim[1] // 2 + 1, aim[1])) for number, aim in enumerate(chosen)]


def _shuffled(places: list[tuple[str, int]], draw: random.Random) -> Iterator[tuple[str, int]]:
    while True:
        yield from draw.sample(places, len(places))


def killed(start: Callable[[Path, Aim], Child], wrong: Callable[[Path], str | None], aims: Iterator[list[Aim]], wanted: int, place: Path) -> Outcome:
    """Kill run after run until so many kills are done.

    Args:
        start: one start of a run in a folder, that dies at its aim.
        wrong: how a run that has come to its end differs from an undisturbed one.
    """
    outcome, draw, number = Outcome(), random.Random(0), 0
    span = _seconds(start, place)
    kinds, offered, reached = {"aimed": 0, "random": 0}, Counter[str](), set[str]()
    while outcome.tried < wanted:
        number += 1
        root, done, code = place / f"run-{number}", list[str](), 0
        for aim in next(aims)[: wanted - outcome.tried]:
            child = start(root, aim)
            offered.update([aim[0]] if aim else [])
            if aim is None:
                time.sleep(draw.uniform(0, span))
                child.kill()
            code = warm().ended(child) or 0
            if code == -signal.SIGKILL:
                kinds["random" if aim is None else "aimed"] += 1
                reached.update([aim[0]] if aim else [])
                done.append("random" if aim is None else "{} ({})".format(*aim))
            else:  # it was faster than the kill, or cannot go on
                break
        if code in (0, -signal.SIGKILL):
            child = start(root, None)
            code = warm().ended(child) or 0
        failure = wrong(root) if code == 0 else f"a start ended with {code}: {child.said.read_text()[-400:].strip()}"
        for _ in done if failure is None else done or ["nothing"]:
            outcome.add(None if failure is None else f"{failure}, after kills at {', '.join(done) or 'no place'}")
        shutil.rmtree(root, ignore_errors=True)
        if number > 4 * wanted:
            raise RuntimeError("the runs are faster than the kills")
    if not outcome.lost:  # the suite would believe to have tried what it has not
        outcome.lost = [f"no process came to {name}" for name, count in offered.items() if count >= _OFTEN and name not in reached]
    outcome.note = f"{kinds['aimed']} aimed, {kinds['random']} at random times, over {number} runs"
    return outcome


def _seconds(start: Callable[[Path, Aim], Child], place: Path) -> float:
    """How long a run takes here that nobody kills."""
    started = time.monotonic()
    warm().ended(start(place / "measured", None))
    return time.monotonic() - started


# ------------------------------------------------------------------------------------------------------------------------------- our runs


def of_our_run(folder: Path, short: bool) -> Outcome:
    with in_memory(folder) as place:
        for background in (False, True):
            settings = merged(SETTINGS, _SETTINGS, {"checkpoint": {"background": background}})
            (place / f"{background}.yaml").write_text(json.dumps(settings), encoding="utf-8")
        whole_dir = place / "whole"
        warm().run("run_bodies:undisturbed", merged(SETTINGS, _SETTINGS, {"run_dir": str(whole_dir)}), folder=place)
        whole, steps = warm().run("run_bodies:looks", str(whole_dir), folder=place), _steps(whole_dir)
        starts = [0]

        def start(root: Path, aim: Aim) -> Child:
            starts[0] += 1
            settings = place / f"{root.name}.yaml"
            settings.write_text(json.dumps(merged(json.loads((place / f"{starts[0] % 2 == 0}.yaml").read_text()), {"run_dir": str(root)})))
            return warm().start("run_bodies:run_command", str(settings), *(aim or ()), folder=place)

        def wrong(root: Path) -> str | None:
            found = _steps(root)
            if found != steps:
                return f"the records differ: steps {[step['step'] for step in found]}, or their numbers"
            if warm().run("run_bodies:looks", str(root), folder=place) != whole:
                return "the last checkpoint differs"
            status = json.loads((root / "run_status.json").read_text())
            return None if (status["status"], status["exit_code"]) == ("done", 0) else f"run_status.json says {status}"

        return killed(start, wrong, _aims(random.Random(1)), _KILLS_SHORT if short else _KILLS, place)


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock, of every record of a step."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "seconds", "tokens_per_second", "tflops_per_device", "mfu", "data_wait_share", "memory_bytes")
    return [{name: value for name, value in record.items() if name not in clock} for record in found if record["kind"] == "step"]


# ------------------------------------------------------------------------------------------------------------------------------- control


def of_a_naive_run(folder: Path, short: bool) -> Outcome:
    """The control saves in place: it must not come through this."""
    with in_memory(folder) as place:
        aims = iter(lambda: [("run_bodies:naive_write", 4), ("run_bodies:naive_save", 2), None, ("run_bodies:naive_write+", 3)], None)

        def start(root: Path, aim: Aim) -> Child:
            return warm().start("run_bodies:naive_run", str(root), _STEPS, *(aim or ()), folder=place)

        return killed(start, lambda root: None, aims, _KILLS_SHORT if short else 20, place)


FAULTS = [
    Fault("kill -9 of a run, aimed and random, with a resume each", of_our_run),
    Fault("kill -9 of a naive run", of_a_naive_run, is_control=True),
]
