"""Where values that are not finite came from: which ranks made them, and the first parameters they reached. Looked for only when a step is refused.

A gradient that is not finite looks the same to the whole job once it has been reduced; who made it is still written in the buffers. Data parallelism reduces
gradients by a reduce-scatter in place: a rank's own shard then holds the sum over all ranks, and the rest of its buffer what this rank had added. So a value
outside of a rank's shard that is not finite is that rank's own. One inside came from a rank that has it outside of its shard; from this rank, if there is none.

Backward runs from the last layer to the first, and hands a NaN on to all that come after. Names are therefore given in the order of backward.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_skywork.model.parameter_names import is_expert, named_parameters

_SHOWN_NAMES = 3
_SHOWN_SOURCES = 8


def made_here(outside: Sequence[set[int]], inside: Sequence[set[int]], rank: int) -> set[int]:
    """Which parameters' values that are not finite began with one of the ranks that share them.

    Args:
        outside: of each rank, parameters with such a value outside of the shard it updates.
        inside: the same within its shard.
        rank: the one that is asked about.
    """
    elsewhere = set().union(*outside)
    return outside[rank] | (inside[rank] - elsewhere)


@torch.no_grad()
def nonfinite_sources(chunks: list[Any], optimizer: MegatronOptimizer, loss_sum: Tensor | None) -> list[dict[str, Any]]:
    """The ranks whose loss or gradients were not finite, with the first parameters of each. Every rank calls it, and gets the same.

    Empty where the norm overflowed and every gradient by itself is finite.

    Args:
        loss_sum: of this rank's tokens; None on stages that see no loss.
    """
    named = named_parameters(chunks)[::-1]
    outside, inside = _where_not_finite([parameter for _, parameter in named], optimizer)
    mine: set[int] = set()
    for experts, group in (
        (False, parallel_state.get_data_parallel_group(with_context_parallel=True)),
        (True, parallel_state.get_expert_data_parallel_group()),
    ):
        kind = {index for index, (_, parameter) in enumerate(named) if is_expert(parameter) == experts}
        answers: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(answers, (outside & kind, inside & kind), group=group)
        mine |= made_here([answer[0] for answer in answers], [answer[1] for answer in answers], group.rank())
    loss_is_bad = loss_sum is not None and not bool(torch.isfinite(loss_sum))
    rank = torch.distributed.get_rank()
    source = {
        "rank": rank,
        "host": socket.gethostname(),
        "loss": loss_is_bad,
        "parameters": len(mine),
        "first": [_described(*named[index]) for index in sorted(mine)[:_SHOWN_NAMES]],
    }
    sources: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sources, source if mine or loss_is_bad else None)
    found = sorted((source for source in sources if source is not None), key=lambda source: (not source["loss"], source["rank"]))
    return found[:_SHOWN_SOURCES]


def _where_not_finite(parameters: list[torch.nn.Parameter], optimizer: MegatronOptimizer) -> tuple[set[int], set[int]]:
    """Parameters whose gradient is not finite outside of the shard this rank updates, and within it."""
    shards: dict[Tensor, tuple[int, int]] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in chain(*part.model_fp32_groups, *part.model_float16_groups):
            where = part._get_model_param_range_map(parameter)["param"]
            shards[parameter] = (where.start, where.end)
    pieces, places = [], []
    for index, parameter in enumerate(parameters):
        gradient: Tensor = parameter.main_grad.view(-1)  # type: ignore[attr-defined]
        start, end = shards.get(parameter, (0, 0))
        for is_inside, piece in ((False, gradient[:start]), (True, gradient[start:end]), (False, gradient[end:])):
            if piece.numel():
                pieces.append(piece)
                places.append((is_inside, index))
    bad = (~torch.isfinite(torch.stack(torch._foreach_norm(pieces)))).tolist()
    found: tuple[set[int], set[int]] = (set(), set())
    for (is_inside, index), is_bad in zip(places, bad, strict=True):
        if is_bad:
            found[is_inside].add(index)
    return found


def _described(name: str, parameter: torch.nn.Parameter) -> str:
    """The name; of a tensor that holds the experts of a rank, also which of them."""
    if not is_expert(parameter) or parameter.dim() != 3:
        return name
    finite_E = torch.isfinite(parameter.main_grad).flatten(1).all(dim=1)  # type: ignore[attr-defined]
    first = parallel_state.get_expert_model_parallel_rank() * parameter.shape[0]
    experts = [str(first + local) for local, is_finite in enumerate(finite_E.tolist()) if not is_finite]
    return f"{name} (expert{'s' if len(experts) > 1 else ''} {', '.join(experts)})"
