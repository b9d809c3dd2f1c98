"""Gate-logit normalization: the sharpness of the gate becomes a setting instead of an accident of training.

Skywork-MoE report, section 4.1. Per token, over the expert axis,

    z~ = lambda * (z - mean(z)) / sqrt(var(z) + eps)

and the softmax is taken of z~. The order of the experts is kept, so top-k chooses as before; what changes is how far the chosen ones stand above
the rest, now the same for every token and every layer. The report divides by the standard deviation; eps is ours (the released inference code has
none and gives NaN for equal logits, which a zero-initialized router produces at its first step).

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_skywork import device


def normalize_logits(logits_TE: Tensor, scale: float = 1.0, eps: float = 1e-6, *, unbiased: bool = True) -> Tensor:
    """Give each row mean 0 and standard deviation `scale`, with gradients through the mean and the deviation.

    Args:
        logits_TE: raw gate logits, any floating type; the last axis is the experts'.
        scale: lambda of the report, the standard deviation of a normalized row.
        eps: added to the variance. Equal logits give zeros (a uniform gate) and finite gradients.
        unbiased: divide the squares by E - 1 (the released model) instead of E.

    Returns:
        Same shape, float64 for float64 logits, else float32.

    Raises:
        ValueError: fewer experts than the variance needs, or scale or eps not above 0.
    """
    if eps <= 0 or scale <= 0:
        raise ValueError(f"scale={scale} and eps={eps} must be above 0 (an eps of 0 makes equal logits NaN)")
    if logits_TE.shape[-1] < 2:
        raise ValueError(f"normalization needs at least 2 experts, the logits have {logits_TE.shape[-1]}")
    return _NormalizeLogits.apply(logits_TE, float(scale), float(eps), logits_TE.shape[-1] - int(unbiased))


class _NormalizeLogits(torch.autograd.Function):
    """Saves its own output [T, E] and 1 / std [T, 1], and so keeps nothing of size [T, E] that would not be there anyway. One kernel each way on a GPU.

    With r = (sum(c^2) / m + eps)^(-1/2), c = z - mean(z) and y = lambda c r, the chain rule through r and the mean gives, for g = dL/dy,

        dz = lambda r (g - mean(g) - y * sum(g y) / (lambda^2 m))

    dr/dc = -r^3 c / m makes the last term, and removing the mean of the whole leaves it alone, since sum(y) = 0.
    """

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, scale: float, eps: float, divisor: int) -> Tensor:
        normalized_TE, inverse_std_T1 = _forward(logits_TE, scale, eps, divisor)
        ctx.save_for_backward(normalized_TE, inverse_std_T1)
        ctx.scale, ctx.divisor, ctx.logits_dtype = scale, divisor, logits_TE.dtype
        return normalized_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(grad_TE, *ctx.saved_tensors, ctx.scale, ctx.divisor).to(ctx.logits_dtype), None, None, None


@device.fused
def _forward(logits_TE: Tensor, scale: float, eps: float, divisor: int) -> tuple[Tensor, Tensor]:
    """y and r."""
    wide_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    # Subtracting one of the row's own values first makes equal logits exactly zero; a mean alone leaves rounding, which 1 / sqrt(eps) magnifies.
    normalized_TE = wide_TE - wide_TE[..., :1]
    normalized_TE -= normalized_TE.mean(dim=-1, keepdim=True)
    inverse_std_T1 = torch.rsqrt(normalized_TE.square().sum(dim=-1, keepdim=True) / divisor + eps)
    normalized_TE *= inverse_std_T1 * scale
    return normalized_TE, inverse_std_T1


@device.fused
def _backward(grad_TE: Tensor, normalized_TE: Tensor, inverse_std_T1: Tensor, scale: float, divisor: int) -> Tensor:
    """dz."""
    along_T1 = (grad_TE * normalized_TE).sum(dim=-1, keepdim=True) / (scale**2 * divisor)
    return (grad_TE - grad_TE.mean(dim=-1, keepdim=True) - normalized_TE * along_T1) * (inverse_std_T1 * scale)
