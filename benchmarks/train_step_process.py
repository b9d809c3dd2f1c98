"""A contender's process, seen from benchmarks/train_step.py: one command and one answer at a time, with a limit on how long an answer may take."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "train_step_worker.py"
_SECONDS_TO_END = 10.0


class ProcessFailure(Exception):
    """A contender could not be built, ran out of memory, died or hung; the message is what its row says."""


class Process:
    """A running contender; a context manager, so that none is left behind.

    Args:
        task: contender and workload.
        timeout: seconds an answer may take.
    """

    def __init__(self, task: dict[str, Any], timeout: float):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self._timeout, self._pending = timeout, b""
        words = [sys.executable, str(WORKER), json.dumps(task)]
        self._child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)

    @property
    def _stdout(self) -> Any:
        return self._child.stdout

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError as error:
            raise ProcessFailure(self._how_it_ended()) from error
        return self.read()

    def read(self) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            ProcessFailure: there is none, or it says why not.
        """
        deadline = time.monotonic() + self._timeout
        while b"\n" not in self._pending:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                self._child.kill()
                raise ProcessFailure(f"no answer after {self._timeout:g} s")
            read = self._stdout.read1()
            if not read:
                raise ProcessFailure(self._how_it_ended())
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        found = json.loads(line)
        if "failed" in found:
            raise ProcessFailure(found["failed"])
        return found

    def _how_it_ended(self) -> str:
        code = self._child.wait()
        self._errors.seek(0)
        last = self._errors.read().decode("utf-8", errors="replace").strip().splitlines()[-1:]
        return f"its process ended with {code}{': ' + last[0] if last else ''}"

    def stop(self) -> None:
        """Let it end, or end it. Calling again does nothing."""
        if self._errors.closed:
            return
        assert self._child.stdin is not None
        try:
            self._child.stdin.close()
            self._child.wait(_SECONDS_TO_END)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._child.kill()
            self._child.wait()
        self._selector.close()
        self._stdout.close()
        self._errors.close()


def run_once(task: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The single answer of a process that is not told anything."""
    with Process(task, timeout) as process:
        return process.read()
