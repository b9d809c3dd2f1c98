"""Bytes that this process really hands to torch.distributed, by kind of group and collective: what `plan/communication.py` is held against.

Every collective of every backend, blocking or not, coalesced or not, goes through torch's dispatcher as an operator of the namespace `c10d`. A dispatch
mode sees them all, backward included, whatever function of Python they came from; one it does not know is an error, so none is missed. Bytes are counted
as a ring sends them, and for an all-to-all as they leave for other ranks: the convention of plan/communication.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_skywork.moe.router import SkyworkRouter
from megatron_skywork.plan.communication import Traffic, ring

# megatron-core's names of its groups. What a pipeline sends goes by its operation: even ranks use all ranks' group for it.
GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp_ep",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "EXPERT_DATA_PARALLEL_GROUP": "expert_dp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EMBEDDING_GROUP": "embedding",
    "default_pg": "world",
}
_REDUCES = {"allreduce_", "allreduce_coalesced_"}
_GATHERS = {"_allgather_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"}
_SCATTERS = {"_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"}
_NOTHING_SENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}


@dataclass
class Sent:
    """What went into one kind of collective."""

    calls: int = 0
    num_bytes: float = 0.0


class CountTraffic(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        sent: by kind of group and operation, as in plan/communication.py; groups of one rank send nothing and are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[tuple[str, str], Sent] = defaultdict(Sent)

    @property
    def calls(self) -> int:
        """Collectives and sends of all kinds."""
        return sum(sent.calls for sent in self.sent.values())

    @property
    def num_bytes(self) -> float:
        """Of all kinds."""
        return sum(sent.num_bytes for sent in self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "_c10d_functional":
            raise LookupError(f"{func}: functional collectives are not counted here")
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        group = next(ProcessGroup.unbox(value) for value in args if isinstance(value, torch.ScriptObject))
        if name in _NOTHING_SENT or group.size() == 1:
            return
        operation, num_bytes = _sent(name, args, group)
        kind = "pp" if operation == "send" else GROUPS.get(group.group_desc, group.group_desc)
        record = self.sent[kind, operation]
        record.calls += 1
        record.num_bytes += num_bytes


def _sent(name: str, args: Sequence[Any], group: ProcessGroup) -> tuple[str, float]:
    """The operation, in the words of plan/communication.py, and the bytes this rank sends."""
    ranks = group.size()
    if name in _REDUCES:
        return "all_reduce", ring("all_reduce", ranks, _bytes(args[0]))
    if name in _GATHERS:
        return "all_gather", ring("all_gather", ranks, ranks * _bytes(args[1]))
    if name in _SCATTERS:
        return "reduce_scatter", ring("reduce_scatter", ranks, ranks * _bytes(args[0]))
    if name == "alltoall_base_":
        rows, splits = args[1], args[4]
        stays = splits[group.rank()] / sum(splits) if splits and sum(splits) else 1 / ranks
        return "all_to_all", _bytes(rows) - round(stays * _bytes(rows))
    if name == "alltoall_":
        return "all_to_all", _bytes(args[1]) - _bytes(args[1][group.rank()])
    if name == "send":
        return "send", _bytes(args[0])
    if name == "broadcast_":
        return "broadcast", (ranks - 1) / ranks * _bytes(args[0])
    if name == "gather_":
        return "gather", _bytes(args[1])
    if name == "scatter_":
        return "scatter", _bytes(args[1])
    raise LookupError(f"c10d::{name} is not known to the counter; say in scaling_traffic.py what a rank sends for it")


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def force_balance(routers: Iterable[SkyworkRouter]) -> None:
    """Have every router send as many tokens to each expert: the t-th token of a rank goes to the experts K t, K t + 1, ... of E, round and round."""
    for router in routers:
        router.gating = _round_robin(router.gating, router.topk, router.num_experts)  # type: ignore[method-assign]


def _round_robin(gating: Any, topk: int, experts: int) -> Any:
    def balanced(hidden: torch.Tensor) -> torch.Tensor:
        logits = gating(hidden)
        tokens = torch.arange(logits.numel() // experts, device=logits.device)
        chosen_TK = (tokens[:, None] * topk + torch.arange(topk, device=logits.device)) % experts
        wanted_TE = torch.zeros(tokens.numel(), experts, device=logits.device).scatter_(1, chosen_TK, 1.0)
        # The weights keep their place in the graph: their gradients are reduced as ever.
        return logits * 0.0 + wanted_TE.view_as(logits)

    return balanced


@dataclass(frozen=True)
class Row:
    """One kind of collective, of one rank or the mean of several.

    Args:
        group, operation, what: of `Traffic`.
        real, balanced: bytes counted, with the router as it is and one that is balanced by force.
        expected, most: of `Traffic`.
    """

    group: str
    operation: str
    what: str
    real: float
    balanced: float
    expected: float
    most: float


def rows(real: dict[tuple[str, str], float], balanced: dict[tuple[str, str], float], analytic: Sequence[Traffic]) -> list[Row]:
    """Counted beside analytic; what the analytic count leaves out (single numbers) is the last row."""
    found = [
        Row(t.group, t.operation, t.what, real.get((t.group, t.operation), 0.0), balanced.get((t.group, t.operation), 0.0), t.expected, t.most)
        for t in analytic
    ]
    known = {(row.group, row.operation) for row in found}
    rest = [sum(num_bytes for key, num_bytes in counted.items() if key not in known) for counted in (real, balanced)]
    return [*found, Row("", "", "single numbers", *rest, 0.0, 0.0)]
