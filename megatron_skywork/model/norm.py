"""RMSNorm for the `torch` backend: y = x / sqrt(mean(x^2) + eps) * w  (Zhang and Sennrich, arXiv 1910.07467).

megatron-core's own wrapper of torch's norm refuses sequence parallelism. All it needs is a mark on the weight: each tensor-parallel rank normalizes its
own part of the sequence, so the weight's gradients have to be summed over those ranks, and megatron-core sums what carries `sequence_parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


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
