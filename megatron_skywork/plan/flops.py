"""Floating-point operations per token, and the formula in words, so that no MFU is printed without it.

    forward(token)  = 2 * N_matmul + 2 * L * A * S
    backward(token) = 2 * forward

Conventions:
* a multiply and an add are two operations; only matrix products count (no norms, softmax, rotary positions, activations, embedding look-up);
* N_matmul are the active parameters that stand in a matrix product: attention projections, the feed-forward of dense layers, K of E experts (nothing
  is counted as dropped), shared experts, routers and the output layer (also where it is tied to the embedding), vocabulary not padded;
* attention is causal: a token attends to (S + 1) / 2 tokens on average, taken as S / 2, two products (scores and values) of A = heads * head_dim
  each: 2 products * 2 operations * A * S / 2 = 2 A S per layer. Document masks are ignored, S is data.seq_length;
* recomputed activations do not count: this is what the model needs, not what the hardware does. `hardware_flops_per_token` is the latter: it adds what
  recomputation does again, the empty slots of experts that are padded to capacity, the padded vocabulary, and a fourth product of the output layer where
  logits are not kept. Kernels skip the masked half of attention, so that stays half there too; `full_attention_flops_per_token` is the other convention.

The Skywork-MoE report's speed (690 tokens/s and GPU) is 35.3 % of 312 TFLOP/s under another convention, 6 N_active + 12 L A S (embedding
counted, attention not halved); `report_flops_per_token` gives that one, so that numbers can be compared.
"""

from __future__ import annotations

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.parameters import attention_parameters, count_parameters, expert_width
from megatron_skywork.plan.stages import pieces, recomputed_layers

BACKWARD_OVER_FORWARD = 2


def matmul_parameters(config: Config) -> int:
    """N_matmul: active parameters that stand in a matrix product."""
    m = config.model
    active = count_parameters(config).active_components
    output = m.vocab_size * m.hidden_size
    biases = (m.num_attention_heads + 2 * m.resolved_query_groups) * m.resolved_head_dim * m.qkv_bias
    vectors = m.num_layers * (biases + 2 * m.resolved_head_dim * m.qk_norm)
    products = sum(count for name, count in active.items() if name not in ("embedding", "output layer", "norms"))
    return products - vectors + output


def attention_width(config: Config) -> int:
    """A: heads * head_dim."""
    return config.model.num_attention_heads * config.model.resolved_head_dim


def forward_flops_per_token(config: Config) -> int:
    """Operations of one token's forward pass."""
    return 2 * matmul_parameters(config) + 2 * config.model.num_layers * attention_width(config) * config.data.seq_length


def train_flops_per_token(config: Config) -> int:
    """Operations of one token's forward and backward pass."""
    return (1 + BACKWARD_OVER_FORWARD) * forward_flops_per_token(config)


def full_attention_flops_per_token(config: Config) -> int:
    """Forward and backward with attention's masked half counted: 3 * (2 N_matmul + 4 L A S)."""
    return train_flops_per_token(config) + (1 + BACKWARD_OVER_FORWARD) * 2 * config.model.num_layers * attention_width(config) * config.data.seq_length


def module_flops_per_token(config: Config, layer: int) -> dict[str, float]:
    """Forward operations of one layer (from 0) by the modules that recomputation knows: core_attn, attention (its projections), mlp, or router, moe (the routed
    experts, empty slots of padded ones counted) and shared_experts."""
    m, moe = config.model, config.moe
    biases = (m.num_attention_heads + 2 * m.resolved_query_groups) * m.resolved_head_dim * m.qkv_bias + 2 * m.resolved_head_dim * m.qk_norm
    found = {"core_attn": 2.0 * attention_width(config) * config.data.seq_length, "attention": 2.0 * (attention_parameters(config) - biases)}
    if moe is None or layer not in config.moe_layers:
        return {**found, "mlp": 2.0 * 3 * m.hidden_size * m.ffn_hidden_size}
    slots = moe.topk * (moe.capacity_factor if moe.pad_to_capacity and moe.capacity_factor is not None else 1.0)
    shared = moe.shared_expert_ffn_hidden_size or 0
    return {
        **found, "router": 2.0 * moe.num_experts * m.hidden_size, "moe": 2.0 * slots * 3 * m.hidden_size * expert_width(config),
        "shared_experts": 2.0 * (3 * m.hidden_size * shared + m.hidden_size * moe.shared_expert_gate * bool(shared)),
    }  # fmt: skip


def hardware_flops_per_token(config: Config) -> float:
    """Operations that are done for a token: forward and backward, recomputation, empty slots, padded vocabulary, logits made again."""
    p, t, m = config.parallel, config.train, config.model
    total = 0.0
    for layers, again in zip(pieces(config), recomputed_layers(config), strict=True):
        for number, layer in enumerate(layers):
            modules = module_flops_per_token(config, layer)
            total += (1 + BACKWARD_OVER_FORWARD) * sum(modules.values())
            if number < again:
                total += sum(modules.values())
            elif p.recompute == "selective":
                named = {*p.recompute_modules, *(("router", "shared_experts") if "moe" in p.recompute_modules else ())}
                total += sum(flops for name, flops in modules.items() if name in named)
    makes_logits_again = t.precision == "fp32" or not t.keep_logits
    return total + (1 + BACKWARD_OVER_FORWARD + makes_logits_again) * 2.0 * m.padded_vocab_size * m.hidden_size


def report_flops_per_token(config: Config) -> int:
    """Forward and backward under the report's convention, 6 N_active + 12 L A S."""
    return 6 * count_parameters(config).active + 12 * config.model.num_layers * attention_width(config) * config.data.seq_length


def formula_text(config: Config) -> str:
    """The formula with this model's numbers, one line, to be written beside every MFU."""
    m = config.model
    return (f"FLOPs/token = 3 * (2 * N_matmul + 2 * L * A * S) = {train_flops_per_token(config):.4g}, with N_matmul = {matmul_parameters(config):.4g} "
            f"(active, without embedding look-up), L = {m.num_layers}, A = {attention_width(config)}, S = {config.data.seq_length}; "
            f"causal attention, recomputation not counted")
