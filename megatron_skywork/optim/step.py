"""One optimizer step over lists of tensors that are made once, in a handful of launches, with one look at the device.

megatron-core's own step goes through the parameters in Python six times: it makes a view of each gradient, collects them for the norm, takes the norm of each
and, without Transformer Engine or apex, reads every one of these norms from the device, collects them again to clip, scales each, and copies each updated
master weight into the model. Here the views are made once, since the buffers of data parallelism never move, and torch works on the lists. The numbers are
megatron-core's to the last bit on a CPU; on a GPU torch's kernel for a list of norms may add in another order.

Two things are done otherwise. The weights of a chunk are gathered once a step, when all parts have been updated: megatron-core's parts (one for experts, one
for the rest) each gather everything. And fp16's loss scalers, one per part, move together: the loss is scaled by the first one alone, and megatron-core
lets each follow the gradients of its own part.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_skywork import device


def gradients_of(part: DistributedOptimizer) -> dict[Tensor, Tensor]:
    """Of every shard this rank updates, its gradient: a view into the buffer in which data parallelism reduces gradients, in fp32."""
    found = {}
    models = chain(*part.model_fp32_groups, *part.model_float16_groups)
    shards = chain(*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups)
    for model, shard in zip(models, shards, strict=True):
        where = part._get_model_param_range_map(model)["param"]
        found[shard] = model.main_grad.view(-1)[where.start : where.end]
    return found


class OptimizerStep:
    """The step of an optimizer. Everything it needs to know is read when it is made.

    Args:
        optimizer: of all chunks of this rank.
        clip_grad: largest global gradient norm; 0 means no clipping.
    """

    def __init__(self, optimizer: MegatronOptimizer, clip_grad: float):
        self._clip_grad = clip_grad
        self._parts: list[DistributedOptimizer] = list(getattr(optimizer, "chained_optimizers", [optimizer]))
        gradients = [gradients_of(part) for part in self._parts]
        self._gradients = [gradient for found in gradients for gradient in found.values()]
        self._counted: list[tuple[Any, list[Tensor], list[Tensor]]] = []
        for part, found in zip(self._parts, gradients, strict=True):
            self._count(part.get_grad_stats_parallel_group(), _counted_once(part, found), list(found.values()))
        # Shards kept in fp32 are views of the model's own parameters and need no copy.
        self._masters = [shard.detach() for part in self._parts for group in part.shard_fp32_from_float16_groups for shard in group]
        self._models = [shard for part in self._parts for group in part.shard_float16_groups for shard in group]
        self._scalers = [part.grad_scaler for part in self._parts if part.grad_scaler]
        chunks = {id(chunk): chunk for part in self._parts for chunk in part.model_chunks}.values()
        self._gathered = list(_gathered_at_once(chunks))

    @torch.no_grad()
    def __call__(self, numbers: Tensor, accepts: Callable[[float, list[float]], bool]) -> tuple[bool, float]:
        """Apply one update, unless a gradient is not finite or `accepts` says no; then nothing changes but fp16's loss scale.

        Norm and numbers are reduced over all ranks before they are looked at, so every rank decides alike.

        Args:
            numbers: float64, whatever else of this rank the decision needs; the host reads their sums together with the norm.
            accepts: is given the norm and the sums, the same on every rank; says whether the update may be applied.

        Returns:
            whether parameters changed, and the gradient norm before clipping.
        """
        if self._scalers:
            torch._foreach_mul_(self._gradients, self._scalers[0].inv_scale.reshape(()))
        norm, sums = self._norm(numbers)
        is_finite = math.isfinite(norm)
        for scaler in self._scalers:
            scaler.update(not is_finite)
        if not accepts(norm, sums) or not is_finite:
            return False, norm
        # 1e-6 as in megatron-core and torch: a norm of zero must not divide.
        clip = self._clip_grad / (norm + 1e-6)
        if 0 < clip < 1:
            torch._foreach_mul_(self._gradients, clip)
        for part in self._parts:
            part.optimizer.step()
        if self._masters:
            torch._foreach_copy_(self._models, self._masters)
        for bucket_group in self._gathered:
            bucket_group.start_param_sync()
        return True, norm

    def _count(self, ranks: Any, counted: list[Tensor], gradients: list[Tensor]) -> None:
        """Add gradients to those whose squares are summed over `ranks`; parts that share their ranks share the reduction."""
        places = {gradient.data_ptr() for gradient in counted}
        others = [gradient for gradient in gradients if gradient.data_ptr() not in places]
        for group, known, left_out in self._counted:
            if group == ranks:
                known.extend(counted)
                left_out.extend(others)
                return
        self._counted.append((ranks, counted, others))

    def _norm(self, numbers: Tensor) -> tuple[float, list[float]]:
        """Norm of all gradients of the model, and the sums of `numbers` over all ranks: all that the host waits for in a step.

        Copies that a norm leaves out still get a say in whether it is finite: a rank must not apply a NaN that no other rank counts.
        """
        squares = []
        for ranks, counted, others in self._counted:
            norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=device.current())]
            square = torch.linalg.vector_norm(torch.stack(norms)) ** 2
            if others:
                square = square + 0.0 * torch.linalg.vector_norm(torch.stack(torch._foreach_norm(others)))
            torch.distributed.all_reduce(square, group=ranks)
            squares.append(square)
        torch.distributed.all_reduce(numbers)
        read = torch.cat([torch.stack(squares).double(), numbers]).tolist()
        return float(sum(read[: len(squares)]) ** 0.5), read[len(squares) :]


def _counted_once(part: DistributedOptimizer, gradients: dict[Tensor, Tensor]) -> list[Tensor]:
    """Gradients that this rank adds to the global norm: megatron-core leaves out those of shared weights and of copies on other tensor-parallel ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it reads `.grad` of shards that are views of parameters
        for shard, gradient in gradients.items():
            shard.grad = gradient
        # The second is the name before megatron-core 0.17.
        counted = part.get_grads_for_grad_norm() if hasattr(part, "get_grads_for_grad_norm") else part.get_main_grads_for_grad_norm()
        for shard in gradients:
            shard.grad = None
    return list(counted)


def _gathered_at_once(chunks: Iterable[Any]) -> Iterable[Any]:
    """Groups of buckets whose weights are gathered at the end of a step. With overlap they are gathered as the next forward comes by; one rank has them all."""
    for chunk in chunks:
        if not chunk.ddp_config.overlap_param_gather:
            for bucket_group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                if bucket_group.intra_distributed_optimizer_instance_size > 1:
                    yield bucket_group
