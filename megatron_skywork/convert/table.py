"""The weight table: which of our tensors is made of which Hugging Face tensors, by which layout. Names only.

Every conversion, in either direction, reads this one table. `{layer}` and `{expert}` stand for their numbers; `{block}`, `{gate}`, `{up}` and `{down}` for
the words of a naming, which is all that mixtures of different families differ in. A row applies where its conditions hold: `dense` and `moe` ask for the kind
of layer; `untied`, `qkv_bias`, `qk_norm`, `shared`, `shared_gate` for a property of the model. Our names are the ones megatron-core gives a Transformer Engine
model, whichever backend runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.layouts import Experts, Layout, PaddedVocab, QkvByGroup, Same, Stacked


@dataclass(frozen=True)
class Row:
    """A line of the table: our name, their names, the layout, and where it applies."""

    ours: str
    theirs: tuple[str, ...]
    layout: str
    needs: tuple[str, ...] = ()


OURS = "decoder.layers.{layer}."
HF = "model.layers.{layer}."

ATTENTION = (
    Row(OURS + "self_attention.linear_qkv.layer_norm_weight", (HF + "input_layernorm.weight",), "hidden"),
    Row(OURS + "self_attention.linear_qkv.weight", tuple(HF + f"self_attn.{name}_proj.weight" for name in "qkv"), "qkv"),
    Row(OURS + "self_attention.linear_qkv.bias", tuple(HF + f"self_attn.{name}_proj.bias" for name in "qkv"), "qkv_bias", ("qkv_bias",)),
    Row(OURS + "self_attention.q_layernorm.weight", (HF + "self_attn.q_norm.weight",), "head", ("qk_norm",)),
    Row(OURS + "self_attention.k_layernorm.weight", (HF + "self_attn.k_norm.weight",), "head", ("qk_norm",)),
    Row(OURS + "self_attention.linear_proj.weight", (HF + "self_attn.o_proj.weight",), "proj"),
)
DENSE_FFN = (
    Row(OURS + "mlp.linear_fc1.layer_norm_weight", (HF + "post_attention_layernorm.weight",), "hidden", ("dense",)),
    Row(OURS + "mlp.linear_fc1.weight", (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"), "fc1", ("dense",)),
    Row(OURS + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), "fc2", ("dense",)),
)
# A mixture's own words: the module, and the three matrices of a SwiGLU, y = down(silu(gate x) * (up x)).
_BLOCK_SPARSE = {"block": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"}
_QWEN = {"block": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
NAMINGS = {"skywork_moe": _BLOCK_SPARSE, "mixtral": _BLOCK_SPARSE, "qwen2_moe": _QWEN, "qwen3_moe": _QWEN}

BLOCK = HF + "{block}."
EXPERT = BLOCK + "experts.{expert}."
SHARED = BLOCK + "shared_expert."
MOE_FFN = (
    Row(OURS + "pre_mlp_layernorm.weight", (HF + "post_attention_layernorm.weight",), "hidden", ("moe",)),
    Row(OURS + "mlp.router.weight", (BLOCK + "gate.weight",), "router", ("moe",)),
    Row(OURS + "mlp.experts.experts.linear_fc1.weight", (EXPERT + "{gate}.weight", EXPERT + "{up}.weight"), "expert_fc1", ("moe",)),
    Row(OURS + "mlp.experts.experts.linear_fc2.weight", (EXPERT + "{down}.weight",), "expert_fc2", ("moe",)),
    Row(OURS + "mlp.shared_experts.linear_fc1.weight", (SHARED + "{gate}.weight", SHARED + "{up}.weight"), "shared_fc1", ("moe", "shared")),
    Row(OURS + "mlp.shared_experts.linear_fc2.weight", (SHARED + "{down}.weight",), "shared_fc2", ("moe", "shared")),
    Row(OURS + "mlp.shared_experts.gate_weight", (BLOCK + "shared_expert_gate.weight",), "shared_gate", ("moe", "shared_gate")),
)
ENDS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "hidden"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab", ("untied",)),
)

# Buffers some Hugging Face files carry, computed from the config and never weights.
HF_BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
# What megatron-core and the trainer keep beside the weights in a distributed checkpoint.
OUR_STATE_SUFFIXES = ("_extra_state", ".router.aux_coefficient", ".router.batch_means", ".router.expert_bias", ".router.local_tokens_per_expert")
OUR_WEIGHT_PREFIXES = ("embedding.", "decoder.", "output_layer.")
# Modules for which megatron-core asks for an `_extra_state` object; `{layer}` as above. Experts have one each.
EXTRA_STATE_ATTENTION = (OURS + "self_attention.linear_qkv", OURS + "self_attention.linear_proj", OURS + "self_attention.core_attention")
EXTRA_STATE_DENSE = (OURS + "mlp.linear_fc1", OURS + "mlp.linear_fc2")
EXTRA_STATE_EXPERTS = (OURS + "mlp.experts.experts.linear_fc1", OURS + "mlp.experts.experts.linear_fc2")
EXTRA_STATE_SHARED = (OURS + "mlp.shared_experts.linear_fc1", OURS + "mlp.shared_experts.linear_fc2")


@dataclass(frozen=True)
class Weight:
    """A row with its numbers filled in."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout
    kind: str
    layer: int | None


