"""Training checkpoints: everything a run needs to go on, in a folder that gets its name when all of it is on the disk, loadable under any other layout.

    step_00001000/
      *.distcp, .metadata, metadata.json, common.pt    megatron-core's distributed checkpoint: weights, fp32 master weights, moments, router state, RNG
      config.yaml     the run's settings                state.json    step, samples, tokens, layout, versions
      manifest.json   SHA-256 of every file, sealed     complete.json   the size of every file

Weights are saved once, under names that say nothing of the layout; the optimizer's state is gathered to the shape of the weights (`fully_reshardable`),
so that tensor, pipeline, expert and data parallelism may all be different at the next start.

A save goes through three stages, and all ranks enter each together: what is to be written is taken down; every rank writes its file, in a thread where training
goes on meanwhile; the first rank completes the folder and renames it. The thread issues no collective. Collectives happen on the main thread, at its own time,
so they never cross those of training.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_skywork import device
from megatron_skywork.checkpoint.capture import Capture, capture, tensor_bytes
from megatron_skywork.checkpoint.commit import commit, point_to
from megatron_skywork.checkpoint.content import OPTIMIZER_LAYOUT, merged, rank_states, sharded_weights
from megatron_skywork.checkpoint.folders import clear_leftovers, folder_of, retain, staging_of
from megatron_skywork.checkpoint.space import check_space_for_save
from megatron_skywork.checkpoint.state import STATE_FILE, TrainState, describe_state
from megatron_skywork.checkpoint.together import from_first
from megatron_skywork.checkpoint.write import Part, reason_of, write_part
from megatron_skywork.config.load import dump_config
from megatron_skywork.config.schema import Config
from megatron_skywork.convert.files.marker import fsync
from megatron_skywork.errors import CheckpointError
from megatron_skywork.optim.state import save_without_copies

_SHOWN_FAILURES = 3


@dataclass
class Outcome:
    """How a save ended, the same on every rank.

    Attributes:
        failure: why there is no checkpoint; None when there is one.
        seconds: from its begin until it counted.
        stalled_seconds: of these, how long training stood still, on this rank.
        written_seconds: the time of the slowest rank's writing.
        warning: what went wrong after the checkpoint was there.
    """

    step: int
    folder: Path
    failure: str | None = None
    num_bytes: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0
    written_seconds: float = 0.0
    warning: str | None = None


@dataclass
class _Job:
    """A save on its way.

    Attributes:
        stalled_seconds: for how long training has stood still for it.
        texts: small files, on the first rank.
        work: what this rank does now: writing, then (on the first rank) committing.
        is_gathered: whether all ranks have written.
        ended: an outcome that came early, since the save could not begin.
    """

    step: int
    folder: Path
    read_back: bool
    started: float
    stalled_seconds: float = 0.0
    texts: dict[str, str] = field(default_factory=dict)
    index: Any = None
    common: dict[str, Any] = field(default_factory=dict)
    work: Future[Any] = field(default_factory=Future)
    is_gathered: bool = False
    ended: Outcome | None = None


class Saver:
    """Writes the checkpoints of a run, one at a time. `begin`, `poll` and `wait` are collectives: every rank calls them, in the same order.

    Args:
        verified: the folder this run went on from, which was compared with its hashes.
    """

    def __init__(self, config: Config, verified: Path | None = None):
        self._config, self._run_dir = config, Path(config.run_dir)
        self._is_first = torch.distributed.get_rank() == 0
        self._verified = set() if verified is None else {verified.resolve()}
        self._stopped = threading.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._job: _Job | None = None

    # ----------------------------------------------------------------------------------------------------------------------- the verbs

    def begin(self, state: TrainState, chunks: list[Any], optimizer: MegatronOptimizer, *, read_back: bool = True) -> None:
        """Start saving. With checkpoint.background this returns when all that is saved has been copied to host memory, otherwise when it is written.

        Args:
            read_back: compare what the disk gives back with what was written. Without it the checkpoint is there sooner, and pushes out no verified one.
        """
        assert self._job is None, "the save before has not been waited for"
        started, folder = time.perf_counter(), folder_of(self._run_dir, state.step)
        job = self._job = _Job(state.step, folder, read_back, started)
        try:
            captured = self._capture(job, chunks, optimizer)
            from_first(lambda: self._open_staging(job, state))
        except (CheckpointException, CheckpointError) as failure:  # on all ranks alike
            job.ended = Outcome(state.step, folder, _said(failure), seconds=time.perf_counter() - started)
        else:
            job.work = self._run(captured.copied, write_part, staging_of(folder), captured, self._stopped, read_back)
        job.stalled_seconds += time.perf_counter() - started

    def poll(self) -> Outcome | None:
        """The outcome, once every rank is done; None while there is nothing to tell. It waits for no disk."""
        return self._settle(wait=False)

    def wait(self) -> Outcome | None:
        """The outcome of the save that is on its way; None when there is none."""
        return self._settle(wait=True)

    def abandon(self) -> None:
        """Give up what is not finished, without asking the other ranks: they may be dead. A folder that has its name by now stays, it is whole."""
        self._stopped.set()
        job, self._job = self._job, None
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if job is not None and self._is_first:
            shutil.rmtree(staging_of(job.folder), ignore_errors=True)

    # ----------------------------------------------------------------------------------------------------------------------- its stages

    def _capture(self, job: _Job, chunks: list[Any], optimizer: MegatronOptimizer) -> Capture:
        save_without_copies(optimizer)
        weights = sharded_weights(chunks)
        content = {
            **weights,
            "optimizer": optimizer.sharded_state_dict(merged(weights), is_loading=False, metadata=OPTIMIZER_LAYOUT),
            "rank": rank_states(chunks),
        }
        captured, common = capture(content, copies=self._config.checkpoint.background)
        job.index, job.common = captured.index, common
        return captured

    def _open_staging(self, job: _Job, state: TrainState) -> None:
        """On the first rank: the small files, and an empty folder to write into, if the disk has room for what comes."""
        folder = job.folder
        try:
            job.texts = {"config.yaml": dump_config(self._config), STATE_FILE: describe_state(self._config, state)}
            clear_leftovers(self._run_dir)
            check_space_for_save(folder, tensor_bytes(job.index))
            is_new = not folder.parent.is_dir()
            staging_of(folder).mkdir(parents=True)
            if is_new:
                fsync(self._run_dir)
        except OSError as failure:
            raise CheckpointError(reason_of(failure)) from failure

    def _settle(self, wait: bool) -> Outcome | None:
        job = self._job
        if job is None:
            return None
        started, ended = time.perf_counter(), job.ended
        while ended is None and self._all_have(job.work, wait):
            if job.is_gathered:
                ended = from_first(job.work.result)
            else:
                self._gather(job)
        job.stalled_seconds += time.perf_counter() - started
        if ended is None:
            return None
        self._job = None
        return replace(ended, stalled_seconds=job.stalled_seconds)

    def _all_have(self, work: Future[Any], wait: bool) -> bool:
        """Whether every rank's part is done; after waiting for one's own, asking is not needed, since the next thing is a collective."""
        if wait:
            work.exception()
            return True
        done = torch.tensor([int(work.done())], device=device.current())
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
        return bool(done.item())

    def _gather(self, job: _Job) -> None:
        """The first rank gets what all have written, and completes the folder; the others have nothing more to do."""
        parts: list[Any] | None = [None] * torch.distributed.get_world_size() if self._is_first else None
        torch.distributed.gather_object(job.work.result(), parts, dst=0)
        job.is_gathered = True
        if parts is not None:
            job.work = self._run(self._config.checkpoint.background, self._complete, job, parts)

    def _complete(self, job: _Job, parts: list[Part]) -> Outcome:
        """On the first rank: commit, or clear away; then remove what is not kept any more."""
        outcome = Outcome(job.step, job.folder, written_seconds=max(part.seconds for part in parts))
        failures = [part.failure for part in parts if part.failure is not None]
        if not failures:
            try:
                outcome.num_bytes = commit(staging_of(outcome.folder), outcome.folder, job.index, job.common, job.texts, outcome.step, parts)
            except OSError as failure:
                failures = [f"rank 0 on {socket.gethostname()}: {reason_of(failure)}"]
        if failures:
            more = f" (and {len(failures) - _SHOWN_FAILURES} more ranks)" if len(failures) > _SHOWN_FAILURES else ""
            outcome.failure = "; ".join(failures[:_SHOWN_FAILURES]) + more
            shutil.rmtree(staging_of(outcome.folder), ignore_errors=True)
        else:
            if job.read_back:
                self._verified.add(outcome.folder.resolve())
            try:
                point_to(outcome.folder)
                retain(self._run_dir, self._config.checkpoint.keep, outcome.folder, self._verified)
            except OSError as failure:
                outcome.warning = f"{outcome.folder} is saved, but older checkpoints could not be removed: {reason_of(failure)}"
        outcome.seconds = time.perf_counter() - job.started
        return outcome

    def _run(self, in_background: bool, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Do it in the thread, or at once."""
        if in_background:
            self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
            return self._thread.submit(work, *args)
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args))
        except Exception as failure:
            done.set_exception(failure)
        return done


def _said(failure: BaseException) -> str:
    """Why a save could not begin; torch's exception has a reason for each rank that failed."""
    if not isinstance(failure, CheckpointException):
        return str(failure)
    reasons = [f"rank {rank}: {reason_of(error)}" for rank, (error, _) in failure.failures.items()]
    return "; ".join(reasons[:_SHOWN_FAILURES])


def save(config: Config, state: TrainState, chunks: list[Any], optimizer: MegatronOptimizer) -> Path:
    """Save on all ranks together; returns when the folder is whole.

    Raises:
        CheckpointError: on all ranks, when one of them could not write.
    """
    saver = Saver(config)
    saver.begin(state, chunks, optimizer)
    outcome = saver.wait()
    saver.abandon()
    assert outcome is not None
    if outcome.failure is not None:
        raise CheckpointError(f"{outcome.folder}: could not be written: {outcome.failure}")
    return outcome.folder
