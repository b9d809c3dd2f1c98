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


@dataclass(frozen=True)
class HeldParameters:
    """What one rank holds of one chunk of the model, vocabulary padded.

    Args:
        dense: everything but routers and routed experts: embedding, attention, norms, dense feed-forward, shared experts, output layer.
        routers: gates, which stay in fp32 whatever the precision.
        experts: routed experts.
        shared_embedding: of `dense`, the copy of an embedding that the first and the last stage both hold.
        whole: of `dense` and `routers`, what every tensor-parallel rank holds in full: norms, routers and the shared expert's gate.
    """

    dense: int
    routers: int
    experts: int
    shared_embedding: int
    whole: int

    @property
    def total(self) -> int:
        return self.dense + self.routers + self.experts


def held_parameters(config: Config) -> list[list[HeldParameters]]:
    """For each pipeline stage, what one of its ranks holds of each of its chunks; all ranks of a stage hold the same numbers.

    Matrices are split over tp (experts over ep and etp), norms, routers and the shared expert's gate are whole on every rank. A query, key and value
    bias is split with its matrix. With tied embeddings and several stages the last one holds a copy.
    """
    p, m = config.parallel, config.model
    embedding = m.padded_vocab_size * m.hidden_size // p.tp
    held = []
    for stage, chunks in enumerate(stage_chunks(config)):
        of_stage = []
        for number, layers in enumerate(chunks):
            first, last = stage == number == 0, stage == p.pp - 1 and number == p.vpp - 1
            copies = first + (last and (not m.tie_embeddings or not first))
            shared = embedding * (first or last) * (m.tie_embeddings and p.pp > 1)
            of_stage.append(_held_by_chunk(config, layers, embedding * copies, shared, m.hidden_size * last))
        held.append(of_stage)
    return held


def _held_by_chunk(config: Config, layers: list[int], embeddings: int, shared_embedding: int, final_norm: int) -> HeldParameters:
    m, p, moe = config.model, config.parallel, config.moe
    hidden, sparse = m.hidden_size, len(set(layers) & set(config.moe_layers))
    head_norms = 2 * m.resolved_head_dim * m.qk_norm
    whole = len(layers) * (2 * hidden + head_norms) + final_norm
    split = len(layers) * (attention_parameters(config) - head_norms) + (len(layers) - sparse) * 3 * hidden * m.ffn_hidden_size
    routers = experts = 0
    if moe is not None:
        routers = sparse * moe.num_experts * hidden
        experts = sparse * (moe.num_experts // p.ep) * (3 * hidden * expert_width(config) // p.etp)
        split += sparse * 3 * hidden * (moe.shared_expert_ffn_hidden_size or 0)
        whole += sparse * hidden * moe.shared_expert_gate
    return HeldParameters(split // p.tp + whole + embeddings, routers, experts, shared_embedding, whole + routers)


def stage_parameters(config: Config) -> list[int]:
    """Parameters one rank of each pipeline stage holds, vocabulary padded."""
    return [sum(chunk.total for chunk in chunks) for chunks in held_parameters(config)]
