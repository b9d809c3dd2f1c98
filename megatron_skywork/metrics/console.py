"""The run as one plain line a step, and a live bar where somebody is watching.

    step 12/200  loss 2.3450  grad 1.23  lr 3.0e-04  drop 1.2 %  1,234 tok/s  0.81 s  eta 2m

A log file gets every line and no control characters. A terminal gets one line that is rewritten; evaluations, events and every fiftieth step stay above it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from megatron_skywork.metrics import wording

_BAR_WIDTH = 20
_STEPS_PER_KEPT_LINE = 50
_STEPS_FOR_ETA = 50
_SHARE_OF_WAITING_SHOWN = 0.05
_CLEAR_LINE = "\r\x1b[2K"


def _number(value: Any, form: str) -> str:
    return "none" if value is None else format(value, form)


def _mean(values: Sequence[float | None]) -> float | None:
    """Over the layers that have a value; None where none has."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def step_line(record: Mapping[str, Any], last_step: int) -> str:
    """A step record as a line; parts the record does not have are left out."""
    parts = [f"step {record['step']}/{last_step}"]
    if "loss" in record:
        parts.append(f"loss {_number(record['loss'], '.4f')}")
    if "grad_norm" in record:
        parts.append(f"grad {_number(record['grad_norm'], '.2f')}")
    if "learning_rate" in record:
        parts.append(f"lr {_number(record['learning_rate'], '.1e')}")
    drops = (record.get("router") or {}).get("drop_rate")
    if drops:
        parts.append(f"drop {100 * sum(drops) / len(drops):.1f} %")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"mfu {100 * record['mfu']:.1f} %")
    seconds = (record.get("seconds") or {}).get("step")
    if seconds is not None:
        parts.append(f"{seconds:.2f} s")
    if (record.get("data_wait_share") or 0) > _SHARE_OF_WAITING_SHOWN:
        parts.append(f"waits {100 * record['data_wait_share']:.0f} % for data")
    if record.get("skipped"):
        parts.append("skipped")
    return "  ".join(parts)


class ConsoleWriter:
    """Prints on the process that is rank 0.

    Args:
        last_step: the step the run ends with, for the count and the time left.
        stream: where to print; stdout.
        clock: seconds, monotonic.
    """

    def __init__(self, last_step: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._last_step = last_step
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._clock = clock
        self._recent: deque[tuple[int, float]] = deque(maxlen=_STEPS_FOR_ETA)
        self._bar_shown = False

    def header(self, record: Mapping[str, Any]) -> None:
        parts = []
        parameters = record.get("parameters") or {}
        if parameters.get("total"):
            active = f" ({wording.count(parameters['active'])} active)" if parameters.get("active") not in (None, parameters["total"]) else ""
            parts.append(f"parameters {wording.count(parameters['total'])}{active}")
        parts += [f"{label} {record[key]}" for key, label in (("world_size", "ranks"), ("device", "device")) if record.get(key) is not None]
        self._line("  ".join(parts) or "run starts")

    def step(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        line = step_line(record, self._last_step)
        remaining = self._seconds_left(step)
        if remaining is not None and step < self._last_step:
            line += f"  eta {wording.duration(remaining)}"
        if not self._live or step % _STEPS_PER_KEPT_LINE == 0 or step >= self._last_step:
            self._line(line)
        if self._live and step < self._last_step:
            self._bar(step, line)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        parts = [f"evaluation at step {record['step']}"]
        parts += [f"{name} {_number(loss, '.4f')}" for name, loss in (record.get("losses") or {}).items()]
        router = record.get("router") or {}
        changed, similarity = (_mean(router.get(name) or []) for name in ("changed_experts", "expert_similarity"))
        if changed is not None:
            parts.append(f"experts changed {wording.percent(changed)}")
        if similarity is not None:
            parts.append(f"similarity {round(similarity, 3) + 0.0:.3f}")  # adding 0.0 takes the sign from a zero
        self._line("  ".join(parts))

    def event(self, record: Mapping[str, Any]) -> None:
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in record.items() if key not in ("kind", "event", "step", "time")}
        details = "  ".join(f"{key}={value}" for key, value in shown.items())
        self._line(f"{record['event']} at step {record['step']}" + (f"  {details}" if details else ""))

    def close(self) -> None:
        if self._bar_shown:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._bar_shown = False

    def _seconds_left(self, step: int) -> float | None:
        """From the pace of the last records; none after the first, which says more about start-up than about steps."""
        self._recent.append((step, self._clock()))
        (first_step, first_time), (_, now) = self._recent[0], self._recent[-1]
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._last_step - step)

    def _line(self, text: str) -> None:
        self._stream.write((_CLEAR_LINE if self._bar_shown else "") + text + "\n")
        self._stream.flush()
        self._bar_shown = False

    def _bar(self, step: int, line: str) -> None:
        filled = min(_BAR_WIDTH, _BAR_WIDTH * step // max(1, self._last_step))
        text = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {line}"
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_CLEAR_LINE + text[:width])
        self._stream.flush()
        self._bar_shown = True
