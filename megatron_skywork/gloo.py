"""What gloo, torch.distributed's backend on CPU, lacks for megatron-core's groups and collectives."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch


def complete() -> None:
    """Put it into torch.distributed, for this process. `device.prepare()` does, on a machine without a GPU."""
    _share_one_device()
    torch.distributed.all_gather = _gather_uneven(torch.distributed.all_gather)
    torch.distributed.reduce_scatter = _reduce_scatter_uneven(torch.distributed.reduce_scatter)


def _share_one_device() -> None:
    """Let all groups of this process use one gloo device.

    gloo opens a device, with a thread that polls it, for every group, and keeps it when the group is gone. parallel_state.py makes some thirty groups.
    """
    c10d: Any = torch.distributed.distributed_c10d
    original = c10d.ProcessGroupGloo
    shared: list[Any] = []

    class StillGloo(type(original)):  # type: ignore[misc]
        """A group that comes back from C++ is of the original class."""

        def __instancecheck__(cls, instance: Any) -> bool:
            return type.__instancecheck__(original, instance)

    class SharedDeviceGloo(original, metaclass=StillGloo):  # type: ignore[misc,valid-type]
        def __init__(self, store: Any, rank: int, size: int, timeout: Any):
            if not shared:
                # As torch does for its own devices: the interfaces that were named, or what the host's name stands for.
                interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
                shared.extend([original.create_device(interface=name) for name in interfaces] or [original.create_default_device()])
            options = original._Options()
            options._devices, options._timeout = list(shared), timeout
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = SharedDeviceGloo


def _gather_uneven(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """gloo gathers equal sizes only; expert tensor parallelism (tensor_parallel/mappings.py) gathers what was routed to each rank. Pad, gather, cut."""

    @functools.wraps(all_gather)
    def gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rows = max(part.shape[0] for part in tensor_list)
        padded = [tensor.new_empty(rows, *tensor.shape[1:]) for _ in tensor_list]
        all_gather(padded, _with_rows(tensor, rows), group=group)
        for part, whole in zip(tensor_list, padded, strict=True):
            part.copy_(whole[: part.shape[0]])
        return None

    return gather


def _reduce_scatter_uneven(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """The way back of `_gather_uneven`."""
    sum_up = torch.distributed.ReduceOp.SUM

    @functools.wraps(reduce_scatter)
    def scatter(output: torch.Tensor, input_list: list[torch.Tensor], op: Any = sum_up, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in input_list}) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        rows = max(part.shape[0] for part in input_list)
        whole = output.new_empty(rows, *output.shape[1:])
        reduce_scatter(whole, [_with_rows(part, rows) for part in input_list], op=op, group=group)
        output.copy_(whole[: output.shape[0]])
        return None

    return scatter


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])
