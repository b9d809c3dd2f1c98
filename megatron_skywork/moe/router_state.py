"""Once per optimizer step: what all routers saw, reduced in one call; the next coefficients; and the numbers for the log.

A layer's drop rate is taken over the global batch, so the windows are summed over TP (sequence parallel) x CP x DP. All routers of a pipeline stage
share one all-reduce of [L, E + 8] float64: counts are exact in it, so every rank computes the same coefficients, in any order of reduction and
under any layout that drops the same tokens. Nothing here waits for the device except `gather_router_metrics`, which is for logging steps.

Shapes: L MoE layers of this rank (all its virtual stages), E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_skywork.moe.adaptive_aux import next_coefficient
from megatron_skywork.moe.drop_stats import drop_rate, load_share
from megatron_skywork.moe.router import WINDOW_SUMS, SkyworkRouter

# Per-layer scalars of a summary, in the order in which they travel between stages.
SERIES = ("drop_rate", "coefficient", "aux_loss", "z_loss", "entropy", "max1_over_max2", "max2_over_max3")


@dataclass(frozen=True)
class RouterSummary:
    """One step of this rank's MoE layers, on the device, in fp32. The loss values carry no coefficient."""

    layers: list[int]
    """Layer numbers, from 1, in the order of the rows."""
    load: Tensor
    """[L, E]: each expert's share of the routed assignments, before dropping; rows sum to 1."""
    drop_rate: Tensor
    """[L]: dropped over routed assignments."""
    coefficient: Tensor
    """[L]: the weight of the auxiliary loss in this step."""
    aux_loss: Tensor
    """[L]: mean over micro-batches and data-parallel ranks."""
    z_loss: Tensor
    """[L]: likewise, on the raw logits; 0 where the z-loss is off."""
    entropy: Tensor
    """[L]: nats, mean over tokens."""
    max1_over_max2: Tensor
    """[L]: mean over tokens."""
    max2_over_max3: Tensor
    """[L]: mean over tokens."""


def find_routers(model_chunks: torch.nn.Module | Iterable[torch.nn.Module]) -> list[SkyworkRouter]:
    """The routers of this rank's model chunks, in model order, however deep they are wrapped."""
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else model_chunks
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, SkyworkRouter)]


@torch.no_grad()
def update_coefficients(routers: Sequence[SkyworkRouter], group: ProcessGroup | None, *, skipped: bool) -> RouterSummary:
    """Close the step: reduce the windows, move the coefficients that adapt, clear the windows. Call once per optimizer step, after it.

    Args:
        routers: of this rank; the same layers in the same order on every rank of `group`.
        group: TP x CP x DP, `parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)`; None for a lone process.
        skipped: the optimizer did not step (non-finite gradients), so the coefficients stay.

    Returns:
        The step's numbers, with the coefficients that it was trained with.
    """
    if not routers:
        empty = torch.zeros(0)
        return RouterSummary(layers=[], load=torch.zeros(0, 0), **{name: empty for name in SERIES})
    windows = torch.stack([router.window for router in routers])
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(windows, group=group)
    experts = routers[0].num_experts
    routed_LE = windows[:, :experts]
    sums = dict(zip(WINDOW_SUMS, windows[:, experts:].unbind(dim=1), strict=True))
    routed = routed_LE.sum(dim=1)
    rates = drop_rate(sums["dropped"], routed)
    coefficients = torch.stack([router.aux_coefficient for router in routers])

    tokens, micro_batches = sums["tokens"].clamp(min=1.0), sums["micro_batches"].clamp(min=1.0)
    summary = RouterSummary(
        layers=[_layer_number(router) for router in routers],
        load=load_share(routed_LE).float(),
        drop_rate=rates.float(),
        coefficient=coefficients,
        aux_loss=(sums["aux_loss"] / micro_batches).float(),
        z_loss=(sums["z_loss"] / micro_batches).float(),
        entropy=(sums["entropy"] / tokens).float(),
        max1_over_max2=(sums["max1_over_max2"] / tokens).float(),
        max2_over_max3=(sums["max2_over_max3"] / tokens).float(),
    )
    adaptive = routers[0].moe.adaptive
    if adaptive.enabled and not skipped:
        moved = next_coefficient(coefficients, rates, sensitivity=adaptive.sensitivity, maximum=adaptive.maximum, momentum=adaptive.momentum)
        # A layer that routed nothing has no drop rate, and learns nothing from it.
        torch._foreach_copy_([router.aux_coefficient for router in routers], list(torch.where(routed > 0, moved, coefficients).unbind()))
    torch._foreach_zero_([router.window for router in routers])
    return summary


def gather_router_metrics(summary: RouterSummary, pipeline_group: ProcessGroup | None) -> dict[str, list[Any]]:
    """The `router` part of a metrics record, for the whole model, on every rank of the pipeline group; waits for the device.

    Args:
        summary: of this rank; stages may hold different numbers of MoE layers, or none.
        pipeline_group: the stages of one model replica; None for a model in one piece.

    Returns:
        `layers` (from 1, ascending), `load` (a list per layer) and one list per name in `SERIES`; empty lists for a dense model.
    """
    columns = torch.cat([torch.stack([getattr(summary, name) for name in SERIES], dim=1), summary.load], dim=1)
    rows = [(layer, row) for layer, row in zip(summary.layers, columns.tolist(), strict=True)]
    if pipeline_group is not None and pipeline_group.size() > 1:
        stages: list[Any] = [None] * pipeline_group.size()
        torch.distributed.all_gather_object(stages, rows, group=pipeline_group)
        rows = [row for stage in stages for row in stage]
    rows.sort(key=lambda row: row[0])
    metrics: dict[str, list[Any]] = {"layers": [layer for layer, _ in rows], "load": [row[len(SERIES) :] for _, row in rows]}
    metrics.update({name: [row[index] for _, row in rows] for index, name in enumerate(SERIES)})
    return metrics


def _layer_number(router: SkyworkRouter) -> int:
    if router.layer_number is None:
        raise ValueError("a router has no layer number; MoELayer.set_layer_number gives it one when the model is built")
    return int(router.layer_number)
