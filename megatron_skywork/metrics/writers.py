"""Everything that is written about a run goes through here: the JSONL file first, then the console, TensorBoard and W&B.

Only rank 0 writes. The other ranks hold a `Writers` with nothing in it, so that the training loop has no `if rank == 0`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megatron_skywork.config.schema import Config
from megatron_skywork.metrics import tensorboard
from megatron_skywork.metrics.console import ConsoleWriter
from megatron_skywork.metrics.jsonl import FILE_NAME, JsonlWriter
from megatron_skywork.metrics.wandb_follower import WandbFollower


class Writer(Protocol):
    """What takes records; each has its `kind` and `time`."""

    def header(self, record: Mapping[str, Any]) -> None: ...

    def step(self, record: Mapping[str, Any]) -> None: ...

    def evaluation(self, record: Mapping[str, Any]) -> None: ...

    def event(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Writers:
    """Hands each record to every writer. With no writers it is the null object of the ranks that write nothing.

    Args:
        writers: in the order they are served; the file of record comes first.
        follower: W&B's helper process, which reads the file of record; closed last, when that file is complete.
    """

    def __init__(self, writers: Sequence[Writer], follower: WandbFollower | None = None):
        self._writers = list(writers)
        self._follower = follower

    def header(self, record: Mapping[str, Any]) -> None:
        """What does not change during a run: config, formulas, world_size, parameters, device."""
        complete = {"kind": "header", "time": time.time(), **record}
        for writer in self._writers:
            writer.header(complete)

    def step(self, record: Mapping[str, Any]) -> None:
        """The record of one optimizer step; it must have `step`."""
        complete = {"kind": "step", "step": record["step"], "time": time.time(), **record}
        for writer in self._writers:
            writer.step(complete)
        if self._follower is not None:
            self._follower.look()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """`step`, `losses` (a mean loss per validation set) and, where there are experts, `router` (see train/evaluate.py)."""
        complete = {"kind": "eval", "step": record["step"], "time": time.time(), **record}
        for writer in self._writers:
            writer.evaluation(complete)

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Something that happened once: save, stop, warning."""
        complete = {"kind": "event", "event": name, "step": step, "time": time.time(), **fields}
        for writer in self._writers:
            writer.event(complete)

    def close(self) -> None:
        """Close all; a writer that fails to close does not keep the others open."""
        failures: list[Exception] = []
        closers = [writer.close for writer in self._writers] + ([self._follower.close] if self._follower else [])
        for close in closers:
            try:
                close()
            except Exception as error:
                failures.append(error)
        self._writers, self._follower = [], None
        if failures:
            raise failures[0]


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def open_writers(config: Config, run_dir: str | Path, *, resume_step: int | None) -> Writers:
    """The writers that the settings ask for, on rank 0; an empty set elsewhere. Every rank calls it.

    Args:
        resume_step: the step of the checkpoint the run goes on from, or None for a new run.

    Raises:
        ConfigError: TensorBoard is asked for and not installed (on every rank, so that none waits for another).
    """
    if config.metrics.tensorboard:
        tensorboard.require()
    if _rank() != 0:
        return Writers([])
    folder = Path(run_dir)
    record = JsonlWriter(folder / FILE_NAME, resume_step=resume_step)
    last_step = min(config.train.steps, config.train.stop_at_step or config.train.steps)
    writers: list[Writer] = [record, ConsoleWriter(last_step)]
    if config.metrics.tensorboard:
        writers.append(tensorboard.TensorBoardWriter(folder / "tensorboard", resume_step=resume_step))
    follower = None
    if config.metrics.wandb != "off":
        follower = WandbFollower(record.path, mode=config.metrics.wandb, project=config.metrics.wandb_project)
    return Writers(writers, follower)
