"""Scaled dot-product attention for the `torch` backend, through torch's fused kernels.

megatron-core without Transformer Engine materializes the [S, S] scores of every head and copies keys and values once per query group. torch's
`scaled_dot_product_attention` does neither: causal needs no mask, and grouped queries share their keys in place.

Shapes: S sequence, B batch, N query heads of this rank, G key/value groups of this rank, D head width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchCoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(D)) V for the heads of this rank.

    Args:
        config: dropout, and the number of groups.
        layer_number, attn_mask_type, attention_type, kwargs: as megatron-core passes them; only causal and given masks are known.
        softmax_scale: replaces 1 / sqrt(D).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention output [S, B, N * D].

        Args:
            attention_mask: [B, 1, S, S], true where a query must not see a key; None is plain causal.
        """
        query_BNSD, key_BGSD, value_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        dropout = self.dropout if self.training else 0.0
        # Ranks hold different heads, so each draws its own dropout, from megatron-core's per-rank generator. With sequence parallelism the whole block draws
        # from it already, and turning to it once more would start, in a recomputed layer, from where it stood before the block.
        forks = dropout > 0 and not self.config.sequence_parallel
        draw = tensor_parallel.get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext()
        with draw:
            output_BNSD = torch.nn.functional.scaled_dot_product_attention(
                query_BNSD,
                key_BGSD,
                value_BGSD,
                attn_mask=None if attention_mask is None else ~attention_mask,
                is_causal=attention_mask is None,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=query_BNSD.shape[1] != key_BGSD.shape[1],
            )
        return output_BNSD.permute(2, 0, 1, 3).reshape(query_SBND.shape[0], query_SBND.shape[1], -1)
