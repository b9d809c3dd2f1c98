"""What a capacity limit throws away, measured where it happens.

megatron-core drops and forgets: it returns the map after dropping, and with padding to capacity that map is the capacity mask, which holds padding
too. Both cases give the same answer here because kept means "was routed, and is still in the returned map": padding was never routed, and a kept
assignment whose weight is exactly 0 (softmax can underflow) still counts as kept.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def routed_per_expert(routing_map_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Assignments routed to each expert before dropping, [E], float64 (exact for any batch, and ready to be summed with other statistics).

    Args:
        routing_map_TE: bool, before dropping.
        valid_T: bool, false for padding tokens, which are not counted; None when there are none.
    """
    return _counted(routing_map_TE, valid_T).sum(dim=0, dtype=torch.float64)


def count_dropped(routing_map_TE: Tensor, kept_map_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Assignments that were routed and not kept: a float64 scalar on the map's device.

    Args:
        routing_map_TE: bool, before dropping.
        kept_map_TE: bool, as the router returns it: routed and kept, or with padding to capacity the mask of filled slots.
        valid_T: bool, false for padding tokens, which are not counted.
    """
    return _counted(routing_map_TE & ~kept_map_TE.bool(), valid_T).sum(dtype=torch.float64)


def drop_rate(dropped: Tensor, routed: Tensor) -> Tensor:
    """Dropped over routed assignments, 0 where nothing was routed."""
    return dropped / routed.clamp(min=1.0)


def load_share(routed_per_expert: Tensor) -> Tensor:
    """Each expert's share of the routed assignments, along the last axis; rows sum to 1, or are 0 where nothing was routed."""
    return routed_per_expert / routed_per_expert.sum(dim=-1, keepdim=True).clamp(min=1.0)


def _counted(map_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    return map_TE if valid_T is None else map_TE & valid_T.unsqueeze(-1)
