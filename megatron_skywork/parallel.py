"""Process groups: start torch.distributed, hand the layout to megatron-core, seed every rank, and end it all in order."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_skywork import device
from megatron_skywork.config.schema import Config, Parallel, Watchdog


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


def start(config: Config) -> Coordinates:
    """Join the job that torchrun (or SLURM) started and build every group. A process started by hand is a job of one.

    Returns:
        This rank's coordinates.
    """
    device.select(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        # Naming the device binds NCCL to it; otherwise the first barrier has to guess.
        bound = device.current() if device.has_gpu() else None
        timeout = group_timeout(config.watchdog)
        if "RANK" in os.environ:
            torch.distributed.init_process_group(device.backend(), timeout=timeout, device_id=bound)
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
