"""Rotary positions for the `torch` backend  (Su et al., arXiv 2104.09864, eq. 34): each pair (x_i, x_{i + D/2}) of a head is turned by an angle
that grows with the position,

    y_i         = x_i cos a_i - x_{i + D/2} sin a_i
    y_{i + D/2} = x_{i + D/2} cos a_i + x_i sin a_i .

A rotation's gradient is the rotation back, so nothing of the input has to be kept. megatron-core without Transformer Engine builds the same from
a negated and glued copy of x and takes the cosines anew for every layer's queries and keys; autograd keeps those copies until the backward.

Shapes: S sequence, B batch, N heads (of queries or keys), D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_skywork import device


@device.fused
def rotate(x_SBND: Tensor, cos_S11D: Tensor, sin_S11D: Tensor, back: bool = False) -> Tensor:
    """Every pair turned by its angle, or back."""
    y_SBND = x_SBND * cos_S11D
    (x_first, x_second), (y_first, y_second) = x_SBND.chunk(2, dim=-1), y_SBND.chunk(2, dim=-1)
    sin = sin_S11D.chunk(2, dim=-1)[0]
    y_first.addcmul_(x_second, sin, value=1 if back else -1)
    y_second.addcmul_(x_first, sin, value=-1 if back else 1)
    return y_SBND.to(x_SBND.dtype)


class _Rotation(torch.autograd.Function):
    """`rotate`, which keeps cosines and sines alone for its backward."""

    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cos_S11D: Tensor, sin_S11D: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos_S11D, sin_S11D)
        return rotate(x_SBND, cos_S11D, sin_S11D)

    @staticmethod
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return rotate(grad_SBND, *ctx.saved_tensors, back=True), None, None


class RotaryTables:
    """Cosines and sines of the angles seen last. All layers of a micro-batch are given the same angles, queries and keys alike, and recomputation a view."""

    def __init__(self) -> None:
        self._angles: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(self, angles_S11D: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both [S, 1, 1, D] in `dtype`."""
        if self._tables is None or self._tables[0].dtype != dtype or not self._held(angles_S11D):
            # Held, so that nothing else comes to lie at this address; megatron-core never writes into angles it has made.
            self._angles = angles_S11D.detach()
            self._tables = self._angles.cos().to(dtype), self._angles.sin().to(dtype)
        return self._tables

    def _held(self, angles_S11D: Tensor) -> bool:
        held = self._angles
        return held is not None and held.data_ptr() == angles_S11D.data_ptr() and held.shape == angles_S11D.shape and held.dtype == angles_S11D.dtype


_tables = RotaryTables()


def apply_rotary(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """What megatron-core calls in place of its own: `t` [S, B, N, D] turned by `freqs` [S, 1, 1, D], which hold each angle twice."""
    if interleaved or freqs.shape[-1] != t.shape[-1]:
        raise ValueError("rotary positions here are not interleaved and cover whole heads; set megatron.apply_rope_fusion=false for others")
    # A GPU's kernel works in fp32 whatever it reads. A CPU is as fast as its data is small, and rounds each step.
    return _Rotation.apply(t, *_tables.of(freqs, torch.float32 if device.has_gpu() else t.dtype))


def offer_fused_rotary() -> None:
    """Have `apply_rope_fusion=True` mean `apply_rotary`: megatron-core looks there for Transformer Engine's kernel and refuses the setting without one."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils.fused_apply_rotary_pos_emb = apply_rotary
