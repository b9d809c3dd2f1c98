"""Exact parameter counts: the whole model, what one token uses, each component, and each rank.

For H hidden, V vocabulary, F feed-forward width, A = heads * head_dim, G = key/value heads * head_dim, E experts, K top-k:

    embedding           V H           output layer   V H (0 if tied)          final norm   H
    attention           H (A + 2 G) + A H   (+ A + 2 G with qkv_bias, + 2 head_dim with qk_norm)
    norms of a layer    2 H
    dense feed-forward  3 H F
    MoE feed-forward    router E H + E * 3 H F_expert (+ 3 H F_shared, + H with its gate); active: the same with K in place of E in the second term

The headline figures use the real vocabulary, without padding (Skywork-MoE's 146.4 B is that count); the padded total, which is what is stored and
trained, is given beside it. Fields passed through the `megatron:` section are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.stages import stage_chunks


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Args:
        total: all of them, vocabulary not padded.
        active: those one token uses (top-k experts instead of all), embedding and output layer included; vocabulary not padded.
        padded_total: all of them as stored, vocabulary padded.
        components: total by component; the values add up to `total`.
        active_components: the same for `active`.
    """

    total: int
    active: int
    padded_total: int
    components: dict[str, int] = field(default_factory=dict)
    active_components: dict[str, int] = field(default_factory=dict)


def attention_parameters(config: Config) -> int:
    """Attention of one layer, biases and per-head norms included, the input norm not."""
    m = config.model
    queries = m.num_attention_heads * m.resolved_head_dim
    keys_values = 2 * m.resolved_query_groups * m.resolved_head_dim
    matrices = m.hidden_size * (queries + keys_values) + queries * m.hidden_size
    return matrices + (queries + keys_values) * m.qkv_bias + 2 * m.resolved_head_dim * m.qk_norm


def expert_width(config: Config) -> int:
    """Inner width of one routed expert."""
    assert config.moe is not None
    return config.moe.ffn_hidden_size or config.model.ffn_hidden_size


def count_parameters(config: Config) -> ParameterCount:
    """Counts a model's parameters exactly; see the module's docstring for what each term is."""
    m, moe = config.model, config.moe
    hidden, layers = m.hidden_size, m.num_layers
    moe_layers = len(config.moe_layers)
    components = {"embedding": m.vocab_size * hidden}
    if not m.tie_embeddings:
        components["output layer"] = m.vocab_size * hidden
    components["attention"] = layers * attention_parameters(config)
    components["norms"] = (2 * layers + 1) * hidden
    if moe_layers < layers:
        components["dense feed-forward"] = (layers - moe_layers) * 3 * hidden * m.ffn_hidden_size
    active = dict(components)
    if moe is not None:
        expert = 3 * hidden * expert_width(config)
        components["routers"] = active["routers"] = moe_layers * moe.num_experts * hidden
        components["experts"], active["experts"] = moe_layers * moe.num_experts * expert, moe_layers * moe.topk * expert
        if moe.shared_expert_ffn_hidden_size:
            shared = 3 * hidden * moe.shared_expert_ffn_hidden_size + hidden * moe.shared_expert_gate
            components["shared experts"] = active["shared experts"] = moe_layers * shared
    total = sum(components.values())
    padding = (m.padded_vocab_size - m.vocab_size) * hidden * (1 if m.tie_embeddings else 2)
    return ParameterCount(total, sum(active.values()), total + padding, components, active)


def stage_parameters(config: Config) -> list[int]:
    """Parameters one rank of each pipeline stage holds, vocabulary padded; all ranks of a stage hold the same number.

    Matrices are split over tp (experts over ep and etp), norms, routers and the shared expert's gate are whole on every rank. A query, key and value
    bias is split with its matrix. With tied embeddings and several stages the last one holds a copy.
    """
    m, p, moe = config.model, config.parallel, config.moe
    hidden, moe_layers = m.hidden_size, set(config.moe_layers)
    embedding = m.padded_vocab_size * hidden // p.tp
    head_norms = 2 * m.resolved_head_dim * m.qk_norm
    attention = (attention_parameters(config) - head_norms) // p.tp + head_norms
    dense = 3 * hidden * m.ffn_hidden_size // p.tp
    sparse = 0
    if moe is not None:
        sparse = moe.num_experts * hidden + moe.num_experts // p.ep * 3 * hidden * expert_width(config) // p.etp
        sparse += 3 * hidden * (moe.shared_expert_ffn_hidden_size or 0) // p.tp + hidden * moe.shared_expert_gate
    counts = []
    for stage, chunks in enumerate(stage_chunks(config)):
        first, last = stage == 0, stage == p.pp - 1
        layers = [layer for chunk in chunks for layer in chunk]
        count = sum(attention + 2 * hidden + (sparse if layer in moe_layers else dense) for layer in layers)
        count += embedding * first + hidden * last
        count += embedding * (last and (not m.tie_embeddings or not first))
        counts.append(count)
    return counts
