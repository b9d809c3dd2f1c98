"""How alike a layer's experts are: the mean cosine between the weights of two of them, all matrices of an expert taken as one vector.

Upcycled experts begin as copies (1) and random ones are all but orthogonal (0); in between the number tells how far experts have gone their own ways.
With unit vectors u_e of E experts no pair has to be looked at, since

    || sum_e u_e ||^2  =  sum_e || u_e ||^2  +  sum_(e != f) u_e . u_f
    mean over pairs    =  (|| sum_e u_e ||^2  -  Z) / (E (E - 1)),        Z = number of experts that are not zero.

So no rank needs another's experts, only their sum, which is formed and reduced piece by piece. Squares are summed in float64: the difference above loses
digits, and a norm accumulated in fp32 over a million numbers is off by 1e-4.

Shapes: E experts, N numbers of an expert (of this rank's slice of it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_NUMBERS = 1 << 22
"""Numbers handled at once: the extra memory is this many in fp32 and again in float64."""

# `weight1` of all experts in GroupedExperts, `linear_fc1.weight3` in Transformer Engine's TEGroupedMLP.
_OF_ALL = re.compile(r"weight[12]")
_OF_ONE = re.compile(r"linear_fc[12]\.(?:weight|bias)(?P<expert>\d+)")


@torch.no_grad()
def mean_pairwise_cosine(
    experts: Sequence[Sequence[Tensor]],
    *,
    expert_group: ProcessGroup | None = None,
    slice_group: ProcessGroup | None = None,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> Tensor:
    """Mean over pairs of experts of the cosine between their weights; a zero expert counts as orthogonal to all.

    Args:
        experts: this rank's experts, each a list of tensors of N numbers in all; the same shapes in the same order for every expert, here and on the other
            ranks. With a `slice_group` every tensor is this rank's slice.
        expert_group: ranks that hold the other experts, as many as this one; None when all are here.
        slice_group: ranks that hold the other slices of these experts; None when they are whole.
        chunk_numbers: how many numbers of an expert are handled at once.

    Returns:
        float64 scalar on the device of the weights, the same on every rank of both groups.

    Raises:
        ValueError: fewer than two experts in all, or experts of different shapes.
    """
    num_experts = len(experts) * (1 if expert_group is None else expert_group.size())
    if num_experts < 2:
        raise ValueError(f"{num_experts} expert has no pairs")
    shapes = [[tensor.shape for tensor in expert] for expert in experts]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"experts have different shapes: {shapes}")

    pieces = [[piece for tensor in expert for piece in tensor.detach().reshape(-1).split(chunk_numbers)] for expert in experts]
    squares_E = torch.stack([torch.stack([_sum_of_squares(piece) for piece in expert]).sum() for expert in pieces])
    _sum_over(slice_group, squares_E)
    scales = torch.where(squares_E > 0, squares_E.rsqrt(), 0.0).tolist()

    norm = squares_E.new_zeros(())
    for of_experts in zip(*pieces, strict=True):
        total = torch.zeros_like(of_experts[0], dtype=torch.float32)
        for piece, scale in zip(of_experts, scales, strict=True):
            total.add_(piece, alpha=scale)
        _sum_over(expert_group, total)
        norm += _sum_of_squares(total)
    _sum_over(slice_group, norm)
    nonzero = (squares_E > 0).sum(dtype=torch.float64)
    _sum_over(expert_group, nonzero)
    return (norm - nonzero) / (num_experts * (num_experts - 1))


def expert_similarity(experts: Any) -> Tensor:
    """`mean_pairwise_cosine` of the experts of one MoE layer, over its expert-parallel and expert-tensor-parallel ranks, which must all call this.

    Args:
        experts: `MoELayer.experts`, ours or Transformer Engine's. With expert tensor parallelism every parameter must be split, which biases are not.
    """
    return mean_pairwise_cosine(local_experts(experts), expert_group=experts.ep_group, slice_group=experts.tp_group)


def local_experts(experts: torch.nn.Module) -> list[list[Tensor]]:
    """The weights of every expert on this rank, by expert, in the module's order.

    Raises:
        ValueError: a parameter does not say which expert it belongs to.
    """
    found: dict[int, list[Tensor]] = {}
    for name, parameter in experts.named_parameters():
        if _OF_ALL.fullmatch(name):
            for expert, weight in enumerate(parameter):
                found.setdefault(expert, []).append(weight)
        elif match := _OF_ONE.fullmatch(name):
            found.setdefault(int(match["expert"]), []).append(parameter)
        else:
            raise ValueError(f"{type(experts).__name__}.{name} does not say whose it is")
    return [found[expert] for expert in sorted(found)]


def _sum_of_squares(piece: Tensor) -> Tensor:
    exact = piece.double()
    return torch.dot(exact, exact)


def _sum_over(group: ProcessGroup | None, tensor: Tensor) -> None:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
