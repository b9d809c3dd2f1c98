"""Processes that stand by as ranks: a test hands them a function, they run it as one distributed job, and nobody pays for starting them twice.

The rendezvous is a file, so tests need no free port. A function runs with process groups initialised and must leave none of its own behind; the same
function would run under NCCL, since it asks megatron_skywork.device for everything.
"""

from __future__ import annotations

import atexit
import ctypes
import datetime
import functools
import gc
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300
_PR_SET_PDEATHSIG = 1


class RankPool:
    """Runs functions on `1..size` ranks.

    Args:
        size: most ranks a test may ask for.
    """

    def __init__(self, size: int):
        self.size = size
        self._context = multiprocessing.get_context("spawn")
        self._tasks: list[Any] = []
        self._answers: Any = None
        self._processes: list[Any] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank.

        Returns:
            what each rank returned, by rank.
        """
        _skip_without_devices(world_size)
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                self._tasks[rank].put((function, args, rank, world_size, str(Path(folder) / "rendezvous")))
            return self._collect(world_size)

    def _collect(self, world_size: int) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(results) < world_size:
            try:
                rank, result, failure = self._answers.get(timeout=1)
            except queue.Empty:
                silent = sorted(set(range(world_size)) - set(results))
                dead = [rank for rank in silent if not self._processes[rank].is_alive()]
                if dead or time.monotonic() > deadline:
                    self.close()
                    raise AssertionError(f"ranks {dead} died" if dead else f"ranks {silent} gave no answer in {TIMEOUT_SECONDS} s") from None
                continue
            if failure is not None:
                # The others may wait for this rank forever; the next test gets new processes.
                self.close()
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            results[rank] = result
        return [results[rank] for rank in range(world_size)]

    def _start(self) -> None:
        self._tasks = [self._context.Queue() for _ in range(self.size)]
        self._answers = self._context.Queue()
        self._processes = [self._context.Process(target=_serve, args=(tasks, self._answers), daemon=True) for tasks in self._tasks]
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


@functools.cache
def shared_pool() -> RankPool:
    """The one of this process: four ranks, started when they are first asked for."""
    pool = RankPool(4)
    atexit.register(pool.close)
    return pool


def _skip_without_devices(world_size: int) -> None:
    """NCCL wants a GPU for every rank; on a CPU any number of ranks runs."""
    import pytest

    from megatron_skywork import device

    if device.has_gpu() and device.count() < world_size:
        pytest.skip(f"{world_size} ranks need {world_size} GPUs, and there are {device.count()}")


def _serve(tasks: Any, answers: Any) -> None:
    """A rank's life: take a function, run it as this rank of a job, answer."""
    if sys.platform == "linux":  # killed together with the test process, however that ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from megatron_skywork import device

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  a run's console lines; what matters comes back as a result
    torch.set_num_threads(1)
    device.prepare()
    from megatron_skywork import parallel  # imports megatron-core, so only now

    gc.collect()
    gc.freeze()  # megatron-core collects garbage in every save and load, and would look through all that was imported each time
    while True:
        function, args, rank, world_size, rendezvous = tasks.get()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
        try:
            torch.distributed.init_process_group(
                device.backend(), init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=120)
            )
            result, failure = function(*args), None
        except BaseException:
            result, failure = None, traceback.format_exc()
        if failure is None:
            gc.collect()  # models hold groups, and groups hold threads
            parallel.stop()
            gc.collect()
        answers.put((rank, result, failure))
