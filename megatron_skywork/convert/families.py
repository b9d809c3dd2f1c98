"""Reads a Hugging Face `config.json` into our Model and Moe sections, and writes one for our sections.

A setting of the source that our model cannot honour is an error: a converter that drops it would give a model that computes something else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.table import moe_layers
from megatron_skywork.errors import CheckpointError

DENSE = ("llama", "mistral", "qwen2", "qwen3", "skywork")
SPARSE = ("skywork_moe", "mixtral")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "skywork_moe": "SkyworkForCausalLM",
}  # fmt: skip
# Families for which an absent num_key_value_heads means one per query head, and an absent rope_theta means 10000.
_OLD = ("llama", "skywork", "skywork_moe")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Description:
    """What a config.json says about a model."""

    family: str
    model: Model
    moe: Moe | None
    token_ids: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Keys:
    """Reads keys of a config and collects what is wrong with them."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.problems: list[str] = []

    def need(self, key: str) -> Any:
        if self.config.get(key) is None:
            self.problems.append(f"{key}: missing")
            return 1
        return self.config[key]

    def get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def refuse(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        value = self.config.get(key)
        if value is not None and value not in allowed:
            self.problems.append(f"{key}={value!r}: {why}")


def read_config(config: dict[str, Any], where: str = "config.json") -> Description:
    """Our sections for a Hugging Face config.

    Raises:
        CheckpointError: an unknown model type, or settings our model cannot honour; all are listed.
    """
    family = _family(config, where)
    keys = _Keys(config)
    notes: list[str] = []
    model = dict(
        num_layers=keys.need("num_hidden_layers"),
        hidden_size=keys.need("hidden_size"),
        ffn_hidden_size=keys.need("intermediate_size"),
        num_attention_heads=keys.need("num_attention_heads"),
        vocab_size=keys.need("vocab_size"),
        max_position_embeddings=_positions(keys, family, notes),
        rope_theta=float(_rope_theta(keys, family)),
        norm_epsilon=float(keys.need("rms_norm_eps")),
        tie_embeddings=bool(keys.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family == "skywork_moe" and bool(keys.get("qkv_bias", False))),
        qk_norm=family == "qwen3" or (family == "skywork_moe" and bool(keys.get("qk_norm", False))),
        init_std=float(keys.get("model_init_std", keys.get("initializer_range", 0.02))) or 0.02,
    )
    groups = keys.get("num_key_value_heads", model["num_attention_heads"]) if family in _OLD else keys.need("num_key_value_heads")
    if groups != model["num_attention_heads"]:
        model["num_query_groups"] = groups
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else None)
    if head_dim is not None and head_dim * model["num_attention_heads"] != model["hidden_size"]:
        model["head_dim"] = head_dim
    _refuse_unsupported(keys, family)
    moe = _moe(keys, family) if family in SPARSE else None
    if keys.problems:
        raise CheckpointError(
            f"{where}: this model cannot be converted without changing what it computes:\n" + "\n".join("  " + line for line in keys.problems)
        )
    try:
        sections = Model(**model), None if moe is None else Moe(**moe)
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']} (found {item['input']!r})" for item in error.errors()]
        raise CheckpointError(f"{where}: settings that make no model:\n" + "\n".join(lines)) from error
    return Description(family, *sections, {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}, notes)


def _family(config: dict[str, Any], where: str) -> str:
    name = config.get("model_type")
    if name == "skywork" and _expert_count(config.get("num_experts")) > 1:
        return "skywork_moe"
    if name in DENSE + SPARSE:
        return str(name)
    raise CheckpointError(f"{where}: model_type={name!r} is not supported; supported are {', '.join(DENSE + SPARSE)}")


def _expert_count(value: Any) -> int:
    if isinstance(value, list):
        return max([item for item in value if isinstance(item, int)], default=0)
    return value if isinstance(value, int) else 0


