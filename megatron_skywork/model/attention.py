"""Scaled dot-product attention for the `torch` backend, through torch's fused kernels: softmax(Q K^T / sqrt(D)) V  (Dao et al., arXiv 2205.14135).

megatron-core without Transformer Engine materializes the [S, S] scores of every head and copies keys and values once per query group. Torch's kernels do
neither, and no mask is ever made: causal is a flag, and documents are attended to one by one.

Which kernel runs is left to torch. It asks, call by call, who can do it: cuDNN first on Hopper and Blackwell where its version is good, then flash, then
the memory-efficient one for fp32. All of them, and the CPU's, read shared keys in place (`enable_gqa`). An order forced from here would only age.

Shapes: S sequence, B batch, N query heads of this rank, G key/value groups of this rank, D head width, T = B * S tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_skywork import device
from megatron_skywork.model.documents import Documents


def causal_attention(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Each token over itself and the ones before it, [S, B, N * D].

    Sequences of a batch do not see each other, no more than heads do, so they are given to the kernel as more heads of one sequence. Kernels write
    [sequence, heads, D]; this way that is megatron-core's layout, and neither inputs nor output are copied. Query head b N + n meets group
    (b N + n) / (N / G) = b G + n / (N / G), its own.
    """
    query, key, value = (tensor.flatten(1, 2).transpose(0, 1)[None] for tensor in (query_SBND, key_SBGD, value_SBGD))
    shared = query_SBND.shape[2] != key_SBGD.shape[2]
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=shared)
    return output[0].transpose(0, 1).reshape(*query_SBND.shape[:2], -1)


def document_attention(
    query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, documents: Documents, dropout: float, scale: float | None
) -> Tensor:
    """Each token over itself and the ones before it in its own document, [S, B, N * D]."""
    shared = query_SBND.shape[2] != key_SBGD.shape[2]
    varlen_attn = _variable_length_kernel(query_SBND.dtype, query_SBND.shape[-1], dropout, shared)
    if varlen_attn is None:
        return _one_by_one(query_SBND, key_SBGD, value_SBGD, documents, dropout, scale)
    packed = [tensor.transpose(0, 1).flatten(0, 1) for tensor in (query_SBND, key_SBGD, value_SBGD)]
    output_TND = varlen_attn(
        *packed,
        documents.cu_seqlens_q,
        documents.cu_seqlens_kv,
        documents.longest,
        documents.longest,
        scale=scale,
        window_size=(-1, 0),
        **({"enable_gqa": True} if shared else {}),
    )
    return output_TND.unflatten(0, (query_SBND.shape[1], -1)).flatten(2).transpose(0, 1).contiguous()


def _one_by_one(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, documents: Documents, dropout: float, scale: float | None) -> Tensor:
    """Causal attention over every document. `split` gathers the gradients of all at once; a slice would make a tensor of zeros per document."""
    sequences = zip(query_SBND.split(1, dim=1), key_SBGD.split(1, dim=1), value_SBGD.split(1, dim=1), documents.lengths, strict=True)
    return torch.cat([_one_sequence(*sequence, dropout, scale) for sequence in sequences], dim=1)


def _one_sequence(query_S1ND: Tensor, key_S1GD: Tensor, value_S1GD: Tensor, lengths: list[int], dropout: float, scale: float | None) -> Tensor:
    parts = zip(query_S1ND.split(lengths), key_S1GD.split(lengths), value_S1GD.split(lengths), strict=True)
    return torch.cat([causal_attention(query, key, value, dropout, scale) for query, key, value in parts])


def _variable_length_kernel(dtype: torch.dtype, width: int, dropout: float, shared: bool) -> Callable[..., Any] | None:
    """Torch's flash attention over documents of any length in one launch, if it can do this: half precision, widths a multiple of 8 up to 256, no dropout.

    Args:
        shared: queries share keys, which torch's kernel knows from 2.12 on.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256 and dropout == 0
    return _varlen_attn(shared) if fits and device.has_flash_attention() else None


@lru_cache
def _varlen_attn(shared: bool) -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`, from the version on that is causal by a window (2.11); older ones have another signature."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"window_size", "enable_gqa"} if shared else {"window_size"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


class TorchCoreAttention(MegatronModule):
    """Attention of the heads of this rank, causal, within documents where the micro-batch says so.

    Args:
        config: dropout, and the number of groups.
        layer_number, attn_mask_type, attention_type, kwargs: as megatron-core passes them; only causal self-attention is known.
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
        packed_seq_params: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention output [S, B, N * D].

        Args:
            attention_mask: None; what a mask would say is said by `packed_seq_params`.
            packed_seq_params: the documents of this micro-batch; None where a sequence is one.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("TorchCoreAttention takes no mask and no bias: documents are given as packed_seq_params=Documents(...)")
        dropout = self.dropout if self.training else 0.0
        # Ranks hold different heads, so each draws its own dropout, from megatron-core's per-rank generator. With sequence parallelism the whole block draws
        # from it already, and turning to it once more would start, in a recomputed layer, from where it stood before the block.
        forks = dropout > 0 and not self.config.sequence_parallel
        draw = tensor_parallel.get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext()
        with draw:
            if packed_seq_params is None:
                return causal_attention(query_SBND, key_SBGD, value_SBGD, dropout, self.softmax_scale)
            return document_attention(query_SBND, key_SBGD, value_SBGD, packed_seq_params, dropout, self.softmax_scale)
