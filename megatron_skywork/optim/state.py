"""The optimizer's state in the shape of the weights, for checkpoints, without holding it twice.

megatron-core's `fully_reshardable` format gathers master weights and moments into flat buffers of the whole group before it cuts them into the shapes of the
weights: buffers for the result, for this rank's part, for what is received and for its concatenation, about 30 bytes a parameter where 12 are saved. For a
model whose optimizer just fits, the first save is then what runs out of memory. Here a group of one rank hands out the state itself, and a
larger one gathers a piece at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

KEYS = ("param", "exp_avg", "exp_avg_sq")
# Numbers the first rank receives at once, in fp32: what gathering needs beside the result and each rank's own part of a bucket.
GATHERED_AT_ONCE = 2**25


def save_without_copies(optimizer: MegatronOptimizer) -> None:
    """Make the parts of `optimizer` give their state as this module does; doing it again changes nothing."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = functools.partial(whole_state, part)


class OwnState:
    """Stands in for a flat buffer when this rank holds everything: a parameter's range is answered with the parameter's own state, not a copy.

    Checkpoints hold fp32, whatever moments are kept in, so that the next start may keep them in something else. What has to be widened for that is widened in
    the host's memory, where it is written from (or read to) anyway.

    Args:
        optimizer: whose state.
        buffer: megatron-core's buffer, whose ranges are asked for.
        key: one of KEYS.
    """

    def __init__(self, optimizer: DistributedOptimizer, buffer: Any, key: str):
        self._optimizer, self._key = optimizer, key
        self._param_at = {start: param for param, (start, _, _) in buffer.param_index_map.items()}

    def __getitem__(self, where: slice) -> Tensor:
        state = self._optimizer._get_main_param_and_optimizer_states(self._param_at[where.start])[self._key].detach().flatten()
        return state if state.dtype == torch.float32 else state.to("cpu", torch.float32)


def whole_state(
    optimizer: DistributedOptimizer, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict[Any, Any] | None:
    """What megatron-core's `get_parameter_state_dp_zero` returns, with the same arguments: per buffer and dtype, KEYS -> state of all parameters in the buffer.

    Args:
        use_gloo_comm: gather over the gloo group.
        empty_data: give buffers to load into.
        return_on_all_ranks: else on the first rank of the group alone, and None elsewhere.
    """
    group = optimizer.data_parallel_group_gloo if use_gloo_comm else optimizer.data_parallel_group
    is_receiver = return_on_all_ranks or group.rank() == 0
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        ((dtype, buckets),) = ranges.items()
        buffer = optimizer.buffers[index]
        whole: dict[str, Any] = {"numel_unpadded": buffer.numel_unpadded} if is_receiver else {}
        for key in KEYS:
            if group.size() == 1:
                whole[key] = OwnState(optimizer, buffer, key)
                continue
            # Saving writes the first rank's copy; the others only stand by with the right shape, in four bytes.
            keeps = empty_data or group.rank() == 0
            target = torch.zeros(buffer.numel_unpadded) if keeps and is_receiver else None
            if not empty_data:
                _gather(optimizer, buffer, buckets, key, group, target)
            if is_receiver:
                whole[key] = torch.zeros(()).expand(buffer.numel_unpadded) if target is None else target
        state[index] = {dtype: whole}
    return state if is_receiver else None


def _gather(optimizer: DistributedOptimizer, buffer: Any, buckets: list[Any], key: str, group: Any, target: Tensor | None) -> None:
    """Collect one kind of state of a buffer into `target`, which the first rank has; padding between buckets is left out.

    Every rank sends its own part and no more, in as many rounds as the buffer is long, however many ranks share it.
    """
    first, ranks, offset = torch.distributed.get_global_rank(group, 0), group.size(), 0
    for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
        part_numel = bucket.grad_data.numel() // ranks
        own = torch.zeros(part_numel, device=bucket.grad_data.device)
        for param, where in ranges["param_map"].items():
            local = where["gbuf_local"]
            own[local.start : local.end].copy_(optimizer._get_main_param_and_optimizer_states(param)[key].detach())
        step = max(1, GATHERED_AT_ONCE // ranks)
        for begin in range(0, part_numel, step):
            piece = own[begin : begin + step]
            received = None if target is None else [torch.empty_like(piece) for _ in range(ranks)]
            torch.distributed.gather(piece, received, dst=first, group=group)
            for sender, part in enumerate(received or []):
                start = sender * part_numel + begin
                end = min(start + part.numel(), bucket.numel_unpadded)
                if target is not None and end > start:
                    target[offset + start : offset + end].copy_(part[: end - start])
        offset += bucket.numel_unpadded
