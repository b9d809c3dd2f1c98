"""Which module stands where in a layer, for both backends: megatron-core's own specs with our router, norm and attention put in.

Checkpoint keys are the same for both backends. Transformer Engine fuses the norm before a linear layer into it and names its weight after the linear
layer; the `torch` backend keeps the norm by itself and is told the fused name. Before experts nothing is fused in either: there the plain name stays,
which megatron-core's own local spec gets wrong (it renames the norm of every layer).
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_skywork.model.attention import TorchCoreAttention
from megatron_skywork.model.norm import RMSNorm
from megatron_skywork.model.norm_recompute import NormRecomputingLayer, RecomputedRMSNorm
from megatron_skywork.moe.moe_layer import SkyworkMoELayer, moe_submodules
from megatron_skywork.moe.router import SkyworkRouter
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig

_INPUT_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def block_spec(config: SkyworkTransformerConfig, backend: str, moe_layers: list[int], vp_stage: int | None, pp_rank: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage or virtual stage.

    Args:
        config: megatron-core's configuration of the model.
        backend: `torch` or `te`.
        moe_layers: indices, from 0, of the layers with experts.
        vp_stage: virtual stage on this rank; None without interleaving.
        pp_rank: pipeline rank.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layers = [layer_spec(config, backend, is_moe=index in moe_layers) for index in range(first, first + num_layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(backend))


def layer_spec(config: SkyworkTransformerConfig, backend: str, is_moe: bool) -> ModuleSpec:
    """One transformer layer, dense or with experts."""
    num_experts = config.num_moe_experts if is_moe else None
    if backend == "te":
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm)
        if is_moe:
            moe_submodules(spec.submodules.mlp).router = SkyworkRouter
    else:
        spec = get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        if config.recomputes("layernorm"):
            spec.module = NormRecomputingLayer
            layer.input_layernorm = layer.pre_mlp_layernorm = RecomputedRMSNorm
        attention = layer.self_attention.submodules
        attention.core_attention = TorchCoreAttention
        attention.q_layernorm = attention.k_layernorm = RMSNorm if config.qk_layernorm else IdentityOp
        layer.sharded_state_dict_keys_map = _INPUT_NORM if is_moe else {**_INPUT_NORM, **_DENSE_MLP_NORM}
        if is_moe:
            layer.mlp = SkyworkMoELayer
    return spec


def _norm(backend: str) -> Any:
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm
