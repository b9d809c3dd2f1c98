"""Once per optimizer step: what all routers saw, reduced in one call; the next coefficients; and the numbers for the log.

A layer's drop rate is taken over the global batch, so the windows are summed over TP (sequence parallel) x CP x DP. All routers of a pipeline stage
share one all-reduce of a few float64 per expert: counts are exact in it, so every rank computes the same coefficients, in any order of reduction and
under any layout that drops the same tokens. Nothing here waits for the device except `gather_router_metrics`, which is for logging steps.

Shapes: L MoE layers of this rank (all its virtual stages), E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_skywork.moe.adaptive_aux import next_coefficient
from megatron_skywork.moe.aux_loss import balance_loss
from megatron_skywork.moe.aux_schedule import schedule_factor
from megatron_skywork.moe.drop_stats import drop_rate, load_share
from megatron_skywork.moe.router import WINDOW_SUMS, SkyworkRouter
from megatron_skywork.moe.router_health import summarize_load

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
    """[L]: the main loss; mean over its scope, micro-batches and data-parallel ranks."""
    z_loss: Tensor
    """[L]: likewise, on the raw logits; 0 where the z-loss is off."""
    entropy: Tensor
    """[L]: nats, mean over tokens."""
    max1_over_max2: Tensor
    """[L]: mean over tokens."""
    max2_over_max3: Tensor
    """[L]: mean over tokens."""
    extra_aux_losses: dict[str, Tensor] = field(default_factory=dict)
    """[L] for each further loss, named loss_scope."""


def find_routers(model_chunks: torch.nn.Module | Iterable[torch.nn.Module]) -> list[SkyworkRouter]:
    """The routers of this rank's model chunks, in model order, however deep they are wrapped."""
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else model_chunks
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, SkyworkRouter)]


def schedule_coefficients(routers: Sequence[SkyworkRouter], step: int) -> None:
    """Set the coefficients of `step` where they follow a schedule. Call before its first forward.

    Args:
        routers: of this rank.
        step: of the optimizer, from 1.
    """
    if routers and routers[0].moe.aux_schedule:
        factor = schedule_factor(routers[0].moe.aux_schedule, step)
        for router in routers:
            router.aux_coefficient.fill_(factor * router.first_coefficient)


def observe(routers: Sequence[SkyworkRouter], *, health: bool) -> None:
    """Have the routers count what people look at too, or only what coefficients and losses need."""
    for router in routers:
        router.observes = "health" if health else "drops" if router.moe.adaptive.enabled or hasattr(router, "batch_means") else "nothing"


def expert_biases(routers: Sequence[SkyworkRouter]) -> list[Tensor]:
    """Copies of the biases that megatron-core moves while it reduces gradients; empty without the option."""
    return [router.expert_bias.clone() for router in routers if router.enable_expert_bias]


def restore_expert_biases(routers: Sequence[SkyworkRouter], biases: Sequence[Tensor]) -> None:
    """Put copies back: a step that is refused leaves no trace, and its routing may have been nonsense."""
    if biases:
        torch._foreach_copy_([router.expert_bias for router in routers if router.enable_expert_bias], list(biases))


@torch.no_grad()
def update_coefficients(routers: Sequence[SkyworkRouter], group: ProcessGroup | None, *, skipped: bool) -> RouterSummary:
    """Close the step: reduce the windows, move the coefficients that adapt, clear the windows. Call once per optimizer step, after it.

    Args:
        routers: of this rank; the same layers in the same order on every rank of `group`.
        group: TP x CP x DP, `parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)`; None for a lone process.
        skipped: the optimizer did not step (non-finite gradients), so the coefficients stay.

    Returns:
        The step's numbers, with the coefficients that it was trained with. What is not observed is 0.
    """
    if not routers:
        empty = torch.zeros(0)
        return RouterSummary([], torch.zeros(0, 0), empty, empty, empty, empty, empty, empty, empty)
    windows = torch.stack([router.window for router in routers])
    if group is not None and group.size() > 1 and routers[0].observes != "nothing":
        torch.distributed.all_reduce(windows, group=group)
    experts, losses = routers[0].num_experts, routers[0].losses
    routed_LE, gate_LE, sums_LX, loss_LX = windows.split([experts, experts, len(WINDOW_SUMS), len(losses)], dim=1)
    sums = dict(zip(WINDOW_SUMS, sums_LX.unbind(dim=1), strict=True))
    routed = routed_LE.sum(dim=1)
    rates = drop_rate(sums["dropped"], routed)
    coefficients = torch.stack([router.aux_coefficient for router in routers])

    tokens, micro_batches = sums["tokens"].clamp(min=1.0), sums["micro_batches"].clamp(min=1.0)
    mean_gate_LE, load_LE = gate_LE / tokens.unsqueeze(1), load_share(routed_LE)
    values = [
        (balance_loss(kind, mean_gate_LE, load_LE) if scope == "global_batch" else loss_LX[:, index] / micro_batches).float()
        for index, (kind, scope) in enumerate(losses)
    ]
    summary = RouterSummary(
        layers=[_layer_number(router) for router in routers],
        load=load_LE.float(),
        drop_rate=rates.float(),
        coefficient=coefficients,
        aux_loss=values[0] if values else torch.zeros_like(coefficients),
        z_loss=(sums["z_loss"] / micro_batches).float(),
        entropy=(sums["entropy"] / tokens).float(),
        max1_over_max2=(sums["max1_over_max2"] / tokens).float(),
        max2_over_max3=(sums["max2_over_max3"] / tokens).float(),
        extra_aux_losses={f"{kind}_{scope}": value for (kind, scope), value in zip(losses[1:], values[1:], strict=True)},
    )
    if not skipped:
        _move(routers, coefficients, rates, torch.stack([mean_gate_LE, load_LE], dim=1), routed > 0)
    torch._foreach_zero_([router.window for router in routers])
    return summary


