"""Reads a Hugging Face `config.json` into our Model and Moe sections, and says which family can hold a model of ours.

A setting of the source that our model cannot honour is an error: a converter that drops it would give a model that computes something else.

How a family weighs the chosen experts, p being the softmax over all of them:

    chosen p as they are      moe.pre_softmax=true, or topk 1      qwen*_moe with norm_topk_prob=false, skywork_moe with top-1 or moe_pre_softmax
    made to sum to 1          moe.pre_softmax=false, topk > 1      mixtral, qwen*_moe with norm_topk_prob=true, skywork_moe
    always 1                  no setting of ours                   mixtral or norm_topk_prob=true with top-1; such a router cannot learn
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.config_json import ARCHITECTURES, LLAMA3_ROPE, write_config
from megatron_skywork.convert.safety.shown import first_lines, shown
from megatron_skywork.convert.table import moe_layers
from megatron_skywork.errors import CheckpointError

DENSE = ("llama", "mistral", "qwen2", "qwen3", "skywork")
SPARSE = ("skywork_moe", "mixtral", "qwen2_moe", "qwen3_moe")
# Families for which an absent num_key_value_heads means one per query head, and an absent rope_theta means 10000.
_OLD = ("llama", "skywork", "skywork_moe")
_WHOLE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
          "num_experts_per_tok", "decoder_sparse_step")  # fmt: skip
_NUMBERS = ("rope_theta", "rms_norm_eps", "initializer_range", "model_init_std", "moe_gate_norm_std", "moe_gate_norm_eps")
_LISTS, _OBJECTS = ("mlp_only_layers", "moe_layer_indices"), ("rope_scaling", "rope_parameters")
# Floating point has no room for larger ones, and no key that is calculated with is near.
_LARGEST_NUMBER = 1 << 63
_LONGEST_LIST = 10_000
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

__all__ = ["ARCHITECTURES", "DENSE", "SPARSE", "Description", "choose_family", "read_config", "same_model", "why_not", "write_config"]


@dataclass(frozen=True)
class Description:
    """What a config.json says about a model."""

    family: str
    model: Model
    moe: Moe | None
    token_ids: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def naming(self) -> str:
        """Whose names the tensors have, a key of `table.NAMINGS`; for a dense model any of them."""
        return self.family if self.moe is not None else "skywork_moe"


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
            self.problems.append(f"{key}={shown(value)}: {why}")


def read_config(config: dict[str, Any], where: str = "config.json") -> Description:
    """Our sections for a Hugging Face config.

    Raises:
        CheckpointError: an unknown model type, or settings our model cannot honour; all are listed.
    """
    family = _family(config, where)
    _check_types(config, where)
    keys = _Keys(config)
    notes: list[str] = []
    theta, scaling = _rope(keys, family)
    model = dict(
        num_layers=keys.need("num_hidden_layers"),
        hidden_size=keys.need("hidden_size"),
        ffn_hidden_size=keys.need("intermediate_size"),
        num_attention_heads=keys.need("num_attention_heads"),
        vocab_size=keys.need("vocab_size"),
        max_position_embeddings=_positions(keys, family, notes),
        rope_theta=theta,
        rope_scaling_factor=scaling,
        norm_epsilon=float(keys.need("rms_norm_eps")),
        tie_embeddings=bool(keys.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family in ("skywork_moe", "qwen2_moe") and bool(keys.get("qkv_bias", family == "qwen2_moe"))),
        qk_norm=family in ("qwen3", "qwen3_moe") or (family == "skywork_moe" and bool(keys.get("qk_norm", False))),
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
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']} (found {shown(item['input'])})" for item in error.errors()]
        raise CheckpointError(f"{where}: settings that make no model:\n" + "\n".join(first_lines(lines))) from error
    return Description(family, *sections, {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}, notes)


def _family(config: dict[str, Any], where: str) -> str:
    name = config.get("model_type")
    if name == "skywork" and _expert_count(config.get("num_experts")) > 1:
        return "skywork_moe"
    if name in DENSE + SPARSE:
        return str(name)
    raise CheckpointError(f"{where}: model_type={shown(name)} is not supported; supported are {', '.join(DENSE + SPARSE)}")


def _check_types(config: dict[str, Any], where: str) -> None:
    """Keys that are calculated with must hold what they are calculated as; the sections check the rest."""
    kinds: list[tuple[str, Any, tuple[str, ...]]] = [
        ("a whole number", int, _WHOLE), ("a number", (int, float), _NUMBERS), ("a list", list, _LISTS), ("an object", dict, _OBJECTS)
    ]  # fmt: skip
    wrong = [
        f"{key}={shown(config[key])}: must be {words}"
        for words, kind, names in kinds
        for key in names
        if config.get(key) is not None and (not isinstance(config[key], kind) or isinstance(config[key], bool))
    ]
    for name, value in [(key, config.get(key)) for key in _WHOLE + _NUMBERS] + _inner_values(config):
        if isinstance(value, int) and abs(value) >= _LARGEST_NUMBER:
            wrong.append(f"{name}={shown(value)}: is beyond any number a model has")
    for key in _LISTS:
        if isinstance(config.get(key), list) and len(config[key]) > _LONGEST_LIST:
            wrong.append(f"{key}: has {len(config[key]):,} items, more than any model has layers")
    if wrong:
        raise CheckpointError(f"{where}: settings that make no model:\n" + "\n".join("  " + line for line in first_lines(wrong)))


def _inner_values(config: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{key}.{name}", value) for key in _OBJECTS if isinstance(config.get(key), dict) for name, value in config[key].items()]


def _expert_count(value: Any) -> int:
    if isinstance(value, list):
        return max([item for item in value if isinstance(item, int)], default=0)
    return value if isinstance(value, int) else 0


def _rope(keys: _Keys, family: str) -> tuple[float, float | None]:
    """Base and Llama 3.1's scaling factor. transformers 5 keeps `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    old, new = (dict(keys.config.get(name) or {}) for name in ("rope_scaling", "rope_parameters"))
    for rope in (old, new):
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
    differing = sorted(name for name in set(old) & set(new) if old[name] != new[name])
    if differing:
        keys.problems.append(f"rope_scaling and rope_parameters disagree on {', '.join(differing)}; remove the one that is wrong")
    rope = {**old, **new}
    kind, scaling = rope.get("rope_type") or "default", None
    if any(isinstance(value, dict) for value in rope.values()):
        keys.problems.append(f"rope_parameters={shown(rope)}: layers with different rotary positions are not supported")
    elif kind == "llama3":
        scaling = _llama3_factor(keys, rope)
    elif kind != "default":
        keys.problems.append(f"rope type {shown(kind)}: only plain rotary positions and Llama 3.1's (llama3) are supported")
    if rope.get("partial_rotary_factor", keys.config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        keys.problems.append("partial_rotary_factor: only full rotary positions are supported")
    keys.refuse("rope_interleaved", (False,), "only the half-rotation form of rotary positions is supported")
    if not isinstance(rope.get("rope_theta", 1.0), int | float):
        keys.problems.append(f"rope_theta={shown(rope.pop('rope_theta'))}: must be a number")
    theta = rope.get("rope_theta") or (keys.get("rope_theta", 10000.0) if family in _OLD else keys.need("rope_theta"))
    return float(theta), scaling


def _llama3_factor(keys: _Keys, rope: dict[str, Any]) -> float | None:
    found = {name: rope.get(name) for name in LLAMA3_ROPE}
    factor = rope.get("factor")
    if found != LLAMA3_ROPE or not isinstance(factor, int | float) or factor < 1:
        wanted = ", ".join(f"{name}={value:g}" for name, value in LLAMA3_ROPE.items())
        keys.problems.append(f"rope type 'llama3' with {', '.join(f'{name}={shown(value)}' for name, value in {'factor': factor, **found}.items())}: "
                             f"only {wanted} and a factor of 1 or more are supported")  # fmt: skip
        return None
    return float(factor) if factor > 1 else None


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
    return _skywork_moe(keys) if family == "skywork_moe" else _qwen_moe(keys, family)


def _qwen_moe(keys: _Keys, family: str) -> dict[str, Any]:
    # transformers 5 writes num_experts of some families as num_local_experts.
    experts = keys.get("num_local_experts", None) or keys.need("num_experts")
    topk, normalized = keys.need("num_experts_per_tok"), bool(keys.get("norm_topk_prob", False))
    if topk == 1 and normalized:
        keys.problems.append("num_experts_per_tok=1 with norm_topk_prob=true: the single expert gets the weight 1, here it keeps its probability")
    moe: dict[str, Any] = dict(num_experts=experts, topk=topk, gate_norm=False, pre_softmax=topk > 1 and not normalized)
    width = keys.need("moe_intermediate_size")
    if width != keys.config.get("intermediate_size"):
        moe["ffn_hidden_size"] = width
    if family == "qwen2_moe":
        moe |= dict(shared_expert_ffn_hidden_size=keys.need("shared_expert_intermediate_size"), shared_expert_gate=True)
    # The section refuses absurd numbers of layers; none of them becomes a list here.
    count, step, dense = min(keys.config.get("num_hidden_layers") or 0, 10_000), keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    layers = [layer for layer in sorted(set(range(count)).difference(item for item in dense if isinstance(item, int))) if step > 0 and (layer + 1) % step == 0]
    if count and not layers:
        keys.problems.append(f"decoder_sparse_step={step}, mlp_only_layers={shown(dense)}: no layer is left a mixture of experts")
    if len(layers) < count:
        moe["layers"] = layers
    return moe


def _skywork_moe(keys: _Keys) -> dict[str, Any]:
    experts = keys.need("num_experts")
    counts = experts if isinstance(experts, list) else [experts]
    if not counts or any(count != counts[0] for count in counts):
        keys.problems.append(f"num_experts={shown(experts)}: layers with different numbers of experts are not supported")
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
        ("shared_expert_gate", "shared_expert_gate"),
        ("pre_softmax", "moe_pre_softmax"),
    ):
        if keys.config.get(theirs) is not None:
            moe[ours] = keys.config[theirs]
    count = keys.config.get("num_hidden_layers") or 0
    if "layers" in moe and not any(isinstance(layer, int) and layer < count for layer in moe["layers"]):
        keys.problems.append(f"moe_layer_indices={shown(moe['layers'])}: no layer is left a mixture of experts")
    return moe


