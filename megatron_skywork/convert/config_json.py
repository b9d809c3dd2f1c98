"""Writes the `config.json` of a model of ours, in the words of a Hugging Face family. `families.read_config` is its inverse."""

from __future__ import annotations

from typing import Any

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.table import moe_layers

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "skywork_moe": "SkyworkForCausalLM",
}  # fmt: skip
# Llama 3.1's constants, the only ones megatron-core's rotary scaling has.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def write_config(model: Model, moe: Moe | None, family: str, dtype: str, token_ids: dict[str, Any] | None = None) -> dict[str, Any]:
    """The Hugging Face config of a model of ours; `dtype` as torch names it without `torch.`.

    Args:
        family: a model type that can hold the model, see `families.choose_family`.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": model.hidden_size,
        "intermediate_size": _expert_width(model, moe) if family == "mixtral" else model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.resolved_query_groups,
        "head_dim": model.resolved_head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        **_rope_keys(model),
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": moe.router_init_std if moe is not None and family == "skywork_moe" else model.init_std,
        "use_cache": True,
        # transformers before 4.56 reads torch_dtype, later ones dtype.
        "torch_dtype": dtype,
        "dtype": dtype,
        **(token_ids or {}),
    }
    if family in ("mistral", "mixtral", "qwen2_moe", "qwen3_moe", "skywork_moe"):
        config["sliding_window"] = None
    if family in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = False
    if family == "llama":
        config["mlp_bias"] = False
    if moe is not None and family == "mixtral":
        config |= {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.topk, "output_router_logits": False, "router_aux_loss_coef": 0.0}
    if moe is not None and family in ("qwen2_moe", "qwen3_moe"):
        config |= _qwen_moe_keys(model, moe, family)
    if moe is not None and family == "skywork_moe":
        config |= _skywork_moe_keys(model, moe)
    return config


def _expert_width(model: Model, moe: Moe | None) -> int:
    return model.ffn_hidden_size if moe is None or moe.ffn_hidden_size is None else moe.ffn_hidden_size


def _rope_keys(model: Model) -> dict[str, Any]:
    """transformers 5 reads `rope_parameters`, older ones `rope_theta` and `rope_scaling`; both find what they know."""
    if model.rope_scaling_factor is None:
        return {"rope_theta": model.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
    scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling, "rope_parameters": {**scaling, "rope_theta": model.rope_theta}}


def _qwen_moe_keys(model: Model, moe: Moe, family: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": _expert_width(model, moe),
        # A single expert keeps its probability here in any case.
        "norm_topk_prob": moe.topk > 1 and not moe.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(model.num_layers)) - moe_layers(model, moe)),
        "use_sliding_window": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }
    if family == "qwen2_moe":
        keys |= {"shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size, "qkv_bias": model.qkv_bias}
    return keys


def _skywork_moe_keys(model: Model, moe: Moe) -> dict[str, Any]:
    """The released model's keys, then the ones it fixes in code and a general model needs."""
    keys: dict[str, Any] = {
        "auto_map": {"AutoConfig": "configuration_skywork_moe.SkyworkMoeConfig", "AutoModelForCausalLM": "modeling_skywork_moe.SkyworkForCausalLM"},
        "num_experts": [moe.num_experts],
        "moe_expert_interval": 1,
        "moe_use_skywork_gating": False,
        "moe_2layer_gate": False,
        "moe_use_logits_norm": moe.gate_norm,
        "moe_gate_norm_std": moe.gate_norm_scale,
        "moe_feature_no_mul_topk": True,
        "num_experts_per_tok": moe.topk,
        "moe_gate_norm_eps": moe.gate_norm_epsilon,
        "moe_gate_norm_unbiased": moe.gate_norm_unbiased,
        "moe_pre_softmax": moe.pre_softmax,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "model_init_std": model.init_std,
    }
    if moe.ffn_hidden_size is not None:
        keys["moe_intermediate_size"] = moe.ffn_hidden_size
    if len(moe_layers(model, moe)) != model.num_layers:
        keys["moe_layer_indices"] = sorted(moe_layers(model, moe))
    if moe.shared_expert_ffn_hidden_size is not None:
        keys |= {"shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size, "shared_expert_gate": moe.shared_expert_gate}
    return keys
