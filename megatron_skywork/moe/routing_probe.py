"""Whether tokens still change experts: the same tokens are routed at every evaluation, and each router remembers where it sent them the last time.

The probe is the first micro-batch of an evaluation. Every model chunk, on whatever pipeline stage, sees the micro-batches in order, so each router takes
the first one it sees and is deaf to the others.

Shapes: T tokens of this rank in a micro-batch, E experts, L MoE layers of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class RoutingProbe:
    """One router's memory of the probe's routing, kept on the device.

    Args:
        memory: what another one answered as its `memory`, to go on with.
    """

    def __init__(self, memory: Tensor | None = None) -> None:
        self._previous: Tensor | None = memory
        self._current: Tensor | None = None
        self._is_listening = False

    def listen(self) -> None:
        """Take the next routing map. Called when an evaluation begins."""
        self._current = None
        self._is_listening = True

    def memory(self) -> Tensor | None:
        """What the next evaluation is compared with: bool [T, E] in host memory; None before the first."""
        return None if self._previous is None else self._previous.cpu()

    def see(self, routing_map_TE: Tensor) -> None:
        """Called by the router in evaluation mode, with the assignments before any is dropped."""
        if self._is_listening:
            self._current = routing_map_TE.detach().to(torch.bool, copy=True)
            self._is_listening = False

    def compare(self) -> Tensor:
        """Tokens whose set of experts is another one than at the comparison before, and tokens compared: float64 [2], both 0 the first time.

        Raises:
            RuntimeError: the router has not run since `listen`, or the probe has another shape than before.
        """
        if self._current is None:
            raise RuntimeError("the routing probe saw nothing: its router did not run in evaluation mode")
        before_TE, now_TE = self._previous, self._current
        self._previous, self._current = now_TE, None
        if before_TE is None:
            return torch.zeros(2, dtype=torch.float64, device=now_TE.device)
        if before_TE.shape != now_TE.shape:
            shapes = f"{list(now_TE.shape)} and was {list(before_TE.shape)}"
            raise RuntimeError(f"the routing probe is {shapes}; every evaluation must begin with the same micro-batch")
        changed = (before_TE != now_TE).any(dim=1).sum(dtype=torch.float64)
        return torch.stack([changed, torch.full_like(changed, now_TE.shape[0])])


def changed_shares(probes: Sequence[RoutingProbe], group: ProcessGroup | None) -> list[float | None]:
    """For each layer the share of the probe's tokens that changed experts since the comparison before; None the first time. Waits for the device.

    Args:
        probes: of this rank; the same layers in the same order on every rank of `group`.
        group: ranks that see other tokens of the same layers, TP x CP x DP; None for a lone process. One all-reduce serves all layers.
    """
    if not probes:
        return []
    sums_L2 = torch.stack([probe.compare() for probe in probes])
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(sums_L2, group=group)
    return [changed / tokens if tokens else None for changed, tokens in sums_L2.tolist()]
