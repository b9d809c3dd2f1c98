"""Our settings in megatron-core's words: one `SkyworkTransformerConfig` per run, a copy for chunks that differ; every field set here and nowhere else."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from megatron.core.transformer import enums

from megatron_skywork import device
from megatron_skywork.config.megatron_fields import python_values
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.model.rope import offer_fused_rotary
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_backend(config: Config) -> str:
    """`torch` or `te`, with `auto` decided by what this machine has.

    Raises:
        ConfigError: `te` is asked for and Transformer Engine or the GPU is missing, or context parallelism is asked for without it.
    """
    usable = device.has_gpu() and importlib.util.find_spec("transformer_engine") is not None
    wanted = config.model.backend
    if wanted == "te" and not usable:
        raise ConfigError("model.backend=te needs a GPU and the package transformer_engine; install the extra `te`, or set model.backend=torch")
    # Transformer Engine's causal attention knows documents only in sequences packed into one; the `torch` backend takes them as they are.
    apart = config.data.reset_attention_mask
    if wanted == "te" and apart:
        raise ConfigError(
            "model.backend=te does not keep documents apart, as data.reset_attention_mask=true asks; set model.backend=torch, or reset_attention_mask=false"
        )
    backend = "te" if wanted != "torch" and usable and not apart else "torch"
    if config.parallel.cp > 1 and backend != "te":
        raise ConfigError(f"parallel.cp={config.parallel.cp} needs Transformer Engine's attention; install the extra `te` on a GPU, or set parallel.cp=1")
    return backend


def transformer_config(config: Config, backend: str) -> SkyworkTransformerConfig:
    """megatron-core's configuration of this model, layout and precision.

    Raises:
        ConfigError: megatron-core refuses the combination; its own words are quoted.
    """
    fields = {**_shape(config), **_layout(config), **_precision(config, backend)}
    if config.moe is not None:
        fields.update(_experts(config, backend))
    if backend == "torch":
        offer_fused_rotary()
    given = python_values(config.megatron, enums)
    if backend == "torch":
        given.pop("gradient_accumulation_fusion", None)  # what is asked for here, `wrap_for_training` does
    try:
        return SkyworkTransformerConfig(**{**fields, **given})
    except (AssertionError, ValueError) as refusal:
        raise ConfigError(f"megatron-core refuses these settings: {refusal}") from refusal


def recomputing_first(transformer: SkyworkTransformerConfig, layers: int) -> SkyworkTransformerConfig:
    """The configuration of a chunk that recomputes its first `layers` layers.

    megatron-core knows one number for all stages, and wants it above 0; but each chunk reads its own configuration, so each gets a copy with its own number.
    """
    own = copy.copy(transformer)
    if layers:
        own.recompute_granularity, own.recompute_method, own.recompute_num_layers = "full", "block", layers
    else:
        own.recompute_granularity = own.recompute_method = own.recompute_num_layers = None
    return own


def _shape(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.resolved_query_groups,
        "kv_channels": model.resolved_head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "init_method_std": model.init_std,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
    }


def _experts(config: Config, backend: str) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    return {
        "skywork": moe,
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        # One selected expert has softmax 1 whatever its logit; megatron-core then wants the probability over all.
        "moe_router_pre_softmax": moe.pre_softmax or moe.topk == 1,
        "moe_ffn_hidden_size": moe.ffn_hidden_size or config.model.ffn_hidden_size,
        "moe_layer_freq": [int(index in config.moe_layers) for index in range(config.model.num_layers)],
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
        "moe_token_drop_policy": moe.drop_policy,
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_router_dtype": "fp32",
        # SkyworkRouter brings its own losses.
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": backend == "te",
    }


def _layout(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tp,
        "sequence_parallel": parallel.tp > 1,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "batch_p2p_comm": device.has_gpu(),
    }
    if parallel.layers_per_stage is not None:
        stages: list[list[str]] = [["decoder"] * count for count in parallel.layers_per_stage]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = stages
    if parallel.recompute == "full":
        # Every layer by itself; `recomputing_first` says it for a stage that recomputes fewer.
        fields.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif parallel.recompute == "selective":
        fields["recompute_granularity"] = "selective"
        fields["recompute_modules"] = list(parallel.recompute_modules)
    return fields


def _precision(config: Config, backend: str) -> dict[str, Any]:
    dtype = DTYPES[config.train.precision]
    fused = backend == "te"
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        # Losses are summed over tokens and divided once by all tokens of the global batch, so that its split into micro-batches and ranks does not show.
        "calculate_per_token_loss": True,
        # Whoever is wrapped for training is told then: outside it there are no buffers to add to.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": fused,
        # megatron-core compiles SwiGLU and its gradient. On a GPU that is one kernel each way, which keeps its input alone; a CPU would pay a C++ build.
        "bias_activation_fusion": fused or (config.model.compile and device.has_compiler()),
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": True,
        "moe_permute_fusion": fused,
    }
