"""Process groups: start torch.distributed, hand the layout to megatron-core, seed every rank, and end it all in order."""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_skywork import device
from megatron_skywork.config.schema import Config, Parallel, Watchdog
from megatron_skywork.errors import TrainingError


@dataclass(frozen=True)
class Coordinates:
    """Where this process stands in the layout."""

    rank: int
    world_size: int
    tp: int
    pp: int
    dp: int
    dp_size: int
    ep: int
    etp: int
    cp: int

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0


def group_timeout(watchdog: Watchdog) -> datetime.timedelta:
    """How long a collective may wait: a minute more than the longest phase, so that the watchdog, which knows more, speaks first."""
    longest = max(watchdog.start_seconds, watchdog.step_seconds, watchdog.evaluation_seconds, watchdog.save_seconds)
    return datetime.timedelta(seconds=longest + 60)


def rendezvous(rank: int, world_size: int, timeout: datetime.timedelta, told: Callable[[str], None] = lambda text: None) -> torch.distributed.Store | None:
    """A store that holds nothing of an earlier attempt, where torchrun's agent holds one for all of them; None where there is no such store.

    torchrun starts failed ranks again over the same store (unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), and its count of restarts differs between nodes.
    A rank would read there the addresses that a dead one left, and wait for it. So the first rank gives each attempt a name: it answers every rank that knocks
    under a name of its own, those that died long ago too, until all that live have said that they know.

    Args:
        told: hears which ranks are still waited for.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
    own = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    if rank:
        told("waits for ranks 0")
        store.set(f"knock/{rank}", own)
        attempt = store.get(f"answer/{own}").decode()
        told("process groups")
        store.set(f"known/{attempt}/{rank}", "")
        return torch.distributed.PrefixStore(attempt, store)
    answered, said = set[str](), ""
    missing, deadline = list(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        knocks = [store.get(f"knock/{other}").decode() for other in missing if store.check([f"knock/{other}"])]
        for name in set(knocks) - answered:
            store.set(f"answer/{name}", own)
        answered |= set(knocks)
        missing = [other for other in missing if not store.check([f"known/{own}/{other}"])]
        text = f"waits for ranks {', '.join(map(str, missing[:8]))}{' and others' if len(missing) > 8 else ''}" if missing else "process groups"
        if text != said:
            told(text)
            said = text
        if time.monotonic() > deadline:
            raise TrainingError(f"ranks {missing[:8]} of {world_size} did not come to the rendezvous within {timeout.total_seconds():.0f} s")
        time.sleep(0.05)
    return torch.distributed.PrefixStore(own, store)


def start(config: Config, told: Callable[[str], None] = lambda text: None) -> Coordinates:
    """Join the job that torchrun (or SLURM) started and build every group. A process started by hand is a job of one.

    Args:
        told: hears what is waited for.

    Returns:
        This rank's coordinates.
    """
    device.select(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        # Naming the device binds NCCL to it; otherwise the first barrier has to guess.
        bound = device.current() if device.has_gpu() else None
        timeout = group_timeout(config.watchdog)
        if "RANK" in os.environ:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            shared = rendezvous(rank, world_size, timeout, told)
            place: dict[str, Any] = {} if shared is None else {"store": shared, "rank": rank, "world_size": world_size}
            torch.distributed.init_process_group(device.backend(), timeout=timeout, device_id=bound, **place)
        else:
            store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
            torch.distributed.init_process_group(device.backend(), store=store, rank=0, world_size=1, timeout=timeout, device_id=bound)
    build_groups(config.parallel, group_timeout(config.watchdog))
    seed_everything(config.train.seed)
    return coordinates()


def build_groups(parallel: Parallel, timeout: datetime.timedelta = datetime.timedelta(minutes=30)) -> None:
    """megatron-core's groups for this layout. Expert tensor parallelism is always passed: left unset megatron-core would take tp."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / datetime.timedelta(minutes=1),
    )


def seed_everything(seed: int) -> None:
    """Seed torch, then megatron-core's generators per pipeline, tensor and expert rank."""
    import random

    import numpy

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def coordinates() -> Coordinates:
    """This rank's place in the groups that exist."""
    return Coordinates(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        tp=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
    )


def token_group() -> torch.distributed.ProcessGroup:
    """The ranks that see different tokens of the same layer: tensor (its sequence parts), context and data parallel."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def sequence_part(tensor_BS: torch.Tensor, cp_rank: int, cp_size: int) -> torch.Tensor:
    """A context-parallel rank's share of a batch, [B, S / cp_size]: parts r and 2 cp - 1 - r of 2 cp equal ones.

    Late tokens attend to more than early ones; pairing a late part with an early one gives every rank the same work. It is the split that
    Transformer Engine's attention and megatron-core's rotary embedding assume.
    """
    parts = tensor_BS.chunk(2 * cp_size, dim=1)
    return torch.cat([parts[cp_rank], parts[2 * cp_size - 1 - cp_rank]], dim=1)


def stop() -> None:
    """Leave the groups, so that another layout can be built in this process."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