def moe_layers(model: Model, moe: Moe | None) -> set[int]:
    """Indices of the MoE layers; the schema's rule, without the rest of a run's configuration."""
    if moe is None:
        return set()
    return set(range(model.num_layers)) if moe.layers is None else set(moe.layers)


def weights(model: Model, moe: Moe | None, naming: str = "skywork_moe") -> Iterator[Weight]:
    """Every weight of a model, in the order in which a forward pass needs them.

    Args:
        naming: whose words a mixture's tensors have, a key of `NAMINGS`; dense models have the same names in every family.
    """
    words = NAMINGS[naming]
    properties = {name for name, holds in _properties(model, moe).items() if holds}
    sparse = moe_layers(model, moe)
    yield _fill(ENDS[0], model, moe, None, words)
    for layer in range(model.num_layers):
        held = properties | {"moe" if layer in sparse else "dense"}
        for row in ATTENTION + DENSE_FFN + MOE_FFN:
            if held.issuperset(row.needs):
                yield _fill(row, model, moe, layer, words)
    for row in ENDS[1:]:
        if properties.issuperset(row.needs):
            yield _fill(row, model, moe, None, words)


def _properties(model: Model, moe: Moe | None) -> dict[str, bool]:
    shared = moe is not None and moe.shared_expert_ffn_hidden_size is not None
    gated = moe is not None and moe.shared_expert_gate
    return {"untied": not model.tie_embeddings, "qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm, "shared": shared, "shared_gate": gated}


def _fill(row: Row, model: Model, moe: Moe | None, layer: int | None, words: dict[str, str]) -> Weight:
    experts = moe.num_experts if moe is not None else 0
    ours = row.ours.format(layer=layer)
    if any("{expert}" in name for name in row.theirs):
        theirs = tuple(name.format(layer=layer, expert=expert, **words) for expert in range(experts) for name in row.theirs)
    else:
        theirs = tuple(name.format(layer=layer, **words) for name in row.theirs)
    return Weight(ours, theirs, layout_of(row.layout, model, moe), row.layout, layer)


def layout_of(kind: str, model: Model, moe: Moe | None) -> Layout:
    """The layout a row names, in the sizes of this model."""
    hidden, heads, groups, width = model.hidden_size, model.num_attention_heads, model.resolved_query_groups, model.resolved_head_dim
    if kind == "hidden":
        return Same((hidden,))
    if kind == "head":
        return Same((width,))
    if kind == "vocab":
        return PaddedVocab(model.vocab_size, model.padded_vocab_size, hidden)
    if kind == "qkv":
        return QkvByGroup(heads, groups, width, (hidden,))
    if kind == "qkv_bias":
        return QkvByGroup(heads, groups, width)
    if kind == "proj":
        return Same((hidden, heads * width))
    if kind in ("fc1", "fc2"):
        return _ffn(kind, model.ffn_hidden_size, hidden)
    if moe is None:
        raise ValueError(f"layout {kind} belongs to a mixture of experts, and the model is dense")
    if kind == "router":
        return Same((moe.num_experts, hidden))
    if kind in ("expert_fc1", "expert_fc2"):
        return Experts(moe.num_experts, _ffn(kind, moe.ffn_hidden_size or model.ffn_hidden_size, hidden))
    if kind in ("shared_fc1", "shared_fc2") and moe.shared_expert_ffn_hidden_size:
        return _ffn(kind, moe.shared_expert_ffn_hidden_size, hidden)
    if kind == "shared_gate":
        return Same((1, hidden))
    raise ValueError(f"unknown layout {kind}")


def _ffn(kind: str, ffn: int, hidden: int) -> Layout:
    return Stacked(2, (ffn, hidden)) if kind.endswith("fc1") else Same((hidden, ffn))


def extra_states(model: Model, moe: Moe | None) -> Iterator[str]:
    """Keys of the `_extra_state` objects megatron-core expects beside the weights, with their shard numbers (`/shard_I_N`)."""
    sparse = moe_layers(model, moe)
    for layer in range(model.num_layers):
        single: tuple[str, ...] = EXTRA_STATE_ATTENTION
        if layer not in sparse:
            single += EXTRA_STATE_DENSE
        elif moe is not None:
            if moe.shared_expert_ffn_hidden_size:
                single += EXTRA_STATE_SHARED
            for name in EXTRA_STATE_EXPERTS:
                for expert in range(moe.num_experts):
                    yield f"{name.format(layer=layer)}._extra_state/shard_{expert}_{moe.num_experts}"
        for name in single:
            yield f"{name.format(layer=layer)}._extra_state/shard_0_1"
