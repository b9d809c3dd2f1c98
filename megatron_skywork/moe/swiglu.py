"""SwiGLU with the routing weight in it, the middle of an expert:  a = silu(g) u p,  with silu(g) = g sigmoid(g).

The gate g and the up projection u come out of one matrix product as the halves of a row (Shazeer, arXiv 2002.05202); p is the weight that the router gave
the row's assignment. Multiplying here rather than behind the down projection costs F numbers a row instead of H and keeps p's gradient a sum over F.

Everything is computed in fp32 and rounded once. Backward makes `a` again from g and u, which it reads anyway, so that forward need not keep it:

    dg = d p u (s + silu (1 - s))       du = d p silu       dp = sum_F d silu u       for d = dL/da, s = sigmoid(g), silu = g s

On a GPU each direction is one compiled kernel. On a CPU the same functions run over blocks of rows that stay in its cache: half a dozen passes over the
whole tensor would take longer than the matrix products beside them.

Shapes: R rows (assignments), F inner width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_skywork import device

BLOCK_NUMBERS = 1 << 19
"""Numbers of `gate_up` handled at once on a CPU: 2 MiB in fp32."""


def weighted_swiglu(gate_up_RF: Tensor, probs_R: Tensor) -> Tensor:
    """silu(gate) * up * prob, [R, F] in the type of `gate_up`.

    Args:
        gate_up_RF: [R, 2 F], the gate's half first.
        probs_R: routing weights, fp32.
    """
    if device.has_gpu():
        return _forward(gate_up_RF, probs_R)
    output_RF = gate_up_RF.new_empty(gate_up_RF.shape[0], gate_up_RF.shape[1] // 2)
    for rows in _blocks(gate_up_RF):
        output_RF[rows] = _forward(gate_up_RF[rows], probs_R[rows])
    return output_RF


def weighted_swiglu_backward(gate_up_RF: Tensor, probs_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `weighted_swiglu`, and its output once more.

    Args:
        grad_RF: dL/da, [R, F].

    Returns:
        dL/d(gate_up) [R, 2 F], dL/d(probs) [R] fp32, and the output [R, F].
    """
    if device.has_gpu():
        return _backward(gate_up_RF, probs_R, grad_RF)
    grad_gate_up_RF, grad_probs_R, output_RF = torch.empty_like(gate_up_RF), torch.empty_like(probs_R), torch.empty_like(grad_RF)
    for rows in _blocks(gate_up_RF):
        grad_gate_up_RF[rows], grad_probs_R[rows], output_RF[rows] = _backward(gate_up_RF[rows], probs_R[rows], grad_RF[rows])
    return grad_gate_up_RF, grad_probs_R, output_RF


@device.fused
def _forward(gate_up_RF: Tensor, probs_R: Tensor) -> Tensor:
    gate_RF, up_RF = gate_up_RF.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_RF) * up_RF * probs_R.unsqueeze(-1)).to(gate_up_RF.dtype)


@device.fused
def _backward(gate_up_RF: Tensor, probs_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate_RF, up_RF = gate_up_RF.float().chunk(2, dim=-1)
    grad_wide_RF = grad_RF.float()
    sigmoid_RF = torch.sigmoid(gate_RF)
    silu_RF = torch.nn.functional.silu(gate_RF)
    product_RF = silu_RF * up_RF
    grad_probs_R = (grad_wide_RF * product_RF).sum(dim=-1)
    weighted_RF = grad_wide_RF * probs_R.unsqueeze(-1)
    grad_gate_RF = weighted_RF * up_RF * (sigmoid_RF + silu_RF * (1.0 - sigmoid_RF))
    grad_gate_up_RF = torch.cat([grad_gate_RF, weighted_RF * silu_RF], dim=-1).to(gate_up_RF.dtype)
    return grad_gate_up_RF, grad_probs_R, (product_RF * probs_R.unsqueeze(-1)).to(gate_up_RF.dtype)


def _blocks(gate_up_RF: Tensor) -> list[slice]:
    rows = max(1, BLOCK_NUMBERS // gate_up_RF.shape[1])
    return [slice(first, first + rows) for first in range(0, gate_up_RF.shape[0], rows)]
