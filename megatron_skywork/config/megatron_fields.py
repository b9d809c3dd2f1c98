"""The `megatron:` section, checked against megatron-core's own dataclasses without importing them (that would import torch, which takes seconds).

The fields of `ModelParallelConfig` and `TransformerConfig` are read from the source text of whichever megatron-core is installed: names,
annotations and the members of enums. Fields that one of our settings decides are refused, so that no value has two masters.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_skywork.config.problems import nearest, shown

# megatron-core's field -> what to set instead.
DECIDED_ELSEWHERE = {
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "moe_extended_tp": "parallel.etp",
    "sequence_parallel": "parallel.tp (above 1 turns it on)",
    "pipeline_model_parallel_layout": "parallel.layers_per_stage",
    "num_layers_in_first_pipeline_stage": "parallel.layers_per_stage",
    "num_layers_in_last_pipeline_stage": "parallel.layers_per_stage",
    "account_for_embedding_in_pipeline_split": "parallel.layers_per_stage",
    "account_for_loss_in_pipeline_split": "parallel.layers_per_stage",
    "recompute_granularity": "parallel.recompute",
    "recompute_method": "parallel.recompute",
    "recompute_num_layers": "parallel.recompute_layers",
    "recompute_modules": "parallel.recompute_modules",
    "moe_layer_recompute": "parallel.recompute_modules=[moe]",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "params_dtype": "train.precision",
    "pipeline_dtype": "train.precision",
    "autocast_dtype": "train.precision",
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "num_query_groups": "model.num_query_groups",
    "kv_channels": "model.head_dim",
    "layernorm_epsilon": "model.norm_epsilon",
    "add_qkv_bias": "model.qkv_bias",
    "qk_layernorm": "model.qk_norm",
    "init_method_std": "model.init_std",
    "attention_dropout": "model.attention_dropout",
    "hidden_dropout": "model.hidden_dropout",
    "transformer_impl": "model.backend",
    "num_moe_experts": "moe.num_experts",
    "moe_router_topk": "moe.topk",
    "moe_router_pre_softmax": "moe.pre_softmax",
    "moe_grouped_gemm": "model.backend",
    "moe_ffn_hidden_size": "moe.ffn_hidden_size",
    "moe_layer_freq": "moe.layers",
    "moe_shared_expert_intermediate_size": "moe.shared_expert_ffn_hidden_size",
    "moe_shared_expert_gate": "moe.shared_expert_gate",
    "moe_router_load_balancing_type": "moe.aux_loss",
    "moe_aux_loss_coeff": "moe.aux_coefficient",
    "moe_z_loss_coeff": "moe.z_loss_coefficient",
    "moe_expert_capacity_factor": "moe.capacity_factor",
    "moe_pad_expert_input_to_capacity": "moe.pad_to_capacity",
    "moe_token_drop_policy": "moe.drop_policy",
    "moe_token_dispatcher_type": "moe.dispatcher",
    "moe_token_dropping": "moe.capacity_factor",
}
# Part of what a model or its loss is here; another value would be another architecture.
FIXED = {
    "normalization": "RMSNorm",
    "gated_linear_unit": "true (SwiGLU)",
    "activation_func": "SiLU (SwiGLU)",
    "add_bias_linear": "false",
    "moe_router_dtype": "fp32 (the gate is always computed in it)",
    "calculate_per_token_loss": "true (the loss is divided once, by all tokens of the global batch)",
    "moe_latent_size": "experts that read and write the whole hidden state",
    "moe_mlp_glu_interleave_size": "the gate's rows before the up projection's, which conversion relies on",
    "moe_shared_expert_glu_interleave_size": "the gate's rows before the up projection's, which conversion relies on",
}
_FLEX = "it belongs to megatron-core's flex dispatcher, and moe.dispatcher offers alltoall and allgather; leave it out"
_RANK_CAPACITY = "it would drop tokens behind the router, where nobody counts them; set moe.capacity_factor (and moe.capacity_scope=rank) instead"
# Fields that would go round the routing of this package or change nothing in it: why, and what to do.
_ONE_WEIGHT = "checkpoints and expert similarity need one parameter per expert and matrix; leave it out"
_NARROW_WEIGHTS = "the optimizer's step writes weights in train.precision, and megatron.fp8 computes in fp8 without it; leave it out"
NOT_HERE = {
    "fp8_param": _NARROW_WEIGHTS,
    "fp4_param": _NARROW_WEIGHTS,
    "moe_router_topk_limited_devices": "routing would depend on parallel.ep; set megatron.moe_router_num_groups and megatron.moe_router_group_topk instead",
    "moe_router_quantile_balancing_ema": "it belongs to quantile balancing, which would replace the routing of this package; leave it out",
    "moe_expert_rank_capacity_factor": _RANK_CAPACITY,
    "moe_paged_stash": _RANK_CAPACITY,
    "moe_single_grouped_weight": _ONE_WEIGHT,
    "moe_single_grouped_bias": _ONE_WEIGHT,
    "moe_paged_stash_page_size": _RANK_CAPACITY,
    "moe_paged_stash_buffer_size_factor_cuda": _RANK_CAPACITY,
    "moe_paged_stash_buffer_size_factor_cpu": _RANK_CAPACITY,
    "moe_enable_deepep": _FLEX,
    "moe_flex_dispatcher_backend": _FLEX,
    "moe_flex_dispatcher_num_sms": _FLEX,
    "moe_deepep_num_sms": _FLEX,
    "moe_hybridep_num_sms": _FLEX,
    "moe_hybridep_num_sms_preprocessing": _FLEX,
    "moe_hybridep_num_blocks_permute": _FLEX,
    "moe_hybridep_num_blocks_unpermute": _FLEX,
    "moe_hybridep_pad_uneven_dispatch_inputs": _FLEX,
    "moe_permute_fusion_into_hybridep": _FLEX,
    "moe_ncclep_static_shape": _FLEX,
    "moe_ncclep_zero_copy": _FLEX,
    "moe_use_legacy_grouped_gemm": "model.backend chooses how experts are computed; leave it out",
    "moe_per_layer_logging": "megatron-core's log does not see the losses of this package; set metrics.router=true, which records every layer",
    "moe_pad_experts_for_cuda_graph_inference": "it is for megatron-core's text generation, which this package does not run; leave it out",
    "overlap_moe_expert_parallel_comm": "megatron-core then takes forward passes apart, which the training step here does not offer; leave it out",
}


@lru_cache(maxsize=1)
def core_folder() -> Path | None:
    """Folder of the installed megatron.core, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("megatron")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(location) / "core" / "transformer" / "transformer_config.py").is_file():
            return Path(location) / "core"
    return None