# ------------------------------------------------------------------------------------------------------------------------------ choosing


def choose_family(model: Model, moe: Moe | None, wanted: str = "auto") -> str:
    """The Hugging Face model type for a model of ours.

    Raises:
        CheckpointError: the wanted one cannot express the model; the reasons are listed, and the formats that can.
    """
    family = wanted
    if wanted == "auto":
        family = "skywork_moe" if moe is not None else "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "llama"
    if family not in ARCHITECTURES:
        raise CheckpointError(f"format {family!r}: not known; use auto, {', '.join(sorted(ARCHITECTURES))}")
    problems = why_not(family, model, moe)
    if problems:
        able = [name for name in ARCHITECTURES if not why_not(name, model, moe)]
        advice = f"use {' or '.join(able)}" if able else "no format can"
        raise CheckpointError(f"the {family} format cannot hold this model: {'; '.join(problems)}; {advice}")
    return family


def why_not(family: str, model: Model, moe: Moe | None) -> list[str]:
    """Reasons for which a family cannot express a model of ours; none if it can."""
    problems = []
    if (moe is not None) != (family in SPARSE):
        problems.append("it is a mixture of experts" if moe is not None else "it is dense")
    # These two families say it in their config.json; every other has it or has not.
    if family not in ("skywork_moe", "qwen2_moe") and model.qkv_bias != (family == "qwen2"):
        problems.append(f"model.qkv_bias is {str(model.qkv_bias).lower()}")
    if family != "skywork_moe" and model.qk_norm != (family in ("qwen3", "qwen3_moe")):
        problems.append(f"model.qk_norm is {str(model.qk_norm).lower()}")
    # transformers' LlamaConfig insists on it, head_dim or not, and the configuration of Skywork-MoE is derived from it.
    if family in ("llama", "skywork_moe") and model.hidden_size % model.num_attention_heads:
        problems.append(f"model.num_attention_heads={model.num_attention_heads} does not divide model.hidden_size={model.hidden_size}")
    if moe is not None and family in SPARSE and family != "skywork_moe":
        problems += _limits_of_mixtures(family, model, moe)
    return problems