def _rope_theta(keys: _Keys, family: str) -> float:
    """transformers 5 keeps `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    rope = {**(keys.config.get("rope_scaling") or {}), **(keys.config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in (None, "default"):
        keys.problems.append(f"rope type {kind!r}: only plain rotary positions are supported")
    if rope.get("partial_rotary_factor", keys.config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        keys.problems.append("partial_rotary_factor: only full rotary positions are supported")
    if rope.get("rope_theta"):
        return rope["rope_theta"]
    return keys.get("rope_theta", 10000.0) if family in _OLD else keys.need("rope_theta")


def _positions(keys: _Keys, family: str, notes: list[str]) -> int:
    positions: int = keys.need("max_position_embeddings")
    window = keys.config.get("sliding_window")
    used = family in ("mistral", "mixtral") or bool(keys.config.get("use_sliding_window"))
    if window is not None and used and window < positions:
        notes.append(
            f"sliding_window={window}: attention here is full, which is the same up to {window} tokens; "
            f"max_position_embeddings is set to {window} instead of {positions}"
        )
        return window
    return positions


def _refuse_unsupported(keys: _Keys, family: str) -> None:
    keys.refuse("hidden_act", ("silu", "swish"), "only SwiGLU feed-forwards are supported (silu)")
    keys.refuse("attention_bias", (False,), "bias on the attention projections is supported for qwen2 only, and never on the output projection")
    keys.refuse("mlp_bias", (False,), "bias in the feed-forward is not supported")
    keys.refuse("quantization_config", (), "quantized weights cannot be converted; use the original weights")
    if family == "skywork_moe":
        keys.refuse("moe_use_skywork_gating", (False,), "this gate is not published")
        keys.refuse("moe_2layer_gate", (False,), "a gate of two layers is not supported")
        keys.refuse("moe_expert_interval", (1,), "only every layer, or moe_layer_indices, is supported")
        keys.refuse("moe_feature_no_mul_topk", (True,), "expert weights that are multiplied by top-k are not supported")


def _moe(keys: _Keys, family: str) -> dict[str, Any]:
    if family == "mixtral":
        keys.refuse("num_experts_per_tok", tuple(range(2, 1024)), "Mixtral gives a single expert the weight 1, here it keeps its probability")
        return dict(num_experts=keys.need("num_local_experts"), topk=keys.get("num_experts_per_tok", 2), gate_norm=False)
    experts = keys.need("num_experts")
    counts = experts if isinstance(experts, list) else [experts]
    if len(set(counts)) != 1:
        keys.problems.append(f"num_experts={experts!r}: layers with different numbers of experts are not supported")
    moe = dict(num_experts=counts[0] if counts else 0, topk=keys.get("num_experts_per_tok", 2), gate_norm=bool(keys.get("moe_use_logits_norm", False)))
    if keys.get("initializer_range", 0.01):
        moe["router_init_std"] = float(keys.get("initializer_range", 0.01))
    if moe["gate_norm"]:
        moe["gate_norm_scale"] = float(keys.get("moe_gate_norm_std", 1.0))
        moe["gate_norm_unbiased"] = bool(keys.get("moe_gate_norm_unbiased", True))
        if keys.config.get("moe_gate_norm_eps") is not None:
            moe["gate_norm_epsilon"] = float(keys.config["moe_gate_norm_eps"]) or 1e-20
    for ours, theirs in (
        ("layers", "moe_layer_indices"),
        ("shared_expert_ffn_hidden_size", "shared_expert_intermediate_size"),
        ("ffn_hidden_size", "moe_intermediate_size"),
    ):
        if keys.config.get(theirs) is not None:
            moe[ours] = keys.config[theirs]
    return moe


# ------------------------------------------------------------------------------------------------------------------------------ writing


def choose_family(model: Model, moe: Moe | None, wanted: str = "auto") -> str:
    """The Hugging Face model type for a model of ours.

    Raises:
        CheckpointError: the wanted one cannot express the model; the reasons are listed.
    """
    family = wanted
    if wanted == "auto":
        family = "skywork_moe" if moe is not None else "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "llama"
    problems = []
    if family not in ARCHITECTURES:
        raise CheckpointError(f"format {family!r}: not known; use auto, {', '.join(sorted(ARCHITECTURES))}")
    if (moe is not None) != (family in SPARSE):
        problems.append("it is a mixture of experts" if moe is not None else "it is dense")
    if family != "skywork_moe" and model.qkv_bias != (family == "qwen2"):
        problems.append(f"model.qkv_bias is {str(model.qkv_bias).lower()}")
    if family != "skywork_moe" and model.qk_norm != (family == "qwen3"):
        problems.append(f"model.qk_norm is {str(model.qk_norm).lower()}")
    if moe is not None and family == "mixtral":
        if moe.topk == 1:
            problems.append("moe.topk is 1 (Mixtral would give the expert the weight 1)")
        if moe.gate_norm:
            problems.append("moe.gate_norm is true (Mixtral's gate is plain)")
        if len(moe_layers(model, moe)) != model.num_layers:
            problems.append("some layers are dense")
        if moe.shared_expert_ffn_hidden_size is not None:
            problems.append("it has a shared expert")
    if problems:
        raise CheckpointError(f"the {family} format cannot hold this model: {'; '.join(problems)}")
    return family


def write_config(model: Model, moe: Moe | None, family: str, dtype: str, token_ids: dict[str, Any] | None = None) -> dict[str, Any]:
    """The Hugging Face config of a model of ours; `dtype` as torch names it without `torch.`."""
    experts_width = model.ffn_hidden_size if moe is None or moe.ffn_hidden_size is None else moe.ffn_hidden_size
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": model.hidden_size,
        "intermediate_size": experts_width if family == "mixtral" else model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.resolved_query_groups,
        "head_dim": model.resolved_head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_std if moe is None or family == "mixtral" else moe.router_init_std,
        "use_cache": True,
        # transformers before 4.56 reads torch_dtype, later ones dtype.
        "torch_dtype": dtype,
        "dtype": dtype,
        **(token_ids or {}),
    }
    if family in ("mistral", "mixtral", "skywork_moe"):
        config["sliding_window"] = None
    if family in ("llama", "qwen3"):
        config["attention_bias"] = False
    if family == "llama":
        config["mlp_bias"] = False
    if family == "mixtral" and moe is not None:
        config |= {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.topk, "output_router_logits": False, "router_aux_loss_coef": 0.0}
    if family == "skywork_moe" and moe is not None:
        config |= _skywork_moe_keys(model, moe)
    return config


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
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "model_init_std": model.init_std,
    }
    if moe.ffn_hidden_size is not None:
        keys["moe_intermediate_size"] = moe.ffn_hidden_size
    if len(moe_layers(model, moe)) != model.num_layers:
        keys["moe_layer_indices"] = sorted(moe_layers(model, moe))
    if moe.shared_expert_ffn_hidden_size is not None:
        keys["shared_expert_intermediate_size"] = moe.shared_expert_ffn_hidden_size
    return keys
