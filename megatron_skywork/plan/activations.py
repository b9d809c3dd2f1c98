"""Bytes that a layer's forward leaves for its backward, module by module, and what its backward needs beside them.

Of one micro-batch on one rank, with b bytes a number in the compute precision, B S / cp = G tokens of a tensor-parallel group, T = G / tp of them on a rank
(sequence parallelism), A = heads * head_dim and Q = groups * head_dim numbers of a rank (over tp), F the inner width on a rank, E experts, K top-k, and
R = rows that a rank's experts are given (balanced: T K etp):

    norms              each its input and its output, T H b, and 1 / rms, 4 T; the input is the residual stream, which nobody else keeps
    qkv                G (A + 2 Q) b in one piece: values are attended to where the projection wrote them
    rotary positions   G (A + Q) b, the rotated queries and keys; with query-key norms their 1 / rms too, and queries by themselves where groups share keys
    core attention     output G A b and log-sum-exp, 4 G heads; the projection behind it keeps that output
    dense feed-forward fc1's output 2 F and the activation F: 3 G F b. Where SwiGLU is not one kernel its two factors too: 5 G F b
    router             fp32 and integer numbers a token: normalized logits (4 E + 4), what is chosen (12 K, or with pre_softmax 4 E + 8 K), the map (E),
                       the gate that the auxiliary loss sees (4 E), with a z-loss raw logits and their log-sum (4 E + 4)
    permutation        8 E a token, 8 bytes twice for every assignment, 8 (T + T K / 64); rows R H b and their weights 4 R; where rows of several ranks are
                       sorted again, 16 R
    experts            fc1's output 2 R F b; the activation is always computed again
    shared expert      like the dense one, over all tokens of the group; its gate T (H + 1) b
    dropout            hidden_dropout's mask behind either half, a byte a number (on a CPU b)

Recomputing a whole layer leaves its input. Recomputing modules leaves out: `core_attn` the log-sum-exp, `layernorm` everything of the norms but their inputs,
`mlp` the dense feed-forward, `moe` router, permutation, experts and shared expert, `router` and `shared_experts` their own, `moe_act` nothing more.

What a device makes otherwise is a `Device`. Fields of the `megatron:` section are not looked at, and attention dropout on a CPU, which has no kernel for
it, is not counted. These are the `torch`
backend's tensors; a model of Transformer Engine's modules is counted by the same formulas, without having been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.communication import COMPUTE_BYTES, FP32, INT64, routed_rows
from megatron_skywork.plan.parameters import expert_width

# Rows not in use that `moe.permutation` sums in one bag (its UNUSED_PER_BAG, which needs torch to be looked at).
ROWS_PER_BAG = 64


@dataclass(frozen=True)
class Device:
    """What memory depends on beside the configuration.

    Args:
        is_gpu: whether functions become single kernels, where `model.compile` asks for it, and whether micro-batches wait in another memory.
        loss_block_bytes: fp32 logits of one block of the loss (`model.output_loss.BLOCK_BYTES`).
        optimizer_numbers: numbers of a piece of bf16 moments (`optim.adamw.PIECE_NUMEL`).
        swiglu_numbers: numbers of fc1's output that SwiGLU takes at once where it is not one kernel (`moe.swiglu.BLOCK_NUMBERS`); None: all.
        library_bytes: what libraries ask of torch's allocator for as long as the process lives.
    """

    is_gpu: bool
    loss_block_bytes: int
    optimizer_numbers: int
    swiglu_numbers: int | None
    library_bytes: int


# cuBLAS takes 32 MiB for itself on a Hopper and as much for its light-weight sister; docs/measurements/h200_memory.json has both in its first case.
GPU = Device(True, 256 * 2**20, 2**22, None, 64 * 2**20)
CPU = Device(False, 8 * 2**20, 2**19, 2**19, 0)


@dataclass(frozen=True)
class Part:
    """Half a layer: attention or feed-forward, each with its norm.

    Args:
        kept: bytes from forward to backward by module, as modules are recomputed.
        whole: bytes of all modules, whether they are recomputed or not.
        peak: most bytes while its backward runs: what it kept, what was computed again, gradients and the incoming gradient.
    """

    kept: dict[str, int]
    whole: int
    peak: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of one micro-batch: `group` of a tensor-parallel group, `rank` of each of its ranks."""

    group: int
    rank: int


