"""Ranks that are stopped, killed, hung or refused, in every phase: how the job ends, what it says, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_ranks import Job, Launcher, alive, children
from torch.distributed import TCPStore
from training_bodies import records

from megatron_skywork.convert.files.marker import check_marker

POINTS = ["groups", "model", "data", "evaluation", "step", "save", "end"]
BEFORE_THE_FIRST_STEP = ["groups", "model", "data"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


def _settings(point: str) -> list[str]:
    return {
        "evaluation": ["train.steps=1000", "train.eval_every=2"],
        "save": ["train.steps=1000", "checkpoint.every=2"],
        "end": ["train.steps=2"],
    }.get(point, ["train.steps=1000"])


def _saved_steps(job: Job) -> list[int]:
    folders = sorted((job.run_dir / "checkpoints").glob("step_*"))
    for folder in folders:
        check_marker(folder)  # whole, or an error
    return [int(folder.name.removeprefix("step_")) for folder in folders]


# --------------------------------------------------------------------------------------------------------------------------- signals

few = {("groups", signal.SIGTERM), ("evaluation", signal.SIGUSR2), ("step", signal.SIGINT), ("save", signal.SIGTERM)}
matrix = [pytest.param(point, number, marks=[] if (point, number) in few else [pytest.mark.faults]) for point in POINTS for number in SIGNALS]


@pytest.mark.parametrize(("point", "number"), matrix)
def test_a_signal_in_any_phase_loses_nothing(launcher: Launcher, tmp_path: Path, point: str, number: signal.Signals) -> None:
    seconds = 30.0 if point in BEFORE_THE_FIRST_STEP else 0.5
    job = launcher.start(tmp_path / "run", *_settings(point), fault=(point, 0, "sleep", seconds))
    job.reach()
    job.signal(number)
    codes, status = job.ends(), job.status()
    if point == "end":
        assert (codes, status["status"], status["exit_code"]) == ([0, 0], "done", 0), job.log()
        return
    assert (codes, status["status"], status["exit_code"], status["reason"]) == ([75, 75], "stopped", 75, number.name), job.log()
    if point in BEFORE_THE_FIRST_STEP:
        assert "before the first step" in job.log() and status["step"] is None
        assert not (job.run_dir / "checkpoints").exists()
    else:
        # The step that was running, and no other: 3 where it was met in its third, 2 in what follows the second.
        assert status["step"] == {"step": 3, "evaluation": 2, "save": 2}[point]
        assert _saved_steps(job) == [status["step"]]
        assert [record["step"] for record in records(job.run_dir)] == list(range(1, status["step"] + 1))
    assert not any(map(alive, job.processes))


def test_a_signal_to_one_rank_stops_all(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path / "run", "train.steps=1000", fault=("data", 0, "sleep", 30.0))
    job.reach()
    os.kill(job.processes[0], signal.SIGTERM)
    assert job.ends() == [75, 75] and job.status()["status"] == "stopped", job.log()


def test_a_second_interrupt_ends_at_once(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path / "run", "train.steps=1000", world=1, fault=("step", 0, "sleep", 60.0))
    job.reach()
    job.signal(signal.SIGINT)
    time.sleep(0.3)
    job.signal(signal.SIGINT)
    codes = job.ends()
    assert codes[0] not in (0, 75) and job.status()["status"] == "failed", job.log()
    assert not (job.run_dir / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------------------------------ exit codes


def test_exit_codes_and_the_status_agree(launcher: Launcher, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for code, status, overrides, fault in (
        (0, "done", ["train.steps=1"], ()),
        (2, "failed", ["train.steps=none"], ()),
        (2, "failed", ["model.backend=te", "resume.mode=auto"], ()),
        (3, "failed", ["checkpoint.init_from=/nowhere", f"run_dir={run_dir}/other"], ()),
        (75, "stopped", ["train.steps=100000", "resume.allow_change=[train.steps]", "train.time_limit_seconds=0.5"], ()),
        (1, "failed", ["train.steps=100000"], ("step", 0, "raise", 0)),
    ):
        job = launcher.start(run_dir, *overrides, world=1, fault=fault)
        assert job.ends() == [code], job.log()
        found = json.loads((run_dir / ("other" if code == 3 else "") / "run_status.json").read_text())
        assert (found["exit_code"], found["status"]) == (code, status)


def test_one_refused_rank_ends_all_with_its_code(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path / "run", "train.steps=1000", fault=("data", 1, "refuse", 0))
    assert job.ends() == [3, 3], job.log()
    assert (job.status()["exit_code"], job.status()["reason"]) == (3, "a checkpoint is refused by the test")
    assert not (job.run_dir / "stacks").exists()


def test_what_torchrun_sees(launcher: Launcher, tmp_path: Path) -> None:
    """75 must not look like a failure to it, a refusal must; and ranks that it starts again find out that there is nothing to try."""
    torchrun = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
    stopped = launcher.start(tmp_path / "stopped", "train.steps=100000", "train.time_limit_seconds=0.5", world=1, **torchrun)
    assert stopped.ends() == [0] and stopped.status()["exit_code"] == 75, stopped.log()
    refused = launcher.start(tmp_path / "refused", "checkpoint.init_from=/nowhere", world=1, **torchrun)
    assert refused.ends() == [3], refused.log()
    for job, code, overrides in ((stopped, 0, ["train.steps=100000"]), (refused, 3, [])):
        before = job.status()
        again = launcher.start(job.run_dir, *overrides, world=1, **{**torchrun, "TORCHELASTIC_RESTART_COUNT": "1"})
        assert again.ends() == [code] and "not tried again" in again.log()
        assert job.status() == before
    # A new start is tried, under the same name too, and so is what failed for another reason.
    for count in "0", "1":
        variables = {**torchrun, "TORCHELASTIC_RESTART_COUNT": count}
        anew = launcher.start(stopped.run_dir, "train.steps=100000", world=1, fault=("model", 0, "raise", 0), **variables)
        assert anew.ends() == [1] and anew.status()["torchrun"]["restart"] == int(count)


# ------------------------------------------------------------------------------------------------------------------ lost and hung ranks


def _wait_for_end(job: Job) -> tuple[list[int], str]:
    codes = job.ends()
    assert not any(map(alive, job.processes))
    assert (job.status()["status"], job.status()["exit_code"]) == ("failed", 1), job.log()
    return codes, job.status()["reason"]


def _stacks(job: Job, rank: int) -> str:
    return "".join(path.read_text() for path in (job.run_dir / "stacks").glob(f"rank_{rank}_*"))


hung = [pytest.param(action, "step") for action in ("sleep", "gil", "stop")]
hung += [pytest.param("sleep", point, marks=pytest.mark.faults) for point in POINTS if point != "step"]
hung += [pytest.param(action, point, marks=pytest.mark.faults) for action in ("gil", "stop") for point in ("evaluation", "save", "model")]


@pytest.mark.parametrize(("action", "point"), hung)
def test_a_hung_rank_ends_the_job_and_is_named(launcher: Launcher, tmp_path: Path, action: str, point: str) -> None:
    """Only the limit of its own phase is short: another one's must not be what ends it."""
    phase = "start" if point in BEFORE_THE_FIRST_STEP else "save" if point == "end" else point
    limit = 10 if point == "end" else 4
    limits = [f"watchdog.{name}_seconds={limit if name == phase else 300}" for name in ("start", "step", "evaluation", "save")]
    # As under torchrun, a process that is no rank holds the store: also those that never come to the rendezvous are known.
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    job = launcher.start(tmp_path / "run", *_settings(point), *limits, fault=(point, 1, action, 200.0), **agent)
    if point == "end":
        assert job.ends() == [0, 0] and job.status()["status"] == "done"  # all was saved; only the way out hangs
        return
    job.reach()
    codes, reason = _wait_for_end(job)
    step = {"step": 2, "evaluation": 2, "save": 2}.get(point)
    if point == "groups":
        assert codes == [1, 1] and reason.startswith("rank 0 on ") and "phase start (waits for ranks 1)" in reason, reason
        return
    assert codes[0] == 1 and f"process {job.processes[1]})" in reason and reason.startswith("rank 1 on "), reason
    assert f"in phase {phase} with a limit of 4 s" in reason, reason
    assert job.status()["rank"] == 1
    if action == "sleep":  # the others cannot tell where they were, only where they said that they were, up to a second before
        assert (job.status()["phase"], job.status()["step"]) == (phase, step)
        assert f"; phase {phase}" in reason and ("no step was done" if step is None else f"last step {step}") in reason, reason
    for rank in 0, 1:
        assert "Thread 0x" in _stacks(job, rank) and "most recent call first" in _stacks(job, rank), f"no stack of rank {rank}; {job.log()}"
    assert "fault_ranks.py" in _stacks(job, 1) or action == "stop"


