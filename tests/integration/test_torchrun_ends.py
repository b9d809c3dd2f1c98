"""torchrun around a run: what it starts again, what it does not, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_ranks import ROOT, SMALL, alive, children

ALL_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def _command(run_dir: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "3"]
    return [*launcher, "--signals-to-handle", ALL_SIGNALS, "launch/pretrain_moe.py", *SMALL, f"run_dir={run_dir}", *overrides]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _run(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(_command(run_dir, *overrides), cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=240)


def _status(run_dir: Path) -> dict:
    return json.loads((run_dir / "run_status.json").read_text())


def _until(what, seconds: float = 240.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return what()


def test_the_time_limit_is_no_failure_to_torchrun(tmp_path: Path) -> None:
    answer = _run(tmp_path / "run", "train.steps=1000000", "train.time_limit_seconds=6")
    assert answer.returncode == 0, answer.stderr[-3000:]
    status = _status(tmp_path / "run")
    assert (status["status"], status["reason"], status["exit_code"], status["torchrun"]["restart"]) == ("stopped", "time limit", 75, 0)
    assert "will restart" not in answer.stderr


def test_what_is_refused_is_not_built_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    answer = _run(tmp_path / "run", "checkpoint.init_from=/nowhere")
    assert answer.returncode != 0
    assert answer.stderr.count("error: ") - answer.stderr.count("configuration error: ") >= 1 and answer.stderr.count("no such checkpoint folder") == 1 + 3
    assert answer.stderr.count("not tried again") == 3, answer.stderr[-3000:]
    assert (_status(tmp_path / "run")["exit_code"], _status(tmp_path / "run")["torchrun"]["restart"]) == (3, 0)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2])
def test_no_rank_outlives_its_agent(tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    command = _command(run_dir, "train.steps=1000000", "data.num_workers=1", "parallel.ep=2", ranks=2)
    agent = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert _until(lambda: (run_dir / "metrics.jsonl").is_file() and '"step":3,' in (run_dir / "metrics.jsonl").read_text())
        ranks = children(agent.pid)
        family = [*ranks, *(child for rank in ranks for child in children(rank))]
        assert len(ranks) == 2 and len(family) >= 4
        agent.send_signal(number)
        agent.wait(timeout=120)
        assert _until(lambda: not any(map(alive, family)), seconds=5)
    finally:
        agent.kill()
    assert _status(run_dir)["status"] == ("running" if number == signal.SIGKILL else "stopped")


@pytest.mark.faults
def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = _command(run_dir, "train.steps=1000000", "checkpoint.every=20", "parallel.ep=2", ranks=2)
    agent = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert _until(lambda: (run_dir / "metrics.jsonl").is_file() and '"event":"save"' in (run_dir / "metrics.jsonl").read_text())
        os.kill(children(agent.pid)[1], signal.SIGKILL)
        assert _until(lambda: '"event":"resume"' in (run_dir / "metrics.jsonl").read_text())
        assert _until(lambda: _status(run_dir)["status"] == "running")
        assert _status(run_dir)["torchrun"]["restart"] == 1
        agent.send_signal(signal.SIGTERM)
        error = agent.communicate(timeout=120)[1]
    finally:
        agent.kill()
    assert "has died" in error
    assert (_status(run_dir)["status"], _status(run_dir)["exit_code"]) == ("stopped", 75)


def test_a_signal_while_everything_is_being_imported(tmp_path: Path) -> None:
    """The first moment a signal can meet: before any setting was read. Nothing is lost, and the status says so."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import sys, time, pathlib\n"
        "class Slow:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'pydantic':\n"
        f"            pathlib.Path({str(tmp_path / 'reached')!r}).touch()\n"
        "            time.sleep(1)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    environment = {**_environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "launch/pretrain_moe.py", *SMALL, f"run_dir={tmp_path / 'run'}", "train.steps=1000000"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert _until((tmp_path / "reached").exists, seconds=60)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 75 and "before the first step" in error, error
    assert (_status(tmp_path / "run")["status"], _status(tmp_path / "run")["reason"]) == ("stopped", "SIGTERM")