def tokens_of(config: Config) -> Tokens:
    """Of one micro-batch; context-parallel ranks hold parts of it."""
    group = config.train.micro_batch_size * config.data.seq_length // config.parallel.cp
    return Tokens(group, group // config.parallel.tp)


def layer_activations(config: Config, layer: int, recomputed: bool, *, device: Device = GPU, worst_case: bool = False) -> dict[str, int]:
    """Bytes one rank keeps of one layer from the forward of one micro-batch to its backward, by module.

    Args:
        layer: from 0.
        recomputed: as a whole.
        device: what runs it.
        worst_case: a router that sends this rank as much as any can, instead of a balanced one.
    """
    if recomputed:
        return {"layer input": tokens_of(config).rank * config.model.hidden_size * COMPUTE_BYTES[config.train.precision]}
    attention, feed_forward = layer_parts(config, layer, device=device, worst_case=worst_case)
    return {**attention.kept, **feed_forward.kept}


def layer_parts(config: Config, layer: int, *, device: Device = GPU, worst_case: bool = False) -> tuple[Part, Part]:
    """Attention and feed-forward of one layer that is not recomputed as a whole."""
    if layer in set(config.moe_layers):
        return _attention(config, device), _experts(config, device, worst_case)
    return _attention(config, device), _dense(config, device)


def _recomputes(config: Config, module: str) -> bool:
    return config.parallel.recompute == "selective" and module in config.parallel.recompute_modules


def _fuses(config: Config, device: Device) -> bool:
    """Whether an elementwise function is one kernel."""
    return device.is_gpu and (config.model.compile or config.model.backend == "te")


def added_gradient(config: Config, device: Device, numbers: int) -> int:
    """Bytes of a matrix's gradient while it is added to its fp32 buffer by autograd: a CPU widens it first. A GPU's kernels read both types."""
    number = COMPUTE_BYTES[config.train.precision]
    return numbers * (number + FP32 * (number < FP32 and not device.is_gpu))


def _part(config: Config, device: Device, name: str, whole: dict[str, int], dropped: dict[str, int], backward: list[int]) -> Part:
    """A part behind the norm `name`, with its norm.

    Args:
        whole: bytes by module.
        dropped: what recomputation of modules leaves out of them.
        backward: at some moments of its backward, bytes beside the norm's and the incoming gradient.
    """
    row, tokens = config.model.hidden_size * COMPUTE_BYTES[config.train.precision], tokens_of(config).rank
    mask = tokens * (config.model.hidden_size if device.is_gpu else row)
    everything = {name: tokens * (2 * row + FP32), **whole, **({f"dropout behind {name}": mask} if config.model.hidden_dropout else {})}
    if _recomputes(config, "layernorm"):
        dropped = {name: tokens * (row + FP32), **dropped}
    kept = {module: count - dropped.get(module, 0) for module, count in everything.items()}
    beside = sum(count for module, count in everything.items() if module not in whole)
    return Part(kept, sum(everything.values()), beside + max(backward) + tokens * row)


def _attention(config: Config, device: Device) -> Part:
    m, tp, number, tokens = config.model, config.parallel.tp, COMPUTE_BYTES[config.train.precision], tokens_of(config)
    heads, groups = m.num_attention_heads // tp, max(1, m.resolved_query_groups // tp)
    queries, keys = tokens.group * heads * m.resolved_head_dim, tokens.group * groups * m.resolved_head_dim
    log_sums = tokens.group * heads * FP32
    rotary = (queries + keys) * number
    if m.qk_norm:
        # Queries of one group lie together in qkv; of several they have to be copied before they are seen as heads.
        rotary += tokens.group * (heads + groups) * FP32 + queries * number * (heads > groups > 1)
    whole = {"qkv": (queries + 2 * keys) * number, "rotary positions": rotary, "core attention": queries * number + log_sums}
    # Gradients of the output and of queries, keys and values; a GPU's kernel sums those of queries in fp32.
    gradients = (2 * queries + 2 * keys) * number + queries * FP32 * device.is_gpu
    dropped = {"core attention": log_sums} if _recomputes(config, "core_attn") else {}
    gradients += queries * number * len(dropped)  # the output comes again too
    added = added_gradient(config, device, m.hidden_size * (queries + 2 * keys) // tokens.group)
    return _part(config, device, "input norm", whole, dropped, [sum(whole.values()) + gradients, added])


def _swiglu(config: Config, device: Device, width: int) -> tuple[int, int]:
    """A dense feed-forward of inner width `width` over all ranks: what it keeps, and the most that there is while its backward runs."""
    m, tp, number, tokens = config.model, config.parallel.tp, COMPUTE_BYTES[config.train.precision], tokens_of(config)
    inner, weight = tokens.group * width // tp * number, m.hidden_size * width // tp
    hidden = tokens.group * m.hidden_size * number
    kept = inner * (3 if _fuses(config, device) else 5)
    # Backward of fc2; then of the activation, when fc2's input is gone; then of fc1, when only its input is left. Weights' gradients are made or stood in for.
    second = inner + max(weight * number + hidden * (tp > 1), added_gradient(config, device, weight) - inner)
    return kept, max(kept + second, kept + 2 * inner, 2 * inner + hidden + 2 * weight * number, hidden + added_gradient(config, device, 2 * weight))


def _dense(config: Config, device: Device) -> Part:
    kept, backward = _swiglu(config, device, config.model.ffn_hidden_size)
    whole, is_again = {"feed-forward": kept}, _recomputes(config, "mlp")
    output = tokens_of(config).rank * config.model.hidden_size * COMPUTE_BYTES[config.train.precision] * is_again
    return _part(config, device, "feed-forward norm", whole, whole if is_again else {}, [backward + output])


def _experts(config: Config, device: Device, worst_case: bool) -> Part:
    m, p, moe, number, tokens = config.model, config.parallel, config.moe, COMPUTE_BYTES[config.train.precision], tokens_of(config)
    assert moe is not None
    rows, width = given_rows(config, worst_case), expert_width(config) // p.etp
    local, row = moe.num_experts // p.ep, m.hidden_size * number
    whole = {
        "router": tokens.rank * _router_bytes(config),
        "permutation": plan_bytes(config, rows) + rows * (row + FP32),
        "experts": rows * 2 * width * number,
    }
    backward = []
    if moe.shared_expert_ffn_hidden_size:
        # Its forward came first, so its backward comes when the experts' is over.
        kept, shared_backward = _swiglu(config, device, moe.shared_expert_ffn_hidden_size)
        whole["shared expert"] = kept + tokens.rank * (row + number) * moe.shared_expert_gate
        output = tokens.rank * row * (_recomputes(config, "shared_experts") or _recomputes(config, "moe"))
        backward.append(shared_backward + tokens.rank * (row + number) * moe.shared_expert_gate + output)
    names = {"router": "router", "shared_experts": "shared expert"}
    dropped = {module: whole[module] for asked, module in names.items() if _recomputes(config, asked) and module in whole}
    # What is recomputed by itself is not there yet when the experts' backward runs.
    is_again = _recomputes(config, "moe")
    there = sum(count for module, count in whole.items() if module not in dropped or is_again) + tokens.rank * row * is_again
    matrix = local * m.hidden_size * width
    # The gradients of rows, the activation and its gradient, fc1's, and those of both matrices, made or stood in for.
    products = rows * (2 * row + 4 * width * number + FP32) + 3 * matrix * number
    activation = rows * (row + 4 * width * number) + _activation_temporaries(config, device, rows, width)
    gathered = rows * (row + m.hidden_size * FP32) * (p.etp > 1)
    backward.append(there + max(products, activation, gathered))
    # When the experts' backward is over and their gradients are added, what it read is gone.
    backward.append(there - rows * 2 * width * number + matrix * number + added_gradient(config, device, 2 * matrix))
    return _part(config, device, "feed-forward norm", whole, whole if is_again else dropped, backward)


def _activation_temporaries(config: Config, device: Device, rows: int, width: int) -> int:
    """fp32 numbers that SwiGLU's backward goes through where it is not one kernel: eight of its width, and its input and gradient where they are not fp32."""
    if _fuses(config, device):
        return 0
    at_once = rows if device.swiglu_numbers is None else min(rows, max(1, device.swiglu_numbers // (2 * width)))
    return at_once * width * FP32 * (8 if config.train.precision == "fp32" else 11)


def _router_bytes(config: Config) -> int:
    """Of one token."""
    moe = config.moe
    assert moe is not None
    experts, pre_softmax = moe.num_experts, moe.pre_softmax or moe.topk == 1
    normalized = (experts + 1) * FP32 * moe.gate_norm
    chosen = moe.topk * INT64 + (experts if pre_softmax else moe.topk) * FP32
    gate = experts * FP32 * (moe.aux_loss != "none")
    z_loss = (experts + 1) * FP32 * (moe.z_loss_coefficient > 0)
    return normalized + chosen + gate + z_loss


def given_rows(config: Config, worst_case: bool = False) -> int:
    """R: rows that one rank's experts are given in one micro-batch and layer, expert tensor parallelism's gathering included."""
    p, moe, tokens = config.parallel, config.moe, tokens_of(config).rank
    assert moe is not None
    rows = routed_rows(config, tokens)
    if moe.dispatcher == "alltoall" and p.ep * p.etp == 1 and not moe.pad_to_capacity:
        return tokens * moe.topk  # dropped assignments have rows too: nobody waits for their number
    return round(p.etp * (rows.into if worst_case else rows.balanced))


def plan_bytes(config: Config, rows: int) -> int:
    """What says where every assignment of one layer lies; a dispatcher holds that of its last micro-batch."""
    p, moe, tokens = config.parallel, config.moe, tokens_of(config).rank
    assert moe is not None
    sent = round(routed_rows(config, tokens).balanced) if moe.pad_to_capacity else tokens * moe.topk
    order = 2 * rows * INT64 * (p.ep * p.etp > 1 and moe.num_experts > p.ep)
    return tokens * moe.num_experts * (INT64 + 1) + (2 * sent + tokens + sent // ROWS_PER_BAG) * INT64 + order
