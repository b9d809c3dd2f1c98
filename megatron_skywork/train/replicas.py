"""Are the copies of a parameter on several ranks still the same? A bit that flips in memory or on a wire changes one of them, and nobody notices.

Every copy is hashed on its device, the hashes are gathered over the ranks that hold the same tensors, one small collective a group, and compared there. With
the tensor's elements as integers x_i of its width, and odd weights w_i,

    hash = sum_i w_i x_i  mod 2^64 .

Integer sums come out the same in any order. A change of one element, by one bit or by all, is always found: it changes the sum by w_i d with 0 < |d| < 2^64,
and an odd w_i has an inverse modulo 2^64. Changes of several elements cancel only where their weighted differences sum to zero: about one chance in 2^32 for
two flips of the top bit of fp32, the worst case, and less for others.

What is compared: dense parameters over data and context parallelism; those that tensor parallelism copies (norms, routers) over its ranks too, and with them
the routers' coefficients, means and biases; experts over their own data parallelism. What cannot be: master weights and moments, which the distributed
optimizer keeps once. A flip there reaches all copies alike at the next update. And that update writes every copy anew from the masters, so that a flip in a
copy is there to be found until the end of its step: the comparison is made after forward and backward, before the update.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_skywork import device, parallel
from megatron_skywork.model.parameter_names import is_expert, named_parameters
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import MEANS_NAME
from megatron_skywork.moe.router_state import find_routers

# Elements hashed at a time; products take eight bytes each.
PIECE_NUMEL = 2**22 if device.has_gpu() else 2**18
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Odd numbers with bits all over, as int64; the first is 2^64 over the golden ratio.
_GOLDEN, _MIXER = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64
_SHOWN_NAMES = 3


def odd_weights(count: int, at: torch.device) -> Tensor:
    """`count` odd int64 that follow no pattern, the same everywhere. Integer products wrap modulo 2^64."""
    mixed = torch.arange(1, count + 1, device=at) * _GOLDEN
    mixed = (mixed ^ (mixed >> 29 & 2**35 - 1)) * _MIXER  # masked, or a shift would drag the sign along
    return (mixed ^ (mixed >> 32 & 2**32 - 1)) | 1


def checksum(tensor: Tensor, weights: Tensor) -> Tensor:
    """The hash of a tensor's bits, an int64 on its device; nothing waits.

    Args:
        weights: odd; a tensor with more elements is hashed in pieces of so many, each piece's sum with an odd weight of its own.
    """
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, piece in enumerate(bits.split(weights.numel())):
        weight_of_piece = ((2 * number + 1) * _GOLDEN + 2**63) % 2**64 - 2**63
        total = total + (piece * weights[: piece.numel()]).sum() * weight_of_piece
    return total


def odd_ones(hashes: Sequence[int]) -> list[int]:
    """Which of several copies differ from the majority: positions. All of them where no value has more than half; none where they are equal."""
    value, votes = Counter(hashes).most_common(1)[0]
    if votes == len(hashes):
        return []
    return [place for place, found in enumerate(hashes) if 2 * votes <= len(hashes) or found != value]


@dataclass(frozen=True)
class Suspect:
    """A rank with copies that differ from others."""

    rank: int
    host: str
    outvoted: bool
    """Most copies of the same tensor agree on something else; False: there is no majority, and any of them may be the wrong one."""
    num_tensors: int
    first: list[str]
    """Names of the first ones, in model order."""


@dataclass
class _Copies:
    """Tensors that all ranks of a group hold, in the same order."""

    group: ProcessGroup
    names: list[str]
    tensors: list[Tensor]
    gathered: Tensor | None = None


class ReplicaCheck:
    """Compares what this rank shares with others.

    Args:
        chunks: this rank's wrapped model chunks.
    """

    def __init__(self, chunks: list[Any]):
        dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
        everywhere, experts = parallel.token_group(), parallel_state.get_expert_data_parallel_group()
        by_group: dict[ProcessGroup, tuple[list[str], list[Tensor]]] = {group: ([], []) for group in (dense, everywhere, experts)}
        for name, parameter in named_parameters(chunks):
            is_split = getattr(parameter, "tensor_model_parallel", False)
            self._add(by_group, experts if is_expert(parameter) else dense if is_split else everywhere, name, parameter)
        for router in find_routers(chunks):
            for name in (COEFFICIENT_NAME, MEANS_NAME, "expert_bias"):
                if isinstance(getattr(router, name, None), Tensor):
                    self._add(by_group, everywhere, f"{name} of the router of layer {router.layer_number}", getattr(router, name))
        self._copies = [_Copies(group, *named) for group, named in by_group.items() if group.size() > 1 and named[0]]
        self._weights: Tensor | None = None

    @staticmethod
    def _add(by_group: dict[ProcessGroup, tuple[list[str], list[Tensor]]], group: ProcessGroup, name: str, tensor: Tensor) -> None:
        by_group[group][0].append(name)
        by_group[group][1].append(tensor)

    @torch.no_grad()
    def num_differing(self) -> Tensor:
        """How many tensors of this rank have a copy that differs, float64 on the device. A collective of all ranks; the host does not wait."""
        if self._weights is None:
            self._weights = odd_weights(PIECE_NUMEL, device.current())
        count = torch.zeros((), dtype=torch.float64, device=device.current())
        for copies in self._copies:
            own = torch.stack([checksum(tensor, self._weights) for tensor in copies.tensors])
            copies.gathered = own.new_empty(copies.group.size(), own.numel())
            torch.distributed.all_gather_into_tensor(copies.gathered.view(-1), own, group=copies.group)
            count += (copies.gathered != copies.gathered[0]).any(dim=0).sum()
        return count

    def are_any_differing(self) -> bool:
        """Whether any rank has a copy that differs; all get the same answer, and wait for it."""
        count = self.num_differing()
        torch.distributed.all_reduce(count)
        return bool(count > 0)

    def suspects(self) -> list[Suspect]:
        """Whose copies differ, by rank, after `num_differing` found some. Every rank calls it, and gets the same."""
        mine: list[tuple[str, bool]] = []
        for copies in self._copies:
            assert copies.gathered is not None
            for name, hashes in zip(copies.names, copies.gathered.T.tolist(), strict=True):
                odd = odd_ones(hashes)
                if copies.group.rank() in odd:
                    mine.append((name, len(odd) < len(hashes)))
        suspect = Suspect(
            rank=torch.distributed.get_rank(),
            host=socket.gethostname(),
            outvoted=any(outvoted for _, outvoted in mine),
            num_tensors=len(mine),
            first=[name for name, _ in mine[:_SHOWN_NAMES]],
        )
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, suspect if mine else None)
        return [suspect for suspect in found if suspect is not None]


def described(suspects: Sequence[Suspect]) -> str:
    """Who differs, in a sentence for people."""
    outvoted = [suspect for suspect in suspects if suspect.outvoted]
    if outvoted:
        return "; ".join(f"rank {suspect.rank} on {suspect.host} differs from the majority in {_tensors(suspect)}" for suspect in outvoted)
    ranks = " and ".join(f"{suspect.rank} on {suspect.host}" for suspect in suspects)
    return f"ranks {ranks} hold copies that differ, and no majority says which is wrong: {_tensors(suspects[0])}"


def _tensors(suspect: Suspect) -> str:
    return f"{suspect.num_tensors} tensor{'s' if suspect.num_tensors != 1 else ''}, first {suspect.first[0]}"
