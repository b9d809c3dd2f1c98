"""A shared expert, which sees every token, made from the dense feed-forward.

    dense(x) = shared(x) + sum_j g_j routed_j(x),   sum_j g_j = 1

Two ways make this hold at step 0, whatever the router says, because a feed-forward is a sum over its F inner columns:
* F_s < F: the shared expert is the first F_s columns, every routed expert starts as the other F - F_s.
* F_s = F: the shared expert is the whole feed-forward; the routed experts are copies of gate and up whose down projection starts at zero, so they add
  nothing yet. Their down projections get gradients at the first step, gate and up from the second.

With moe.shared_expert_gate (Qwen2-MoE) the shared expert's output is multiplied by sigmoid(w x). w starts at zero, sigmoid(0) = 1/2, and the shared down
projection is doubled, which rounds nothing.

The architecture is DeepSeekMoE's (arXiv 2401.06066), which trains it from scratch; upcycling into it by these partitions is this project's, checked by the
equation above. It needs the routed weights to sum to 1 in the first way: with moe.pre_softmax only the second is exact.

Shapes: F inner width of the dense feed-forward, F_s of the shared expert, H hidden.
"""

from __future__ import annotations

import torch

from megatron_skywork.convert.upcycling.methods.row_chunks import scaled
from megatron_skywork.errors import ConfigError


def shared_problem(ffn: int, shared_ffn: int) -> str | None:
    """What is wrong with a shared expert of width `shared_ffn` from a feed-forward of width `ffn`, or None."""
    if 1 <= shared_ffn <= ffn:
        return None
    return (
        f"--shared-expert-ffn={shared_ffn}: the dense feed-forward's inner width is {ffn}; use less than that (the routed experts get the rest) "
        "or exactly that (the shared expert is the whole of it)"
    )


def routed_width(ffn: int, shared_ffn: int) -> int:
    """Inner width of the routed experts.

    Raises:
        ConfigError: the shared expert is wider than the dense feed-forward.
    """
    problem = shared_problem(ffn, shared_ffn)
    if problem:
        raise ConfigError(problem)
    return ffn if shared_ffn == ffn else ffn - shared_ffn


def shared_part(matrix: torch.Tensor, shared_ffn: int, ffn_axis: int) -> torch.Tensor:
    """The shared expert's matrix: the first F_s inner columns, contiguous.

    Args:
        matrix: gate or up projection [F, H] with ffn_axis 0, down projection [H, F] with ffn_axis 1.

    Raises:
        ConfigError: as routed_width.
    """
    routed_width(matrix.shape[ffn_axis], shared_ffn)
    return matrix.narrow(ffn_axis, 0, shared_ffn).contiguous()


def routed_part(matrix: torch.Tensor, shared_ffn: int, ffn_axis: int) -> torch.Tensor:
    """Every routed expert's matrix: the inner columns that the shared expert has not; or, where it has all of them, gate and up as they are and down zero.

    Raises:
        ConfigError: as routed_width.
    """
    ffn = matrix.shape[ffn_axis]
    width = routed_width(ffn, shared_ffn)
    if width == ffn:
        return matrix if ffn_axis == 0 else torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    return matrix.narrow(ffn_axis, shared_ffn, width).contiguous()


def gate_row(hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [1, H] of the shared expert's gate: zeros, so the gate starts at sigmoid(0) = 1/2."""
    return torch.zeros(1, hidden, dtype=dtype)


def behind_gate(down: torch.Tensor) -> torch.Tensor:
    """The shared expert's down projection [H, F_s] where a gate that starts at 1/2 follows: doubled.

    Raises:
        CheckpointError: a doubled weight does not fit the dtype.
    """
    return scaled(down, 2.0)
