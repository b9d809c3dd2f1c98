"""Stop at the end of a step when asked: by a signal, a time limit or a step limit, and on all ranks alike."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from megatron_skywork import device

# USR1 is NCCL's own; a scheduler's warning comes as TERM, or as USR2 where it is asked to.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Remembers that somebody asked to stop. A second SIGINT ends the process at once.

    Args:
        time_limit_seconds: ask by itself when the process has run this long.
    """

    def __init__(self, time_limit_seconds: float | None = None):
        self._received: int | None = None
        self._deadline = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def agreed(self) -> str | None:
        """Why to stop, or None; the same on every rank, because a rank that went on alone would wait forever for the others."""
        local = self._received or (-1 if self._deadline is not None and time.monotonic() > self._deadline else 0)
        answers = torch.tensor([max(local, 0), -min(local, 0)], device=device.current())
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(answers, op=torch.distributed.ReduceOp.MAX)
        number, out_of_time = answers.tolist()
        if number:
            return signal.Signals(number).name
        return "time limit" if out_of_time else None

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
