"""A run as a user starts it: torchrun, signals, a limit, the files it leaves, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_bodies import records

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=32", "data.seq_length=16", "train.micro_batch_size=1", "parallel.ep=2"]


def _command(run_dir: Path, *overrides: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"]
    return [*launcher, *signals, "launch/pretrain_moe.py", "--config", "configs/tiny.yaml", f"run_dir={run_dir}", *SMALL, *overrides]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _status(run_dir: Path) -> dict:
    return json.loads((run_dir / "run_status.json").read_text())


def _wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").is_file() and any(record["step"] >= step for record in records(run_dir)):
            return
        time.sleep(0.2)
    raise AssertionError(f"step {step} was not reached; the launcher's exit code is {process.poll()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(_command(run_dir, "train.steps=100000"), cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        _wait_for_step(run_dir, 3, process)
        process.send_signal(number)
        output = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
    status = _status(run_dir)
    # torchrun, if the signal finds it between two statements of its timer, fails on an unset name of its own and sends its ranks SIGTERM.
    sent = "SIGTERM" if "UnboundLocalError" in output else number.name
    assert (status["status"], status["reason"], status["exit_code"]) == ("stopped", sent, 75), output[-2000:]
    step = status["step"]
    assert [record["step"] for record in records(run_dir)] == list(range(1, step + 1))
    assert (run_dir / "checkpoints" / f"step_{step:08d}" / "complete.json").is_file()
    command = _command(run_dir, "train.steps=100000", f"train.stop_at_step={step + 2}")
    again = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-2000:]
    assert [record["step"] for record in records(run_dir)] == list(range(1, step + 3))
    events = [event["event"] for event in records(run_dir, "event") if event["event"] != "header_changed"]
    assert events == ["save", "stop", "resume", "save", "stop"]
    for name in ("config.yaml", "env.json", "metrics.jsonl", "run_status.json"):
        assert (run_dir / name).is_file()


def test_what_is_refused_is_said_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "launch/pretrain_moe.py", "--config", "configs/tiny.yaml", f"run_dir={tmp_path}"]
    for overrides, code, words in (
        (["checkpoint.init_from=/nowhere"], 3, "no such checkpoint folder"),
        (["data.mock=false", f"data.train={tmp_path}/missing"], 3, "missing"),
        (["model.backend=te"], 2, "model.backend"),
    ):
        answer = subprocess.run([*command, *overrides], cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=120)
        assert (answer.returncode, "Traceback" in answer.stderr) == (code, False), answer.stderr[-2000:]
        assert words in answer.stderr
        assert _status(tmp_path)["exit_code"] == code
