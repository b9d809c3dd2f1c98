"""What a fault is to the suite: something that is done to a run, a number of times, and a count of what came of it.

A module `tests/faults/*_faults.py` lists its faults in FAULTS. Each is a function that injects, looks, and counts; it never decides by exit code alone, but
by what lies on the disk and what the next start does with it. A fault that must be caught has a control beside it: the same injection into a deliberately
naive writer or reader, where the suite must find a loss, or it could not see one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Outcome:
    """Counts of one fault.

    Attributes:
        tried: injections that took place.
        survived: of these, after which nothing was lost and nothing wrong was believed.
        lost: one line for each of the others: what was injected, what was found.
        note: what the reader of the table has to know, such as what was skipped and why.
    """

    tried: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, failure: str | None) -> None:
        """Count one injection; `failure` says what was lost, None that nothing was."""
        self.tried += 1
        if failure is None:
            self.survived += 1
        else:
            self.lost.append(failure)


class CannotBeTried(Exception):
    """This machine does not let the suite do it; the reason is shown, loudly, and the rest goes on."""


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Args:
        name: what is done, in a few words.
        inject: given an empty folder and whether to be short (a sample of the injections, for every test run), does it and counts.
        is_control: the same done to a naive writer: here losses are wanted, and none is a failure of the suite.
        needs: a program the fault cannot do without, such as strace.
        in_short: whether a sample of it belongs to every test run; false for what has to wait long for each injection.
    """

    name: str
    inject: Callable[[Path, bool], Outcome]
    is_control: bool = False
    needs: str | None = None
    in_short: bool = True


def passed(fault: Fault, outcome: Outcome) -> bool:
    """Whether the row is as it should be: something was tried, and nothing lost, or, for a control, something."""
    return outcome.tried > 0 and bool(outcome.lost) == fault.is_control


def timed(fault: Fault, folder: Path, short: bool) -> tuple[Outcome, float]:
    """Run a fault and take its seconds."""
    started = time.monotonic()
    return fault.inject(folder, short), time.monotonic() - started