def test_a_killed_rank_ends_the_job(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path / "run", "train.steps=1000", fault=("step", 1, "kill", 0))
    codes, reason = _wait_for_end(job)
    assert codes == [1, -signal.SIGKILL]
    assert reason.startswith("rank 1 on ") and "has died; phase " in reason and "Thread 0x" in _stacks(job, 0)


def test_the_first_rank_killed_with_the_store_it_holds(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path / "run", "train.steps=1000", fault=("step", 0, "kill", 0))
    codes, reason = _wait_for_end(job)
    assert codes == [-signal.SIGKILL, 1] and "rank 0 on" in reason and "has died" in reason, reason


def test_a_failure_is_told_by_the_rank_that_had_it(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path / "run", "train.steps=1000", fault=("step", 1, "raise", 0))
    codes, reason = _wait_for_end(job)
    assert codes == [1, 1] and reason.startswith("rank 1 on ") and reason.endswith("a fault of the test") and "last step 2" in reason
    assert "RuntimeError: a fault of the test" in job.log()


def test_a_slow_first_step_is_no_hang_and_the_watchdog_can_be_turned_off(launcher: Launcher, tmp_path: Path) -> None:
    slow = ["train.steps=2", "watchdog.step_seconds=1", "checkpoint.save_at_end=false"]
    assert launcher.start(tmp_path / "a", *slow, world=1, fault=("first step", 0, "sleep", 2.5)).ends() == [0]
    assert launcher.start(tmp_path / "b", *slow, "watchdog.start_seconds=1", world=1, fault=("first step", 0, "sleep", 2.5)).ends() == [1]
    off = ["watchdog.start_seconds=1", "watchdog.enabled=false"]
    assert launcher.start(tmp_path / "c", *slow, *off, world=1, fault=("first step", 0, "sleep", 2.5)).ends() == [0]


