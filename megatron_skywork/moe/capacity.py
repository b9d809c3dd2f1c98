"""Which assignments an expert keeps when more tokens want it than it has slots.

Every expert ranks the tokens that chose it, by probability or by position, and keeps the first `capacity` of them; the rest is dropped and lives on
in the residual stream alone. megatron-core ranks the tokens of one rank after the sequence has been split, so another tensor-parallel degree drops
other tokens. `slots_of_group` ranks the tokens of the whole micro-batch instead: each rank gathers the others' priorities ([T, E] numbers, a
thousandth of the activations), ranks all of them alike and takes its own rows. Ties go to the earlier token everywhere, which `topk` does not promise.

Shapes: T tokens of this rank, G tokens of the group, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# Priorities of what has no probability to be ranked by: padding tokens after every real one, and then tokens that did not choose the expert, which
# fill slots only where slots are padded.
_PADDING, _NOT_ROUTED = -0.5, -1.0


def drop_priority(probs_TE: Tensor, routed_TE: Tensor, policy: str, valid_T: Tensor | None = None) -> Tensor:
    """What tokens are ranked by, [T, E] fp32, higher first; equal ones in order of position.

    Args:
        probs_TE: weights of the chosen experts, from 0 to 1.
        routed_TE: bool, before dropping.
        policy: `probs`, the most probable first, or `position`, the first in the sequence.
        valid_T: bool, false for padding tokens, which take no slot from others; None when there are none.
    """
    if policy not in ("probs", "position"):
        raise ValueError(f"drop policy {policy!r} is not known; use probs or position")
    wanted_TE = probs_TE.detach().float() if policy == "probs" else torch.ones_like(probs_TE, dtype=torch.float32)
    if valid_T is not None:
        wanted_TE = wanted_TE.masked_fill(~valid_T.unsqueeze(-1), _PADDING)
    return wanted_TE.masked_fill(~routed_TE, _NOT_ROUTED)


def slots(priority_TE: Tensor, capacity: int) -> Tensor:
    """The `capacity` first tokens of every expert, bool [T, E]; all tokens where there are not more. Whoever did not choose the expert comes last."""
    if capacity >= priority_TE.shape[0]:
        return torch.ones_like(priority_TE, dtype=torch.bool)
    order_ET = priority_TE.t().contiguous().argsort(dim=-1, descending=True, stable=True)
    taken_ET = torch.zeros(order_ET.shape, dtype=torch.bool, device=priority_TE.device).scatter_(1, order_ET[:, :capacity], True)
    return taken_ET.t()


def slots_of_group(priority_TE: Tensor, capacity: int, group: ProcessGroup | None, cp_size: int = 1) -> Tensor:
    """`slots` among the tokens of all ranks of `group`, this rank's rows.

    Args:
        priority_TE: of this rank; the same number of tokens on every rank.
        capacity: slots of an expert for the whole group.
        group: TP x CP, tensor-parallel ranks next to each other; None or one rank for a sequence in one piece.
        cp_size: context-parallel degree, whose ranks hold the sequence in a zigzag.
    """
    if group is None or group.size() == 1 or capacity >= group.size() * priority_TE.shape[0]:
        return slots(priority_TE, capacity)
    tokens, experts = priority_TE.shape
    gathered_GE = priority_TE.new_empty(group.size() * tokens, experts)
    torch.distributed.all_gather_into_tensor(gathered_GE, priority_TE.contiguous(), group=group)
    taken_GE = by_rank(slots(by_position(gathered_GE, cp_size), capacity), cp_size)
    return taken_GE[group.rank() * tokens : (group.rank() + 1) * tokens]


def by_position(ranked_GE: Tensor, cp_size: int) -> Tensor:
    """Rows in the order of the ranks, put in the order of the sequence: with c context-parallel ranks, rank r holds pieces r and 2c - 1 - r of 2c."""
    if cp_size == 1:
        return ranked_GE
    early, late = ranked_GE.reshape(cp_size, 2, -1, ranked_GE.shape[-1]).unbind(dim=1)
    return torch.cat([early, late.flip(0)]).reshape(ranked_GE.shape)


def by_rank(positioned_GE: Tensor, cp_size: int) -> Tensor:
    """The inverse of `by_position`."""
    if cp_size == 1:
        return positioned_GE
    pieces = positioned_GE.reshape(2 * cp_size, -1, positioned_GE.shape[-1])
    return torch.stack([pieces[:cp_size], pieces[cp_size:].flip(0)], dim=1).reshape(positioned_GE.shape)
