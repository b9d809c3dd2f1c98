"""What the watchdog decides, without ranks: whom to name, how long a phase may take, what a status means, and whether a save fits into the grace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_skywork import lifeline
from megatron_skywork.config.schema import Watchdog as Settings
from megatron_skywork.errors import ConfigError
from megatron_skywork.train import grace, phases, status
from megatron_skywork.train.ring import Ring, culprits
from megatron_skywork.train.watchdog import limits


def _beat(changes: int, waiting: bool = False, left: bool = False) -> dict:
    return {"changes": changes, "waiting": waiting, "left": left}


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        ([_beat(7, waiting=True), _beat(6), _beat(7, waiting=True)], [1]),  # behind
        ([_beat(7, waiting=True), _beat(7), _beat(7, waiting=True)], [1]),  # in the same part, and the only one outside of a collective
        ([_beat(7, waiting=True), _beat(6, waiting=True), _beat(8)], [1]),  # behind, though it waits: perhaps in a group of its own
        ([_beat(7), _beat(7)], [0, 1]),
        ([_beat(7, waiting=True), None, _beat(6)], [1]),  # never came up
        ([_beat(7, waiting=True), _beat(3, left=True), _beat(7)], [2]),  # one that has left in order is waited for by nobody
        ([_beat(7, waiting=True), _beat(7, waiting=True)], [0, 1]),
    ],
)
def test_the_rank_the_others_wait_for(beats: list, named: list[int]) -> None:
    assert culprits(beats) == named


def test_whom_a_rank_watches() -> None:
    def watched(rank: int, world: int, local_rank: int, local_size: int) -> set[int]:
        variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
        return set(Ring(dict, {name: str(value) for name, value in variables.items()})._watched)

    assert watched(0, 1, 0, 1) == set()
    assert watched(0, 2, 0, 2) == {1}
    assert watched(3, 8, 3, 4) == {4, 0}  # the last of its host: the next host's first, and its own host's
    assert watched(7, 8, 3, 4) == {0, 4}
    # Every rank is watched from another host or its own, and by its own host where there is another rank.
    assert {target for rank in range(8) for target in watched(rank, 8, rank % 4, 4)} == set(range(8))
    for host in 0, 1:
        assert {target for rank in range(4 * host, 4 * host + 4) for target in watched(rank, 8, rank % 4, 4)} >= set(range(4 * host, 4 * host + 4))


def test_each_phase_has_its_limit_and_the_first_step_may_compile() -> None:
    settings = Settings(start_seconds=100.0, step_seconds=10.0, evaluation_seconds=20.0, save_seconds=30.0)
    assert limits(settings) == {"start": 100.0, "first step": 100.0, "step": 10.0, "evaluation": 20.0, "save": 30.0, "load": 100.0, "end": 30.0}
    assert limits(Settings(start_seconds=1.0, step_seconds=10.0))["first step"] == 10.0
    from megatron_skywork.parallel import group_timeout

    assert group_timeout(settings).total_seconds() > max(limits(settings).values())


def test_phases_follow_a_run() -> None:
    told = phases.Phases()
    seen = [told.now]
    told.part("data")
    seen.append(told.now)
    with told.during(phases.EVALUATION, 0):
        seen.append(told.now)
    seen.append(told.now)
    told.step(1)
    seen.append(told.now)
    told.part("optimizer")
    seen.append(told.now)
    told.step(2)
    with told.during(phases.SAVE, 2):
        seen.append(told.now)
    seen.append(told.now)
    told.end()
    seen.append(told.now)
    assert [(moment.phase, moment.part, moment.step) for moment in seen] == [
        ("start", "imports", None), ("start", "data", None), ("evaluation", "", 0), ("start", "", 0), ("first step", "", 0), ("first step", "optimizer", 0),
        ("save", "", 2), ("step", "", 2), ("end", "", 2),
    ]  # fmt: skip
    changes = [moment.changes for moment in seen]
    assert changes == sorted(set(changes))


# ------------------------------------------------------------------------------------------------------------------------------ status


def test_what_a_rank_waits_for_puts_it_ahead_of_nobody() -> None:
    told = phases.Phases()
    told.part("process groups")
    before = told.now
    told.waits("waits for ranks 1")
    assert told.now == before._replace(part="waits for ranks 1")


def test_the_first_end_of_a_run_stands(tmp_path: Path) -> None:
    mine = status.Status(tmp_path, is_writer=True)
    mine.write("running", step=3)
    mine.write("stopped", step=4, exit_code=75)
    mine.write("failed", step=4, exit_code=1)
    assert status.read(tmp_path)["exit_code"] == 75
    other = status.Status(tmp_path, is_writer=False)
    other.write("failed", step=4, exit_code=1)
    other.write("failed", step=4, exit_code=1, for_all=True)
    assert status.read(tmp_path)["exit_code"] == 75
    status.Status(tmp_path, is_writer=True).write("running", step=4)
    other.write("failed", step=4, exit_code=1, for_all=True)
    assert status.read(tmp_path)["exit_code"] == 1


def test_a_start_that_died_is_told_from_one_that_runs(tmp_path: Path) -> None:
    mine = status.Status(tmp_path, is_writer=True)
    mine.write("running", step=3)
    found = status.read(tmp_path)
    assert status.died_silently(found) is None  # it is this process
    assert f"process {os.getpid()} on {socket.gethostname()}" in status.died_silently({**found, "born": found["born"] - 1})  # the number was used again
    assert "on elsewhere" in status.died_silently({**found, "host": "elsewhere"})
    assert status.died_silently({**found, "status": "done"}) is None
    assert status.died_silently(None) is None


def test_a_refused_start_does_not_hide_behind_the_last_one(tmp_path: Path) -> None:
    error = ConfigError("x=1: no")
    status.refuse(str(tmp_path / "new"), error)
    assert not (tmp_path / "new").exists()
    mine = status.Status(tmp_path, is_writer=True)
    mine.write("running", step=3)
    status.refuse(str(tmp_path), error)
    assert status.read(tmp_path)["status"] == "running"  # the run there goes on; a mistyped command is not its end
    mine.write("done", step=3, exit_code=0)
    status.refuse(str(tmp_path), error)
    assert (status.read(tmp_path)["status"], status.read(tmp_path)["exit_code"], status.read(tmp_path)["reason"]) == ("failed", 2, "x=1: no")


def test_what_torchrun_starts_again_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int, restart: str = "1", run: str = "a", **fields: object) -> tuple[int, str] | None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        status.Status(tmp_path, is_writer=True).write("failed", step=1, reason="why", exit_code=code, **fields)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        return status.ended_for_good(tmp_path)

    assert [ended(code) for code in (0, 2, 3, 75)] == [(code, "why") for code in (0, 2, 3, 75)]
    assert ended(1) is None
    assert ended(3, restart="0") is None and ended(3, run="b") is None  # another start, by somebody who wants it
    # A rank that torchrun ends in the start, because another one died, must be tried again.
    assert ended(75, phase="start") is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert status.ended_for_good(tmp_path) is None and status.exit_code(75) == 75
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert [status.exit_code(code) for code in (0, 1, 2, 3, 75)] == [0, 1, 2, 3, 0]


# ------------------------------------------------------------------------------------------------------------------------------- grace


def test_a_save_that_takes_more_than_half_of_the_grace_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"kind": "event", "event": "save", "step": 1, "seconds": 1.0},
        {"kind": "step", "step": 2, "note": "save", "seconds": 99.0},
        {"kind": "event", "event": "save", "step": 2, "seconds": 40.0},
    ]
    assert grace.last_save_seconds(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines) + '{"kind":"event","event":"save","sec')
    assert grace.last_save_seconds(tmp_path) == 40.0
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert grace.grace_seconds(None) == 30.0 and grace.grace_seconds(7.0) == 7.0
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "270")
    assert grace.grace_seconds(None) == 270.0
    assert grace.warning(40.0, 270.0) is None and grace.warning(None, 1.0) is None
    assert "40 s" in grace.warning(40.0, 70.0) and "train.grace_seconds" in grace.warning(40.0, 70.0)


# ------------------------------------------------------------------------------------------------------------------------------ parents


def _until(what, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


def _run(script: str, **environment: str) -> subprocess.Popen:
    root = str(Path(lifeline.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [environment.pop("path", ""), root]))
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment, "PYTHONPATH": paths})


def test_a_process_dies_with_its_parent_also_when_that_is_gone_already() -> None:
    parent = _run("""
        import os, time
        from megatron_skywork import lifeline
        me = os.getpid()
        if os.fork() == 0:
            lifeline.die_with(me)
            print(os.getpid(), flush=True)
            time.sleep(600)
        time.sleep(600)
    """)
    child = int(parent.stdout.readline())
    born = lifeline.birth(child)
    assert born is not None
    parent.kill()
    parent.communicate()
    assert _until(lambda: lifeline.birth(child) != born)
    late = _run("from megatron_skywork import lifeline; lifeline.die_with(-1); print('alive')")
    assert late.communicate()[0] == "" and late.returncode == -signal.SIGKILL


def test_the_helper_of_wandb_does_not_outlive_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("import time\ndef Settings(**all): print('waiting', flush=True)\ndef init(**all): time.sleep(600)\n")
    (tmp_path / "metrics.jsonl").touch()
    run = _run(
        f"""
        import subprocess, sys, time
        options = "--offset 0 --init-seconds 300 --mode online --project p --id i --name n".split()
        command = [sys.executable, "-m", "megatron_skywork.metrics.wandb_worker", "--metrics", {str(tmp_path / "metrics.jsonl")!r}, *options]
        print(subprocess.Popen(command, stdin=subprocess.PIPE).pid, flush=True)
        time.sleep(600)
        """,
        path=str(tmp_path),
    )
    helper = int(run.stdout.readline())
    born = lifeline.birth(helper)
    assert run.stdout.readline() == "waiting\n" and born is not None
    run.kill()
    run.wait()
    assert _until(lambda: lifeline.birth(helper) != born)
    run.stdout.close()


def test_a_rank_of_another_start_leaves_the_status_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in one folder, both under a torchrun without an id: the refused one must not speak for the other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    status.Status(tmp_path, is_writer=True).write("running", step=4)
    late = status.Status(tmp_path, is_writer=False)
    late._started += 2 * status.ONE_START_SECONDS
    late.write("failed", for_all=True, step=None, exit_code=3)
    assert status.read(tmp_path)["status"] == "running"
    status.Status(tmp_path, is_writer=False).write("failed", for_all=True, step=4, exit_code=1)
    assert status.read(tmp_path)["status"] == "failed"
