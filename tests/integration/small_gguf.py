"""A GGUF file of a small LLaMA as llama.cpp's converter writes it, from Hugging Face tensors, by the package gguf alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch

_ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], shape: dict[str, Any], kind: str) -> Path:
    """Write the file; matrices in the quantization `kind` (F16, Q8_0, ...), norms in fp32."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "\u2581", *(chr(33 + number) for number in range(shape["vocab_size"] - 4))])
    writer.add_token_scores([0.0] * shape["vocab_size"])
    writer.add_token_types([2, 3, 3, *[1] * (shape["vocab_size"] - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    heads = {"q_proj": shape["num_attention_heads"], "k_proj": shape["num_key_value_heads"]}
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if (projection := name.split(".")[-2]) in heads:
            array = _interleaved(array, heads[projection])
        quantization = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(_their_name(name), gguf.quants.quantize(numpy.ascontiguousarray(array), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _their_name(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_PARTS[rest.removesuffix('.weight')]}.weight"


def _interleaved(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face its two halves."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
