"""Trains the planned runs, several at a time, each in a process of its own; says how far they are, and ends them when it is ended.

A run that fails is named with its log, and the others go on. Runs are never lost: what is stopped saves itself, and the next call goes on from there.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from ablation_plan import ROOT, PlannedRun, status_of
from megatron_skywork.metrics import wording
from megatron_skywork.metrics.jsonl import FILE_NAME, parse_line
from stage_runner import last_words

POLL_SECONDS = 0.5
# A stopped run finishes its step and saves.
SECONDS_TO_STOP = 90.0
TAIL_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1


class Interrupted(Exception):
    """Ctrl-C or a signal; the running runs have saved themselves and ended."""


@dataclass
class Running:
    """A run that is being trained."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int
    first_step: int
    stopped_at: float | None = None


@dataclass
class Outcome:
    """How the runs ended.

    Attributes:
        failed: run -> what its log says at the end.
    """

    done: list[PlannedRun] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def command_of(run: PlannedRun) -> list[str]:
    """A process started by hand is a job of one rank."""
    return [sys.executable, "launch/pretrain_moe.py", *run.words]


class Scheduler:
    """Keeps `jobs` runs going.

    Args:
        jobs: runs at a time.
        environment: of the run in a slot, 0 to jobs - 1.
        logs: folder of the logs.
        command: makes a run's command line.
        every_seconds: between lines that say how far all is.
    """

    def __init__(
        self,
        jobs: int,
        environment: Callable[[int], dict[str, str]],
        logs: Path,
        command: Callable[[PlannedRun], list[str]] = command_of,
        every_seconds: float = 30.0,
    ):
        self._jobs, self._environment, self._logs, self._command, self._every = jobs, environment, logs, command, every_seconds
        self._running: list[Running] = []
        self._steps_done = 0  # by runs that ended during this call

    def train(self, runs: Sequence[PlannedRun]) -> Outcome:
        """Train what is not done.

        Raises:
            Interrupted: after a signal, when all children have ended.
        """
        outcome = Outcome()
        waiting: list[PlannedRun] = []
        for run in runs:
            (outcome.done if run.status() == "done" else waiting).append(run)
        if outcome.done:
            self._say(f"{len(outcome.done)} of {len(runs)} runs are there already")
        self._started, self._said = time.monotonic(), time.monotonic()
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    self._start(waiting.pop(0))
                time.sleep(POLL_SECONDS)
                for running in [item for item in self._running if item.process.poll() is not None]:
                    self._finish(running, outcome, total=len(runs))
                if self._running and time.monotonic() - self._said >= self._every:
                    self._progress(waiting, outcome, len(runs))
        except KeyboardInterrupt:
            self._stop_all()
            raise Interrupted from None
        except BaseException:
            self._stop_all()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
        return outcome

    def _start(self, run: PlannedRun) -> None:
        moved = run.make_room()
        if moved is not None:
            self._say(f"{run.name}: a run with other settings was in its folder; it is in {moved} now")
        words = self._command(run)
        path = self._log_of(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        slot = min(set(range(self._jobs)) - {item.slot for item in self._running})
        # A session of its own: Ctrl-C reaches the children once, from here, and never twice.
        process = subprocess.Popen(
            words, cwd=ROOT, env=self._environment(slot), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=functools.partial(_end_with, os.getpid()),
        )
        self._running.append(Running(run, process, log, slot, last_step(run.folder) or 0))

    def _finish(self, running: Running, outcome: Outcome, total: int) -> None:
        run = running.run
        self._running.remove(running)
        running.log.close()
        _kill_group(running.process.pid)  # helpers that a run which died has left behind
        self._steps_done += max(0, (last_step(run.folder) or 0) - running.first_step)
        if running.process.returncode == 0 and status_of(run.folder) == "done":
            # 18 runs' optimizer states are a gigabyte that nobody reads.
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            outcome.done.append(run)
            self._say(f"[{len(outcome.done)}/{total}] {run.name}: done, {self._words_about(run)}")
            return
        tail = "\n".join(f"    {line}" for line in last_words(self._log_of(run).read_text(errors="replace"))[-12:])
        outcome.failed[run.name] = f"exit code {running.process.returncode}; its log: {self._log_of(run)}"
        self._say(f"{run.name} FAILED with exit code {running.process.returncode}; the others go on. The end of {self._log_of(run)}:\n{tail}")

    def _progress(self, waiting: Sequence[PlannedRun], outcome: Outcome, total: int) -> None:
        self._said = time.monotonic()
        now = {item.run.name: last_step(item.run.folder) or 0 for item in self._running}
        done = self._steps_done + sum(max(0, now[item.run.name] - item.first_step) for item in self._running)
        left = sum(run.config.train.steps - (last_step(run.folder) or 0 if run.status() == "to go on with" else 0) for run in waiting)
        left += sum(item.run.config.train.steps - now[item.run.name] for item in self._running)
        elapsed = time.monotonic() - self._started
        shown = ", ".join(f"{item.run.name} {now[item.run.name]}/{item.run.config.train.steps}" for item in self._running)
        time_left = f"about {wording.duration(left * elapsed / done)} left" if done > 0 else "starting"
        self._say(f"[{len(outcome.done)}/{total}] {shown}; {time_left}")

    def _stop_all(self) -> None:
        """Ask the children to save and end; who does not in time, or at a second Ctrl-C, is killed."""
        if self._running:
            self._say("stopping; the running runs save themselves (again Ctrl-C: without saving)")
        try:
            for item in self._running:
                _signal(item.process, signal.SIGTERM)
            deadline = time.monotonic() + SECONDS_TO_STOP
            while any(item.process.poll() is None for item in self._running) and time.monotonic() < deadline:
                time.sleep(0.1)
        except KeyboardInterrupt:
            pass
        finally:
            for item in self._running:
                _kill_group(item.process.pid)
                item.process.wait()
                item.log.close()
            self._running.clear()

    def _words_about(self, run: PlannedRun) -> str:
        record = last_record(run.folder, "eval") or {}
        losses = ", ".join(f"{name} {value:.4f}" for name, value in (record.get("losses") or {}).items())
        return losses or "no evaluation"

    def _log_of(self, run: PlannedRun) -> Path:
        return self._logs / f"{run.variant}-seed_{run.seed}.log"

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def last_record(folder: Path, kind: str) -> dict[str, Any] | None:
    """The last record of a kind, from the end of metrics.jsonl."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    records = (parse_line(line) for line in reversed(lines))
    return next((record for record in records if record is not None and record.get("kind") == kind), None)


def last_step(folder: Path) -> int | None:
    record = last_record(folder, "step")
    return None if record is None else int(record["step"])


def cpu_environment(threads: int) -> dict[str, str]:
    """A run on CPU: its share of the cores, and no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}


def gpu_environment(slot: int) -> dict[str, str]:
    """A run on one GPU of those this process may use."""
    visible = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": visible[slot] if slot < len(visible) else str(slot)}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_with(parent: int) -> None:
    """In a child, before it becomes the command: be asked to stop when the parent dies, however it dies (Linux; elsewhere a killed parent leaves it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)


def _kill_group(pid: int) -> None:
    """End what is left of a child's session."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def describe_runs(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """The runs as plain values, for --dry-run."""
    return [
        {"variant": run.variant, "seed": run.seed, "status": run.status(), "steps": run.config.train.steps, "tokens": run.tokens, "folder": run.config.run_dir,
         "command": shlex.join(["python", "launch/pretrain_moe.py", *run.words])} for run in runs
    ]


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