@lru_cache(maxsize=1)
def megatron_fields() -> dict[str, ast.expr]:
    """Every field of TransformerConfig, inherited ones included, with its annotation."""
    folder, fields = core_folder(), {}
    if folder is not None:
        for file, name in (("model_parallel_config.py", "ModelParallelConfig"), ("transformer/transformer_config.py", "TransformerConfig")):
            for statement in _class(folder / file, name).body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and not statement.target.id.startswith("_"):
                    fields[statement.target.id] = statement.annotation
    return fields


@lru_cache(maxsize=1)
def megatron_enums() -> dict[str, list[str]]:
    """Member names of the enums that annotations use."""
    folder, enums = core_folder(), {}
    if folder is not None:
        for statement in ast.parse((folder / "transformer" / "enums.py").read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.ClassDef):
                targets = [target for line in statement.body if isinstance(line, ast.Assign) for target in line.targets]
                enums[statement.name] = [target.id for target in targets if isinstance(target, ast.Name)]
    return enums


def _class(file: Path, name: str) -> ast.ClassDef:
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
    raise LookupError(f"{file} has no class {name}")


def megatron_problems(given: dict[str, Any]) -> Iterator[str]:
    """One sentence for each entry of the `megatron:` section that cannot be passed through."""
    if given and core_folder() is None:
        yield "megatron: megatron-core is not installed, so its fields cannot be checked; install it (pip install -e .), or leave the section out"
        return
    for name, value in given.items():
        key = f"megatron.{name}"
        if name in DECIDED_ELSEWHERE:
            yield f"{key}={shown(value)}: set {DECIDED_ELSEWHERE[name]} instead"
        elif name in FIXED:
            yield f"{key}={shown(value)}: every model here has {FIXED[name]}; leave it out"
        elif name in NOT_HERE:
            yield f"{key}={shown(value)}: {NOT_HERE[name]}"
        elif name not in megatron_fields():
            match = nearest(name, list(megatron_fields()))
            hint = f"did you mean megatron.{match[0]}?" if match else "its fields are listed in megatron/core/transformer/transformer_config.py"
            if match and match[0] in DECIDED_ELSEWHERE:
                hint = f"did you mean {DECIDED_ELSEWHERE[match[0]]}?"
            yield f"{key}={shown(value)}: megatron-core's TransformerConfig has no such field; {hint}"
        else:
            annotation = megatron_fields()[name]
            words = annotation_words(annotation)
            if not words:
                yield f"{key}={shown(value)}: this field takes a Python object ({ast.unparse(annotation)}) and cannot be set from a configuration"
            elif not fits(annotation, value):
                yield f"{key}={shown(value)}: this must be {' or '.join(words)}"


