"""Progress of long work in bytes: a live line on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO


class Progress:
    """Call with the number of bytes done since the last call, from any thread; `close` ends the line.

    Args:
        label: what is being done.
        total_bytes: all that is to be done.
        stream: where lines go; None is silent.
    """

    def __init__(self, label: str, total_bytes: int, stream: TextIO | None = sys.stderr):
        self.label, self.total, self.done_bytes = label, total_bytes, 0
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._start = self._shown = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.done_bytes += count
            now = time.monotonic()
            if now - self._shown >= (0.2 if self._live else 5.0):
                self._shown = now
                self._show("\r" if self._live else "")

    def close(self) -> float:
        """Print the last state; returns the seconds it took."""
        seconds = time.monotonic() - self._start
        self._show("\r" if self._live else "", "\n" if self._live else "")
        return seconds

    def _show(self, before: str, after: str = "") -> None:
        if self._stream is None:
            return
        seconds = max(time.monotonic() - self._start, 1e-6)
        rate = self.done_bytes / seconds
        left = max(self.total - self.done_bytes, 0) / rate if rate else 0.0
        share = min(100.0, 100.0 * self.done_bytes / self.total) if self.total else 100.0
        line = f"{self.label}: {human(self.done_bytes)} of {human(self.total)} ({share:.0f} %), {human(rate)}/s, {left:.0f} s left"
        self._stream.write(before + line + ("    " if before else "\n") + after)
        self._stream.flush()


def human(count: float) -> str:
    """A number of bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
