"""The gate's linear map in fp32 over bf16 activations.

The router's weight stays fp32 while the activations are bf16 or fp16. megatron-core's `router_gating_linear` hands both to Transformer Engine's GEMM,
which wants one type for its two operands. This one multiplies in fp32 and keeps the activations in their own type for backward, half the memory of
`linear(hidden.float(), weight)`. Its cost is 2 T H E operations, a thousandth of the layer's.

Shapes: S sequence, B batch, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gate_logits(hidden_SBH: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """W x (+ b) in fp32: logits [S, B, E] for activations of any floating type and an fp32 weight."""
    logits_SBE = _GateLinear.apply(hidden_SBH, weight_EH)
    return logits_SBE if bias_E is None else logits_SBE + bias_E


class _GateLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight_EH)
        return hidden.to(weight_EH.dtype) @ weight_EH.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight_EH = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad_logits @ weight_EH).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_logits.flatten(0, -2).t() @ hidden.flatten(0, -2).to(weight_EH.dtype)
        return grad_hidden, grad_weight