def _move(routers: Sequence[SkyworkRouter], coefficients: Tensor, rates: Tensor, means_L2E: Tensor, has_routed: Tensor) -> None:
    """What the step's statistics change for the next one. A layer that routed nothing has no drop rate and no means, and learns nothing from them."""
    adaptive = routers[0].moe.adaptive
    if adaptive.enabled:
        moved = next_coefficient(coefficients, rates, sensitivity=adaptive.sensitivity, maximum=adaptive.maximum, momentum=adaptive.momentum)
        torch._foreach_copy_([router.aux_coefficient for router in routers], list(torch.where(has_routed, moved, coefficients).unbind()))
    if any(scope == "global_batch" for _, scope in routers[0].losses):
        kept_L2E = torch.stack([router.batch_means for router in routers])
        moved_L2E = torch.where(has_routed[:, None, None], means_L2E.float(), kept_L2E)
        torch._foreach_copy_([router.batch_means for router in routers], list(moved_L2E.unbind()))


def gather_router_metrics(summary: RouterSummary, pipeline_group: ProcessGroup | None) -> dict[str, Any]:
    """The `router` part of a metrics record, for the whole model, on every rank of the pipeline group; waits for the device.

    Args:
        summary: of this rank; stages may hold different numbers of MoE layers, or none.
        pipeline_group: the stages of one model replica; None for a model in one piece.

    Returns:
        `layers` (from 1, ascending), `load` (a list per layer), one list per name in `SERIES`, what `summarize_load` makes of the load, and
        `extra_aux_losses` (a list per name) where there are any; empty lists for a dense model.
    """
    rows = _rows(summary)
    if pipeline_group is not None and pipeline_group.size() > 1:
        stages: list[Any] = [None] * pipeline_group.size()
        torch.distributed.all_gather_object(stages, rows, group=pipeline_group)
        rows = [row for stage in stages for row in stage]
    rows.sort(key=lambda row: row["layers"])
    names = [*(rows[0] if rows else ("layers", "load", *SERIES))]
    extras = [name for name in names if name.startswith(_EXTRA)]
    metrics: dict[str, Any] = {name: [row[name] for row in rows] for name in names if name not in extras}
    if extras:
        metrics["extra_aux_losses"] = {name.removeprefix(_EXTRA): [row[name] for row in rows] for name in extras}
    return metrics


_EXTRA = "extra_aux_losses."


def _rows(summary: RouterSummary) -> list[dict[str, Any]]:
    """What there is to say of each layer of this rank, as plain numbers; one copy from the device."""
    if not summary.layers:
        return []
    load = summarize_load(summary.load)
    p10, p50, p90 = load.percentiles
    columns = {name: getattr(summary, name) for name in SERIES}
    columns |= {"load_max_over_mean": load.max_over_mean, "load_variation": load.variation, "load_p10": p10, "load_p50": p50, "load_p90": p90}
    columns |= {_EXTRA + name: value for name, value in summary.extra_aux_losses.items()}
    table = torch.cat([torch.stack(list(columns.values()), dim=1), summary.load, load.is_dead.float()], dim=1).tolist()
    experts = summary.load.shape[1]
    rows = []
    for layer, numbers in zip(summary.layers, table, strict=True):
        dead = [expert for expert, flag in enumerate(numbers[-experts:]) if flag]
        row = {"layers": layer, "load": numbers[-2 * experts : -experts], **dict(zip(columns, numbers, strict=False))}
        rows.append(row | {"dead_experts": len(dead), "dead_expert_ids": dead})
    return rows


def _layer_number(router: SkyworkRouter) -> int:
    if router.layer_number is None:
        raise ValueError("a router has no layer number; MoELayer.set_layer_number gives it one when the model is built")
    return int(router.layer_number)
