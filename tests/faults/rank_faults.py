"""Ranks that hang or are killed, in each phase of a run, and a launcher that is: the job ends everywhere, says which rank it was and where, leaves no process
behind, and the same command goes on from the last checkpoint to the losses of a run that nothing happened to.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

from fault import Fault, Outcome

POINTS = ("groups", "model", "data", "step", "evaluation", "save")
LIMIT_SECONDS = 4
# All phases in three pairs of steps, each pair with an evaluation and a save at its end; a fault in a step is met in the third.
WHOLE = ("train.steps=6", "train.eval_every=2", "checkpoint.every=2")
STEPS = 6


@functools.cache
def _launcher() -> Any:
    """The one that forks the ranks of all rows but those in which it is killed."""
    from fault_ranks import Launcher

    launcher = Launcher()
    atexit.register(launcher.close)
    return launcher


@functools.cache
def _agent_store() -> Any:
    """As under torchrun, a process that is no rank holds the store: then also those are known that never come to the rendezvous."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def _phase(point: str) -> str:
    return "start" if point in ("groups", "model", "data") else point


def _limits(point: str, seconds: int) -> list[str]:
    """A short limit for the fault's own phase; another one's must not be what ends it."""
    return [f"watchdog.{name}_seconds={seconds if name == _phase(point) else 300}" for name in ("start", "step", "evaluation", "save")]


def _agent(number: int) -> dict[str, str]:
    return {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(_agent_store().port), "TORCHELASTIC_RUN_ID": f"fault {number}"}


def _undisturbed(folder: Path) -> list[float]:
    from training_bodies import losses

    job = _launcher().start(folder / "undisturbed", *WHOLE)
    if job.ends() != [0, 0]:
        raise RuntimeError(f"the run that nothing happens to: {job.log()}")
    return losses(job.run_dir)


def _next_start(launcher: Any, run_dir: Path, expected: list[float]) -> str | None:
    """The same command again, without the fault."""
    from training_bodies import losses, records

    again = launcher.start(run_dir, *WHOLE)
    codes = again.ends()
    if codes != [0, 0] or again.status()["status"] != "done":
        return f"the next start ended with {codes}: {again.log()[-800:]}"
    if [record["step"] for record in records(run_dir)] != list(range(1, STEPS + 1)) or losses(run_dir) != expected:
        return f"the next start came to other losses: {losses(run_dir)} instead of {expected}"
    return None


def _ended(job: Any, rank: int, point: str) -> str | None:
    """What is wrong with the words and the remains of a job of two that has ended since `rank` did not go on."""
    from fault_ranks import alive

    status = job.status()
    reason = str(status.get("reason"))
    if any(map(alive, job.processes)):
        return "ranks are left"
    if (status["status"], status["exit_code"]) != ("failed", 1):
        return f"the status is {status}"
    # Who has never come to the rendezvous is named by those who wait for it.
    named = reason.startswith(f"rank {rank} on ") or f"waits for ranks {rank}" in reason
    if not named or f"phase {_phase(point)}" not in reason:
        return f"said to be {reason!r}"
    return None


def _hang(number: int, folder: Path, rank: int, action: str, point: str, expected: list[float] | None) -> tuple[str | None, float]:
    """What was lost, and how long after the limit the job was over."""
    run_dir = folder / f"{number}"
    job = _launcher().start(run_dir, *WHOLE, *_limits(point, LIMIT_SECONDS), fault=(point, rank, action, 600.0), **_agent(number))
    job.reach()
    started = time.monotonic()
    if point == "groups" and action != "sleep":
        # Before the rendezvous nobody knows the process, and it cannot end itself. The others end; then the launcher ends it, here as torchrun would.
        _launcher().code_of(job.processes[1 - rank], job)
        os.kill(job.processes[rank], signal.SIGKILL)
    codes = job.ends()
    late = time.monotonic() - started - LIMIT_SECONDS
    failure = _ended(job, rank, point)
    if failure is None and 0 in codes:
        failure = f"ended with {codes}"
    if failure is None and not any(path.name.startswith(f"rank_{1 - rank}_") for path in (run_dir / "stacks").glob("*")):
        failure = f"no stack of rank {1 - rank}"
    if failure is None and expected is not None:
        failure = _next_start(_launcher(), run_dir, expected)
    return failure, late


