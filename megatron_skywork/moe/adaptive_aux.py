"""Adaptive auxiliary-loss coefficients: a layer that drops tokens is pushed to balance, one that does not is left to the language loss.

Skywork-MoE report, section 4.2. Per layer, once per optimizer step,

    f(d)    = min(xi * d, alpha_max)
    alpha' = beta * alpha + (1 - beta) * f(d)

with d the layer's drop rate: dropped over routed (token, expert) assignments of the step's global batch. The report does not say how d is
aggregated; over the global batch makes alpha one number wherever the layer lives. Its settings: xi = 0.2, alpha_max = 0.01, beta = 0.99.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor

# The one tensor of a checkpoint that is the router's state and not a weight: `decoder.layers.I.mlp.router.aux_coefficient`.
COEFFICIENT_NAME = "aux_coefficient"


@overload
def next_coefficient(coefficient: float, drop_rate: float, *, sensitivity: float, maximum: float, momentum: float) -> float: ...
@overload
def next_coefficient(coefficient: Tensor, drop_rate: Tensor, *, sensitivity: float, maximum: float, momentum: float) -> Tensor: ...


def next_coefficient(coefficient: float | Tensor, drop_rate: float | Tensor, *, sensitivity: float, maximum: float, momentum: float) -> float | Tensor:
    """The coefficient of the next step. Tensors stay on their device and keep the coefficient's type; nothing waits for the device.

    Args:
        coefficient: alpha of this step; a number, or a tensor of any shape (one per layer).
        drop_rate: d of this step, from 0 to 1, of the same shape.
        sensitivity: xi.
        maximum: alpha_max.
        momentum: beta.
    """
    if isinstance(drop_rate, Tensor):
        target: float | Tensor = (sensitivity * drop_rate).clamp(max=maximum)
    else:
        target = min(sensitivity * drop_rate, maximum)
    moved = momentum * coefficient + (1.0 - momentum) * target
    return moved.to(coefficient.dtype) if isinstance(moved, Tensor) and isinstance(coefficient, Tensor) else moved
