"""Two runs on one folder: the second is refused on all its ranks and told who holds it; an owner that is dead is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool

from megatron_skywork import lifeline
from megatron_skywork.errors import EXIT_REFUSED, CheckpointError, ConfigError
from megatron_skywork.train import run_lock
from megatron_skywork.train.run_lock import FILE_NAME, RunLock, identity, is_dead


def take(run_dir: str, variables: dict[str, str], stale_seconds: float) -> str:
    """Take the folder and leave it again; says who held it meanwhile, or why not."""
    import torch

    os.environ.update(variables)
    before, run_lock.STALE_SECONDS = run_lock.STALE_SECONDS, stale_seconds
    lock = RunLock(Path(run_dir), torch.distributed.get_rank() == 0)
    try:
        lock.take()
        lock.agree()
    except (CheckpointError, ConfigError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    finally:
        run_lock.STALE_SECONDS = before
        for name in variables:
            del os.environ[name]
    torch.distributed.barrier()
    held = json.loads((Path(run_dir) / FILE_NAME).read_text())
    torch.distributed.barrier()
    lock.release()
    return f"held by {held['process']}"


def owned(run_dir: Path, **fields: Any) -> Path:
    """A lock that somebody else has made."""
    path = run_dir / FILE_NAME
    path.write_text(json.dumps({**identity(), "host": "first-host", "token": "theirs", **fields}))
    return path


def test_a_live_owner_refuses_all_ranks_and_a_dead_one_none(ranks: RankPool, tmp_path: Path) -> None:
    answers = ranks.run(2, take, str(tmp_path), {}, 60.0)
    assert answers[0] == answers[1] and answers[0].startswith("held by") and not list(tmp_path.iterdir())

    owner = subprocess.Popen(["sleep", "300"])
    try:
        owned(tmp_path, process=owner.pid, process_start=lifeline.birth(owner.pid))
        answers = ranks.run(2, take, str(tmp_path), {}, 0.0)  # no sign of life is asked for where the process can be seen
        assert answers[0] == answers[1] and f"process {owner.pid} on host first-host" in answers[0] and answers[0].startswith("CheckpointError")
        assert json.loads((tmp_path / FILE_NAME).read_text())["token"] == "theirs"
        owned(tmp_path, process=owner.pid, process_start="17")  # the number was given to another process since
        assert ranks.run(2, take, str(tmp_path), {}, 60.0)[1].startswith("held by")
        owned(tmp_path, process=owner.pid, process_start=lifeline.birth(owner.pid))
    finally:
        owner.kill()
        owner.wait()
    assert ranks.run(2, take, str(tmp_path), {}, 60.0)[1].startswith("held by")
    assert not list(tmp_path.iterdir())

    (tmp_path / "file").write_text("")
    answers = ranks.run(2, take, str(tmp_path / "file"), {}, 60.0)
    assert answers[0] == answers[1] and answers[0].startswith("ConfigError: run_dir=") and "cannot be written" in answers[0]


def test_an_owner_on_another_machine_lives_as_long_as_it_shows(ranks: RankPool, tmp_path: Path) -> None:
    path, ended = owned(tmp_path, machine="another boot"), threading.Event()

    def show_life() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    beat = threading.Thread(target=show_life)
    beat.start()
    try:
        assert "on host first-host" in ranks.run(2, take, str(tmp_path), {}, 60.0)[1]
    finally:
        ended.set()
        beat.join()
    assert ranks.run(2, take, str(tmp_path), {}, 0.5)[1].startswith("held by")

    # A job that was requeued runs nowhere else any more: no waiting.
    path = owned(tmp_path, machine="another boot", job="77", restarts="0")
    assert ranks.run(2, take, str(tmp_path), {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, 1e9)[1].startswith("held by")
    # What a killed process left beside the lock is cleared away, what one that is looking now has there is not.
    for name, age in ((".run.lock.old.tmp", 1000), (".run.lock.new.tmp", 0)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert ranks.run(2, take, str(tmp_path), {}, 500.0)[1].startswith("held by")
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock.new.tmp"]
    # Nobody waits for what cannot be read for longer than for a silent owner.
    path.write_text("{")
    assert ranks.run(2, take, str(tmp_path), {}, 0.5)[1].startswith("held by")


def test_the_rules_of_death() -> None:
    me = {"machine": "here", "job": "77", "restarts": "1"}
    there = {"machine": "there", "job": None, "restarts": "0"}
    assert is_dead(there, 121.0, me) and not is_dead(there, 119.0, me)
    assert not is_dead({**there, "job": "77", "restarts": "1"}, 1.0, me), "two runs of one job are two runs"
    assert is_dead({**there, "job": "77"}, 1.0, me) and not is_dead({**there, "job": "78"}, 1.0, me)
    alive = {"machine": "here", "process": os.getpid(), "process_start": lifeline.birth(os.getpid())}
    assert not is_dead(alive, 1e9, me), "a process that can be seen is believed, however long its machine stood still"


@pytest.mark.parametrize("attempt", range(10))
def test_of_many_that_find_a_dead_owner_one_gets_the_folder(tmp_path: Path, attempt: int) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owned(tmp_path, process=dead.pid)
    locks = [RunLock(tmp_path, True) for _ in range(12)]
    start = threading.Barrier(len(locks))

    def race(lock: RunLock) -> bool:
        start.wait()
        try:
            lock._take()
        except CheckpointError:
            return False
        return True

    with ThreadPoolExecutor(len(locks)) as pool:
        won = list(pool.map(race, locks))
    assert won.count(True) == 1 and [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_an_owner_that_was_taken_over_ends_and_leaves_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    gone = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        gone.set()

    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(run_lock.os, "_exit", end)
    lock = RunLock(tmp_path, True)
    lock._take()
    first_sign = (tmp_path / FILE_NAME).stat().st_mtime_ns
    lock._beat.start()
    deadline = threading.Event()
    while (tmp_path / FILE_NAME).stat().st_mtime_ns == first_sign:
        deadline.wait(0.01)
    (tmp_path / FILE_NAME).unlink()  # by hand: it comes back
    while not (tmp_path / FILE_NAME).exists():
        deadline.wait(0.01)
    assert not codes
    other = owned(tmp_path)
    assert gone.wait(60) and set(codes) == {EXIT_REFUSED}
    lock.release()
    assert json.loads(other.read_text())["token"] == "theirs"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_who_is_still_watching_an_owner(tmp_path: Path, number: signal.Signals) -> None:
    owned(tmp_path, machine="another boot")
    script = "import sys; from pathlib import Path; from megatron_skywork.train import run_lock, signals"
    script += "; signals.hold(); run_lock.RunLock(Path(sys.argv[1]), True).take()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    watcher = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, env=environment)
    try:
        assert watcher.stderr is not None and b"looking whether" in watcher.stderr.readline()
        watcher.send_signal(number)
        assert watcher.wait(timeout=30) == -number
    finally:
        watcher.kill()
        watcher.communicate()
    assert json.loads((tmp_path / FILE_NAME).read_text())["token"] == "theirs"
