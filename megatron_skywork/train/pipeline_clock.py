"""How much of a step each pipeline stage works, and how much it stands idle: the bubble, measured as the planner's simulation counts it.

megatron-core's schedules tell a `timers` object when the forward or the backward of a micro-batch begins and ends; what lies between those is waiting for other
stages. Moments are in the order of the device's work (`device.moment`), so a GPU that waits for a message is idle here too, and nobody waits for the clock.

    bubble = 1 - mean over stages of busy seconds / seconds of the pipeline

The first stage begins the step's first forward and ends its last backward, so the pipeline takes as long as the longest of all stages' own spans.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_skywork import device
from megatron_skywork.metrics.record import MetricBuffer

# What the entry `pipeline` of a record means, for the run's header.
FORMULAS = {"pipeline": "of the last step: bubble = 1 - mean over stages of busy seconds / seconds from the first forward to the last backward"}
_WORK = ("forward-compute", "backward-compute")


class PipelineClock:
    """Stands where megatron-core expects its timers, for one rank.

    Args:
        stage: of this rank, from 0.
        num_stages: of the pipeline.
    """

    def __init__(self, stage: int, num_stages: int) -> None:
        self._stage, self._num_stages = stage, num_stages
        self._work, self._others = _Stretches(), _Ignored()

    def __call__(self, name: str, log_level: int | None = None) -> _Stretches | _Ignored:
        """The timer of this name; only those of forwards and backwards do anything."""
        return self._work if name in _WORK else self._others

    def begin(self) -> None:
        """A step begins; what came before it is forgotten."""
        self._work.pairs.clear()

    def add_to(self, buffer: MetricBuffer) -> None:
        """Bring the last step's times of this rank to those of all; waits until the device has done the step."""
        pairs = self._work.pairs
        of_stage = torch.zeros(self._num_stages)
        of_stage[self._stage] = 1.0
        busy = sum(device.seconds_between(*pair) for pair in pairs)
        buffer.add("pipeline.seconds", device.seconds_between(pairs[0][0], pairs[-1][1]), "max")
        buffer.add("pipeline.busy_seconds", of_stage * busy, "mean", weight=of_stage)
        buffer.add("pipeline.memory_bytes", of_stage * device.peak_memory_bytes(), "max")


def pipeline_record(reduced: dict[str, Any]) -> dict[str, Any]:
    """The entry `pipeline` of a step's record: per stage the mean busy seconds and the largest peak of memory of its ranks."""
    seconds, busy = reduced["pipeline.seconds"], reduced["pipeline.busy_seconds"]
    return {
        "seconds": seconds,
        "bubble": 1 - sum(busy) / (len(busy) * seconds),
        "busy_seconds": busy,
        "memory_bytes": [int(num_bytes) for num_bytes in reduced["pipeline.memory_bytes"]],
    }


class _Stretches:
    """Beginnings and ends, in order."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []
        self._began: Any = None

    def start(self, barrier: bool = False) -> None:
        self._began = device.moment()

    def stop(self, barrier: bool = False) -> None:
        self.pairs.append((self._began, device.moment()))


class _Ignored:
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...
