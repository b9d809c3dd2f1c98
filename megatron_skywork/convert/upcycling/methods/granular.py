"""Granular upcycling: a copy of the dense feed-forward is cut into G pieces, each an expert of its own; a token is sent to G times as many of them.

    y = down(silu(gate x) * (up x)) is a sum over the F inner columns, so FFN = sum of its G pieces (slices of F/G columns of all three matrices).

Virtual groups (He et al., arXiv 2410.07524): C copies make C * G experts, expert number = copy * G + piece, and the router's row of a copy is repeated for
its G pieces. All pieces of a copy have one logit, so the top K * G are all the pieces of K copies. Only ties break this: with a router of zeros every logit
is equal and which pieces are chosen is up to the top-k's order, so a granular mixture with a zero router is not the dense model.

Weight scaling. The chosen weights sum to 1 here, so each piece of a copy with probability p weighs p/G and the mixture gives FFN/G: the output must be
multiplied by G. It is linear in `up` and in `down`, and not in `gate`, which goes through silu. So up gets a factor a and down b with a * b = G, both powers
of two where G is one: then every weight keeps its mantissa and the mixture is the dense model exactly. For another G both are sqrt(G) and weights round once.

The paper multiplies all of gate, up and down by G^(1/3) (its published code, in megatron-core, takes the cube root for gated units). That keeps the three
matrices' ratio, but silu(c z) is not c silu(z), so it only approximates the dense model; ours is exact at step 0, which is what `--verify` can hold.

moe.pre_softmax: probabilities over all C * G experts are not renormalized, and how much the chosen ones sum to depends on the token. No constant factor is
exact for every token, except where all probabilities are equal: then each is 1 / (C * G), the chosen T give T / (C * G) * FFN / G, and the factor is
C * G * G / T (`uniform_factor`, the published code's for this order of softmax and top-k). It is exact with a zero router and G = 1 alone, and near for a
router of small numbers.

Shapes: F inner width, H hidden, C copies, E = C * G experts.
"""

from __future__ import annotations

import math

import torch

from megatron_skywork.errors import ConfigError


def width_problem(ffn: int, pieces: int) -> str | None:
    """What is wrong with cutting an inner width of `ffn` into `pieces`, or None."""
    if pieces >= 1 and ffn % pieces == 0:
        return None
    fitting = ", ".join(str(number) for number in range(2, min(ffn, 64) + 1) if ffn % number == 0) or "1"
    return f"--granularity={pieces}: the feed-forward's inner width {ffn} does not divide into {pieces} equal pieces; these do: {fitting}"


def routing_problem(num_experts: int, topk: int, pieces: int) -> str | None:
    """What is wrong with `num_experts` experts (pieces counted) of which `topk` are chosen, or None: both must be whole copies."""
    if pieces >= 1 and num_experts % pieces == 0 and topk % pieces == 0:
        return None
    return (
        f"--granularity={pieces} with {num_experts} experts and top-{topk}: a copy of the feed-forward is {pieces} experts, "
        f"so the number of experts and that of chosen experts must be multiples of {pieces}"
    )


def piece(matrix: torch.Tensor, index: int, pieces: int, ffn_axis: int) -> torch.Tensor:
    """Piece number `index` of a matrix: F/G consecutive inner columns, contiguous; a view where the memory allows.

    Args:
        matrix: gate or up projection [F, H] with ffn_axis 0, down projection [H, F] with ffn_axis 1.

    Raises:
        ConfigError: F does not divide into `pieces`.
    """
    problem = width_problem(matrix.shape[ffn_axis], pieces)
    if problem:
        raise ConfigError(problem)
    width = matrix.shape[ffn_axis] // pieces
    return matrix.narrow(ffn_axis, index * width, width).contiguous()


def uniform_factor(num_experts: int, topk: int, pieces: int) -> float:
    """The factor where the chosen weights are probabilities over all experts (moe.pre_softmax), right where all probabilities are equal: E * G / topk."""
    return num_experts * pieces / topk


def exact_scales(factor: float) -> bool:
    """Whether scaling by `factor` rounds no weight: it is a power of two."""
    return math.frexp(factor)[0] == 0.5


def scales(factor: float) -> tuple[float, float]:
    """What to multiply up and down with (row_chunks.scaled), so that the output is multiplied by `factor`: G, or `uniform_factor`."""
    if exact_scales(factor):
        exponent = math.frexp(factor)[1] - 1
        return 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
    return math.sqrt(factor), math.sqrt(factor)


def virtual_groups(rows_CH: torch.Tensor, pieces: int) -> torch.Tensor:
    """The router of C copies as the router of their C * G pieces, [E, H]: each row repeated for its pieces."""
    return rows_CH.repeat_interleave(pieces, dim=0)
