"""Stop at the end of a step when asked: by a signal, a time limit or a step limit, and on all ranks alike.

A signal is answered from the first line of the process on. Until settings are read it is held back; then it is remembered. Before the first step there is
nothing to finish, and the watchdog, which hears it too, ends the process at once (watchdog.py); from the first step on, the step is finished and saved.
This module imports no torch, so that it can be the first thing a rank does.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from megatron_skywork import lifeline

# USR1 is NCCL's own; a scheduler's warning comes as TERM, or as USR2 where it is asked to.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def hold() -> None:
    """Let a stop signal wait until `StopRequest` can take it, and end with torchrun, if that started us: without its agent a rank is an orphan."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        lifeline.die_with(parent if parent != 1 or _is_ours(parent) else -1)


def is_held() -> bool:
    """Whether a stop signal came while they are held back."""
    return not signal.sigpending().isdisjoint(STOP_SIGNALS)


def release() -> None:
    """Let signals through again; one that waited comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _is_ours(process: int) -> bool:
    """Whether a process runs the same Python. In a container process 1 may be torchrun; elsewhere it is who adopts orphans."""
    try:
        return os.path.samefile(f"/proc/{process}/exe", "/proc/self/exe")
    except OSError:
        return False


class StopRequest:
    """Remembers that somebody asked to stop, for as long as the process lives. A second SIGINT ends the process at once.

    Args:
        time_limit_seconds: ask by itself when the process has run this long.
    """

    def __init__(self, time_limit_seconds: float | None = None):
        self._received: int | None = None
        self._deadline = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        release()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def agreed(self) -> str | None:
        """Why to stop, or None; the same on every rank, because a rank that went on alone would wait forever for the others."""
        import torch

        from megatron_skywork import device

        local = self._received or (-1 if self._deadline is not None and time.monotonic() > self._deadline else 0)
        answers = torch.tensor([max(local, 0), -min(local, 0)], device=device.current())
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(answers, op=torch.distributed.ReduceOp.MAX)
        number, out_of_time = answers.tolist()
        if number:
            return signal.Signals(number).name
        return "time limit" if out_of_time else None