def is_free(name: str) -> bool:
    """Whether megatron-core has a field of this name that may be set in the `megatron:` section."""
    return name in megatron_fields() and name not in DECIDED_ELSEWHERE and name not in FIXED and name not in NOT_HERE


def annotation_words(annotation: ast.expr) -> list[str]:
    """What an annotation accepts, in plain words; empty if nothing that YAML can write."""
    name, inner = _parts(annotation)
    if name == "Optional":
        inside = annotation_words(inner[0])
        return [*inside, "null"] if inside else []
    if name == "Union":
        return [word for part in inner for word in annotation_words(part)]
    if name == "Literal":
        return ["one of " + ", ".join(str(ast.literal_eval(part)) for part in inner)]
    if name in ("list", "List", "tuple", "Tuple"):
        count = f" of {len(inner)}" if name in ("tuple", "Tuple") else ""
        inside = annotation_words(inner[0]) if inner else []
        return [f"a list{count}" + (f", each item {' or '.join(inside)}" if inside else "")]
    if name in megatron_enums():
        return ["one of " + ", ".join(megatron_enums()[name])]
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}.get(name)
    return [words] if words else []


def fits(annotation: ast.expr, value: Any) -> bool:
    """Whether a value from YAML fits an annotation; enums are written by their member's name."""
    name, inner = _parts(annotation)
    if name == "Optional":
        return value is None or fits(inner[0], value)
    if name == "Union":
        return any(fits(part, value) for part in inner)
    if name == "Literal":
        return any(type(value) is type(choice) and value == choice for choice in map(ast.literal_eval, inner))
    if name in ("list", "List"):
        return isinstance(value, list) and (not inner or all(fits(inner[0], item) for item in value))
    if name in ("tuple", "Tuple"):
        return isinstance(value, list) and len(value) == len(inner) and all(fits(part, item) for part, item in zip(inner, value, strict=True))
    if name in megatron_enums():
        return value in megatron_enums()[name]
    if name == "float":
        return type(value) in (int, float) and abs(value) < float("inf")
    return {"int": int, "bool": bool, "str": str, "None": type(None)}.get(name) is type(value)


def python_values(given: dict[str, Any], enums: ModuleType) -> dict[str, Any]:
    """The checked section with the types the dataclass wants: members for names of enums, tuples where the annotation says tuple.

    Args:
        given: the `megatron:` section.
        enums: the module `megatron.core.transformer.enums`, which only a caller that has torch can import.
    """
    return {name: _python_value(megatron_fields()[name], value, enums) for name, value in given.items()}


def _python_value(annotation: ast.expr, value: Any, enums: ModuleType) -> Any:
    name, inner = _parts(annotation)
    if name in ("Optional", "Union"):
        fitting = next((part for part in inner if fits(part, value)), None)
        return value if fitting is None else _python_value(fitting, value, enums)
    if name in ("tuple", "Tuple"):
        return tuple(value)
    if name in ("list", "List") and inner:
        return [_python_value(inner[0], item, enums) for item in value]
    return getattr(enums, name)[value] if name in megatron_enums() else value


def _parts(annotation: ast.expr) -> tuple[str, list[ast.expr]]:
    """Outer name and arguments: `Optional[int]` is ("Optional", [int])."""
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return ast.unparse(annotation.value), list(inner)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return "Union", [annotation.left, annotation.right]
    return ast.unparse(annotation), []
