"""RMSNorm for the `torch` backend: y = x r w,  r = 1 / sqrt(mean(x^2) + eps)  (Zhang and Sennrich, arXiv 1910.07467).

With n = x r and g the gradient of y:

    dw = sum over tokens of g n
    dx = r (g w - n mean(g w n)) .

On a GPU torch has this as one kernel each way. On CPU torch composes it, and autograd then keeps and walks through every intermediate; written out,
it keeps x and r. Half precision is computed in fp32 in either.

megatron-core's own wrapper of torch's norm refuses sequence parallelism. All it needs is a mark on the weight: each tensor-parallel rank normalizes its
own part of the sequence, so the weight's gradients have to be summed over those ranks, and megatron-core sums what carries `sequence_parallel`.

Shapes: T tokens, or tokens and heads; H hidden, or head width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_skywork import device


class RMSNormFunction(torch.autograd.Function):
    """The equations above over the last axis, each in as few passes over memory as torch's operations allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x_TH = _wide(x)
        r_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, r_T1)
        return (x_TH * r_T1).mul_(weight_H).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight_H, r_T1 = ctx.saved_tensors
        grad_TH, n_TH = _wide(grad), _wide(x) * r_T1
        wide_weight_H = weight_H.to(n_TH.dtype)
        product_TH = grad_TH * n_TH
        grad_weight_H = product_TH.sum(dim=0)
        mean_T1 = torch.mv(product_TH, wide_weight_H).div_(x.shape[-1]).unsqueeze(1)
        grad_x_TH = torch.mul(grad_TH, wide_weight_H, out=product_TH).addcmul_(n_TH, mean_T1, value=-1).mul_(r_T1)
        return grad_x_TH.to(x.dtype).view(x.shape), grad_weight_H.to(weight_H.dtype), None


def _wide(tensor: Tensor) -> Tensor:
    """The tensor as rows of its last axis, in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).flatten(0, -2)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last axis, built the way megatron-core builds its norms.

    Args:
        config: gives dtype and sequence parallelism.
        hidden_size: length of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The input in its own dtype, every last axis scaled to a root mean square of one, times the weight."""
        return super().forward(x) if device.has_gpu() else RMSNormFunction.apply(x, self.weight, self.eps)