# ------------------------------------------------------------------------------------------------------------------------- no orphans


def _gone(processes: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


def test_nothing_outlives_a_killed_launcher(tmp_path: Path) -> None:
    launcher = Launcher()
    job = launcher.start(tmp_path / "run", "train.steps=1000", "data.num_workers=2", fault=("step", -1, "sleep", 300.0), TORCHELASTIC_RUN_ID="a")
    job.wait_for(lambda: all(len(children(process)) >= 2 for process in job.processes))
    job.reach()
    family = [*job.processes, *(child for process in job.processes for child in children(process))]
    launcher.process.kill()
    launcher.process.wait()
    assert len(family) >= 6 and _gone(family), [Path(f"/proc/{process}/cmdline").read_text() for process in family if alive(process)]


def test_loader_processes_die_with_their_rank_and_the_next_start_says_so(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path / "run", "train.steps=1000", "data.num_workers=2", world=1, fault=("step", 0, "sleep", 300.0))
    job.reach()
    family = [*job.processes, *children(job.processes[0])]
    job.signal(signal.SIGKILL)
    assert len(family) >= 3 and job.ends() == [-signal.SIGKILL] and _gone(family)
    assert job.status()["status"] == "running" and job.status()["process"] == job.processes[0]
    again = launcher.start(job.run_dir, "train.steps=1", world=1)
    assert again.ends() == [0]
    sentence = f"process {job.processes[0]} on {os.uname().nodename}"
    assert sentence in again.log() and "ended without a word" in again.log()
    assert [event["event"] for event in records(job.run_dir, "event")][:2] == ["restart", "warning"]
