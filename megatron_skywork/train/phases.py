"""What this rank is doing: the phase of the run, the part of it, and how often either has changed.

The training code says it by setting one attribute, which costs nothing; whoever watches reads it from another thread. All ranks run the same program, so the
rank with the fewest changes is the one the others are waiting for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

START, FIRST_STEP, STEP, EVALUATION, SAVE, LOAD, END = "start", "first step", "step", "evaluation", "save", "load", "end"


class Moment(NamedTuple):
    """Where a rank stands.

    Attributes:
        part: what it does within the phase, e.g. `optimizer`; may be empty.
        step: the last step that was finished; None before the position of the run is known.
        changes: how often phase and part have changed since the process started.
        since: when the phase began, by time.monotonic().
    """

    phase: str
    part: str
    step: int | None
    changes: int
    since: float


class Phases:
    """The phase of this process. One thread changes it, others read `now`."""

    def __init__(self) -> None:
        self.now = Moment(START, "imports", None, 0, time.monotonic())
        self.has_stepped = False

    def step(self, number: int) -> None:
        """Step `number` begins; the first one may have to compile."""
        self._enter(STEP if self.has_stepped else FIRST_STEP, number - 1)
        self.has_stepped = True

    def part(self, name: str) -> None:
        """The part of the phase that begins now."""
        now = self.now
        self.now = Moment(now.phase, name, now.step, now.changes + 1, now.since)

    def waits(self, what: str) -> None:
        """What the part waits for now. Ranks differ in it, so it is no change: a rank that told more would seem to be ahead for the rest of the run."""
        self.now = self.now._replace(part=what)

    @contextmanager
    def during(self, phase: str, step: int) -> Iterator[None]:
        """A phase between steps; the one before goes on after it, with a clock that starts anew."""
        before = self.now.phase
        self._enter(phase, step)
        try:
            yield
        finally:
            self._enter(before, step)

    def end(self) -> None:
        """Training is over; what is left is to write it down and to leave."""
        self._enter(END, self.now.step)

    def _enter(self, phase: str, step: int | None) -> None:
        self.now = Moment(phase, "", step, self.now.changes + 1, time.monotonic())