def _limits_of_mixtures(family: str, model: Model, moe: Moe) -> list[str]:
    problems = []
    if moe.gate_norm:
        problems.append("moe.gate_norm is true (its gate is plain)")
    if family == "mixtral" and moe.topk == 1:
        problems.append("moe.topk is 1 (Mixtral would give the expert the weight 1)")
    elif family == "mixtral" and moe.pre_softmax:
        problems.append("moe.pre_softmax is true (Mixtral makes the chosen weights sum to 1)")
    if family == "mixtral" and len(moe_layers(model, moe)) != model.num_layers:
        problems.append("some layers are dense")
    if family != "qwen2_moe" and moe.shared_expert_ffn_hidden_size is not None:
        problems.append("it has a shared expert")
    if family == "qwen2_moe" and moe.shared_expert_ffn_hidden_size is None:
        problems.append("it has no shared expert (Qwen2-MoE always has one)")
    elif family == "qwen2_moe" and not moe.shared_expert_gate:
        problems.append("moe.shared_expert_gate is false (Qwen2-MoE always gates its shared expert)")
    return problems


def same_model(config: dict[str, Any], model: Model, moe: Moe | None) -> bool:
    """Whether a config.json describes exactly this model: everything that decides its outputs, written one way or another."""
    try:
        described = read_config(config)
    except CheckpointError:
        return False
    return _computes(described.model, described.moe) == _computes(model, moe)


def _computes(model: Model, moe: Moe | None) -> dict[str, Any]:
    """What decides a model's outputs, without what only training reads, each thing said in one way."""
    sparse = moe_layers(model, moe)
    names = ("num_layers", "hidden_size", "num_attention_heads", "resolved_query_groups", "resolved_head_dim", "vocab_size", "max_position_embeddings",
             "rope_theta", "rope_scaling_factor", "norm_epsilon", "tie_embeddings", "qkv_bias", "qk_norm")  # fmt: skip
    facts: dict[str, Any] = {name: getattr(model, name) for name in names}
    if len(sparse) < model.num_layers:
        facts["ffn_hidden_size"] = model.ffn_hidden_size
    if moe is not None:
        facts |= {name: getattr(moe, name) for name in ("num_experts", "topk", "shared_expert_ffn_hidden_size", "shared_expert_gate")}
        facts |= {"layers": sparse, "width": moe.ffn_hidden_size or model.ffn_hidden_size, "keeps_probability": moe.pre_softmax or moe.topk == 1}
        facts["norm"] = (moe.gate_norm_scale, moe.gate_norm_epsilon, moe.gate_norm_unbiased) if moe.gate_norm else None
    return facts
