"""Real gloo ranks on this machine: one process each, forked from this one so that nobody imports twice, and what they do for benchmarks/scaling.py."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
import torch.multiprocessing
from scaling_traffic import CountTraffic, force_balance, rows
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_skywork import parallel
from megatron_skywork.checkpoint import save as checkpoint_save
from megatron_skywork.config.schema import Config
from megatron_skywork.data.datasets import OneEpochDataset
from megatron_skywork.data.indexed import IndexedWriter
from megatron_skywork.moe.router_state import find_routers
from megatron_skywork.plan.communication import stage_traffic
from megatron_skywork.train.training import Training

TIMEOUT = datetime.timedelta(minutes=10)


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` as every rank of a gloo job; its answers, which JSON can hold, by rank."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        torch.multiprocessing.start_processes(_rank, (world_size, folder, function, args), nprocs=world_size, start_method="fork")
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]


def as_if_in(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in a process that takes itself for rank 0 of many: torch's fake backend answers for the others, and nothing travels."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        torch.multiprocessing.start_processes(_alone, (world_size, folder, function, args), nprocs=1, start_method="fork")
        return json.loads((Path(folder) / "0.json").read_text(encoding="utf-8"))


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=TIMEOUT)
    _answer(Path(folder) / f"{rank}.json", function, args)


def _alone(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    _answer(Path(folder) / f"{rank}.json", function, args)


def _answer(path: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        path.write_text(json.dumps(function(*args)), encoding="utf-8")
    # The groups end with the process; taking them down in order would wait for ranks that are done.
    os._exit(0)


# ------------------------------------------------------------------------------------------------------------------- what a rank measures


def steps(config: Config, repetitions: int) -> dict[str, Any]:
    """Seconds of whole steps, then the bytes of one with the router as it is and of one with a balanced router."""
    training = Training(config, parallel.start(config))
    for _ in range(2):
        training.train_one_step()
    seconds = []
    for _ in range(repetitions):
        torch.distributed.barrier()
        started = time.perf_counter()
        training.train_one_step()
        seconds.append(time.perf_counter() - started)
    counted = []
    for balance in (False, True):
        if balance:
            force_balance(find_routers(training.chunks))
        with CountTraffic() as traffic:
            training.train_one_step()
        counted.append({kind: sent.num_bytes for kind, sent in traffic.sent.items()})
    analytic = stage_traffic(config, training.place.world_size, training.place.pp)
    training.close()
    return {"seconds": seconds, "rows": [asdict(row) for row in rows(*counted, analytic)]}


def groups(config: Config) -> dict[str, Any]:
    """Building the process groups: seconds, groups made, and those this rank is in."""
    with mock.patch.object(torch.distributed, "new_group", wraps=torch.distributed.new_group) as made:
        started = time.perf_counter()
        parallel.build_groups(config.parallel)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "made": made.call_count, "member": len(torch.distributed.distributed_c10d._world.pg_map)}


def start_step_log(config: Config) -> dict[str, Any]:
    """Collectives of a start (groups excepted), of a step and of its record, and the record's bytes."""
    place = parallel.start(config)
    with CountTraffic() as start:
        training = Training(config, place)
    with CountTraffic() as step:
        result = training.train_one_step()
    with CountTraffic() as log:
        training.log(result)
    training.close()
    return {"start_calls": start.calls, "step_calls": step.calls, "log_calls": log.calls, "log_bytes": log.num_bytes}


def save(config: Config) -> dict[str, Any]:
    """A start on an indexed dataset and a checkpoint: indices cut by this rank, collectives and seconds of the save."""
    with _counted(OneEpochDataset, "_cut") as cut:
        training = Training(config, parallel.start(config))
    training.train_one_step()
    with CountTraffic() as traffic:
        started = time.perf_counter()
        checkpoint_save.save(config, training.state, training.chunks, training.optimizer)
        seconds = time.perf_counter() - started
    training.close()
    files = list((Path(config.run_dir) / "checkpoints").rglob("*.distcp"))
    return {
        "indices_cut": len(cut), "seconds": seconds, "calls": traffic.calls, "num_bytes": traffic.num_bytes,
        "num_files": len(files), "checkpoint_bytes": sum(file.stat().st_size for file in files),
    }  # fmt: skip


@contextlib.contextmanager
def _counted(owner: type, method: str) -> Iterator[list[None]]:
    """One entry for every call of a method."""
    calls: list[None] = []
    original = getattr(owner, method)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    with mock.patch.object(owner, method, counting):
        yield calls


def write_dataset(prefix: str, vocab_size: int, num_documents: int = 200, length: int = 100) -> None:
    """Random tokens as an indexed dataset."""
    writer = IndexedWriter(prefix, vocab_size)
    lengths = numpy.full(num_documents, length)
    writer.add(numpy.random.RandomState(0).randint(0, vocab_size, lengths.sum()).astype(numpy.int32), lengths)
    made = {"tokenizer_name": "none", "tokenizer_fingerprint": "none", "vocab_size": vocab_size, "eod_id": None}
    writer.finish(made, [], {}, {})
    writer.publish()