def hung_ranks(folder: Path, short: bool) -> Outcome:
    """Asleep, in a loop that never gives up the interpreter, or stopped by a signal."""
    cases = [(1, action, point) for point in POINTS for action in ("sleep", "gil", "stop")] + [(0, "sleep", "step"), (0, "stop", "save")]
    expected = None if short else _undisturbed(folder)
    outcome, latest = Outcome(), 0.0
    for number, (rank, action, point) in enumerate([(1, "gil", "step")] if short else cases):
        failure, late = _hang(number, folder, rank, action, point, expected)
        latest = max(latest, late)
        outcome.add(f"rank {rank}, {action} in {point}: {failure}" if failure else None)
    outcome.note = f"over at most {latest:.1f} s after the limit"
    return outcome


def killed_ranks(folder: Path, short: bool) -> Outcome:
    """SIGKILL."""
    from fault_ranks import alive

    cases = [(rank, point) for point in POINTS for rank in (0, 1)]
    expected = None if short else _undisturbed(folder)
    outcome = Outcome()
    for number, (rank, point) in enumerate([(1, "step")] if short else cases):
        run_dir = folder / f"{number}"
        # Without a connection to a rank that died before the rendezvous, the limit of the start ends the wait.
        limits = _limits(point, 10 if point == "groups" else 300)
        job = _launcher().start(run_dir, *WHOLE, *limits, fault=(point, rank, "kill", 0), **_agent(100 + number))
        job.reach()
        codes = job.ends()
        failure = None
        if codes[rank] != -signal.SIGKILL or codes[1 - rank] in (0, 75) or any(map(alive, job.processes)):
            failure = f"ended with {codes}"
        reason = str(job.status().get("reason"))
        if failure is None and f"rank {rank} on " not in reason and f"waits for ranks {rank}" not in reason:
            failure = f"said to be {reason!r}"
        if failure is None and expected is not None:
            failure = _next_start(_launcher(), run_dir, expected)
        outcome.add(f"rank {rank} in {point}: {failure}" if failure else None)
    return outcome


def killed_launcher(folder: Path, short: bool) -> Outcome:
    """SIGKILL to the process that started the ranks, while they are in a phase, with processes of the data loader below them."""
    from fault_ranks import Launcher, alive, children

    expected = _undisturbed(folder)
    outcome, workers = Outcome(), "data.num_workers=1"
    for number, point in enumerate(("model", "step", "evaluation", "save")):
        launcher = Launcher()
        job = launcher.start(folder / str(number), *WHOLE, workers, fault=(point, -1, "sleep", 600.0), TORCHELASTIC_RUN_ID="fault")
        try:
            job.reach()
            if point in ("step", "save"):
                job.wait_for(lambda job=job: all(children(process) for process in job.processes))
            time.sleep(0.5)
            family = [*job.processes, *(child for process in job.processes for child in children(process))]
            launcher.process.kill()
            launcher.process.wait()
            deadline = time.monotonic() + 5
            while any(map(alive, family)) and time.monotonic() < deadline:
                time.sleep(0.05)
            left = [process for process in family if alive(process)]
            for process in left:
                os.kill(process, signal.SIGKILL)
        finally:
            launcher.close()
        failure = f"{len(left)} of {len(family)} processes are left after 5 s" if left else None
        if failure is None:
            failure = _next_start(_launcher(), job.run_dir, expected)
        outcome.add(f"{point}: {failure}" if failure else None)
    return outcome


def unwatched_ranks(folder: Path, short: bool) -> Outcome:
    """The same hangs with watchdog.enabled=false: at twice the time that ends a watched job, the ranks still wait for each other."""
    from fault_ranks import alive

    outcome = Outcome(note="waits on")
    for number, (action, point) in enumerate([("sleep", "step"), ("stop", "step"), ("sleep", "evaluation"), ("stop", "save")]):
        off = "watchdog.enabled=false"
        job = _launcher().start(folder / str(number), *WHOLE, *_limits(point, LIMIT_SECONDS), off, fault=(point, 1, action, 600.0), **_agent(200 + number))
        job.reach()
        time.sleep(2 * (LIMIT_SECONDS + 5))
        waiting = sum(map(alive, job.processes))
        outcome.add(f"{action} in {point}: {waiting} ranks" if waiting == 2 else None)
        for process in job.processes:
            if alive(process):
                os.kill(process, signal.SIGKILL)
        job.ends()
    return outcome


FAULTS = [
    Fault("a rank that hangs, in each phase", hung_ranks),
    Fault("a rank that is killed, in each phase", killed_ranks),
    Fault("the launcher killed", killed_launcher, in_short=False),
    Fault("control: the same hangs without the watchdog", unwatched_ranks, is_control=True, in_short=False),
]
