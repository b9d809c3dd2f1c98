"""Bytes that one rank sends in an optimizer step, by group and collective: what a layout costs the network, before anything runs.

Convention: ring algorithms. Of a buffer of s bytes (the whole one: the input of a reduce-scatter, the output of an all-gather) a rank of n sends

    all-gather, reduce-scatter   (n - 1) / n s          all-reduce   2 (n - 1) / n s          all-to-all   what goes to the other ranks
    send                         s

With B x S tokens in a micro-batch, M micro-batches a step, H hidden, b bytes of a number in the compute precision, A = B S / cp H b the activations of a
tensor-parallel group, T = B S / (tp cp) the tokens of a rank, E experts, K top-k, R = K T the assignments of a rank:

    tp         a pair of split matrices (attention, dense or shared feed-forward): forward all-gather and reduce-scatter of A; backward all-gather of A
               twice (input, for the weights' gradient, and output's gradient) and reduce-scatter of A. Embedding: reduce-scatter, in backward
               all-gather. Output layer: all-gather, in backward reduce-scatter. Loss: all-gather of every rank's 3 B S / cp fp32.
               Once a step: all-reduce of the fp32 gradients of what every rank holds whole (norms, routers).
    tp_cp      capacity over the micro-batch: all-gather of priorities [B S, E] fp32. Auxiliary loss: all-reduce of 2 E + 1 fp32, per sequence if so scoped.
    tp_dp_cp   router state, once a step: all-reduce of 2 E + 7 + losses float64 for each MoE layer of the stage.
    etp_ep     alltoall: all-gather of every rank's [E] int64 counts. allgather: all-gather of T H b, of T E fp32 and of T E bytes (the map), reduce-scatter
               of fp32 results; in backward each the other way, save the map.
    ep         alltoall: four times (dispatch, combine, and both back) the rows that go to other ranks, H b each; twice their fp32 probs.
               A balanced router sends R (ep - 1) / ep of its rows; a capacity limits R to the slots, padding makes it exactly the slots.
    etp        all-gather of the rows a rank received, H b + 4, and in backward reduce-scatter; results travel in fp32, as megatron-core does it.
    dp_cp      reduce-scatter of fp32 gradients, all-gather of parameters in the compute precision (routers: fp32), for all but the experts.
    expert_dp  the same for the experts.
    pp         A / tp for every micro-batch and piece of the model: forward from all but the last piece, backward from all but the first.
    embedding  tied embeddings on two stages: all-reduce of their fp32 gradients.

Every recomputed part repeats the collectives of its forward, losses excepted. Buffers of parameters are padded as megatron-core pads a whole buffer (a
multiple of n and 128 numbers); it also pads single parameters to 64 numbers, and with overlap every bucket, which is not counted. Left out as well: single
numbers (gradient norm, token count, loss scale: tens of bytes), logging (a few hundred bytes), context parallelism's keys and values, which
are Transformer Engine's, and fields passed through the `megatron:` section.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.parameters import HeldParameters, held_parameters
from megatron_skywork.plan.stages import batch, recomputed_layers, stage_chunks

COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32, INT64, FLOAT64, BOOL = 4, 8, 8, 1
# Sums in a router's window beside the 2 E per expert and one per loss: `moe.router.WINDOW_SUMS`, which needs torch to be looked at.
ROUTER_SUMS = 7
# megatron-core pads a buffer of parameters to a multiple of this many numbers and of the group's size.
BUFFER_MULTIPLE = 128


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank sends in one optimizer step in one kind of collective.

    Args:
        group: as in the module's docstring.
        operation: all_gather, reduce_scatter, all_reduce, all_to_all or send.
        what: in words.
        expected: exact where the router has no say, else for a balanced router.
        most: what no router can exceed.
        calls: collectives in a step.
    """

    group: str
    operation: str
    what: str
    expected: float
    most: float
    calls: int


def ring(operation: str, ranks: int, size: float) -> float:
    """Bytes a rank sends for one collective over a buffer of `size` bytes."""
    return {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}[operation] * (ranks - 1) / ranks * size


def stage_traffic(config: Config, world_size: int, stage: int) -> list[Traffic]:
    """What a rank of one pipeline stage (from 0) sends in a step; kinds that send nothing are left out.

    Args:
        config: checked for this world size.
    """
    cut = batch(config, world_size)
    found = [*_tensor(config, stage, cut.micro_batches), *_router(config, stage, cut.micro_batches, cut.data_parallel)]
    found += [*_experts(config, stage, cut.micro_batches), *_pipeline(config, stage, cut.micro_batches)]
    found += parameter_traffic(config, world_size, stage)
    return [traffic for traffic in found if traffic.most]


def busiest_stage(config: Config, world_size: int) -> tuple[int, list[Traffic]]:
    """The stage (from 0) whose ranks send most, and what."""
    stages = [stage_traffic(config, world_size, stage) for stage in range(config.parallel.pp)]
    totals = [sum(traffic.expected for traffic in sent) for sent in stages]
    return totals.index(max(totals)), stages[totals.index(max(totals))]


def _exact(group: str, operation: str, what: str, sent: float, calls: int) -> Traffic:
    return Traffic(group, operation, what, sent, sent, calls)


def _tokens(config: Config) -> int:
    """Of a micro-batch, on the ranks of one tensor-parallel group together."""
    return config.train.micro_batch_size * config.data.seq_length // config.parallel.cp


def forwards(config: Config, stage: int, modules: set[str]) -> list[tuple[int, int]]:
    """The stage's layers and how often the forward of the part of a layer that recomputation knows by one of the names `modules` runs in a step."""
    p, runs = config.parallel, []
    part = p.recompute == "selective" and bool(modules & set(p.recompute_modules))
    for layers, recomputed in zip(stage_chunks(config)[stage], recomputed_layers(config)[stage :: p.pp], strict=True):
        runs += [(layer, 1 + (part or number < recomputed)) for number, layer in enumerate(layers)]
    return runs


# ------------------------------------------------------------------------------------------------------------------------------ by group


def _tensor(config: Config, stage: int, micro_batches: int) -> Iterator[Traffic]:
    p, moe, sparse = config.parallel, config.moe, set(config.moe_layers)
    has_shared = moe is not None and moe.shared_expert_ffn_hidden_size is not None
    is_first, is_last = stage == 0, stage == p.pp - 1
    pairs = [runs for _, runs in forwards(config, stage, set())]
    pairs += [runs for layer, runs in forwards(config, stage, {"mlp"}) if layer not in sparse]
    pairs += [runs for layer, runs in forwards(config, stage, {"moe", "shared_experts"}) if layer in sparse and has_shared]
    gathers = sum(runs + 2 for runs in pairs) + is_first + is_last
    scatters = sum(runs + 1 for runs in pairs) + is_first + is_last
    tokens = _tokens(config)
    activations = tokens * config.model.hidden_size * COMPUTE_BYTES[config.train.precision]
    statistics = is_last * p.tp * 3 * tokens * FP32
    gathered = micro_batches * ring("all_gather", p.tp, gathers * activations + statistics)
    yield _exact("tp", "all_gather", "activations, loss", gathered, micro_batches * (gathers + is_last))
    yield _exact("tp", "reduce_scatter", "activations", micro_batches * scatters * ring("reduce_scatter", p.tp, activations), micro_batches * scatters)
    whole = sum(chunk.whole for chunk in held_parameters(config)[stage])
    yield _exact("tp", "all_reduce", "gradients of norms and routers", ring("all_reduce", p.tp, whole * FP32), 1)


def _router(config: Config, stage: int, micro_batches: int, data_parallel: int) -> Iterator[Traffic]:
    p, moe, sparse = config.parallel, config.moe, set(config.moe_layers)
    if moe is None:
        return
    runs = [count for layer, count in forwards(config, stage, {"moe", "router"}) if layer in sparse]
    ranks = p.tp * p.cp
    for buffer in router_buffers(config):
        calls = micro_batches * (sum(runs) if buffer.is_recomputed else len(runs))
        yield _exact("tp_cp", buffer.operation, buffer.what, calls * ring(buffer.operation, ranks, buffer.num_bytes), calls)
    scopes = _aux_scopes(config)
    if config.metrics.router or moe.adaptive.enabled or "global_batch" in scopes:
        window = 2 * moe.num_experts + ROUTER_SUMS + len(scopes)
        yield _exact("tp_dp_cp", "all_reduce", "router state", ring("all_reduce", ranks * data_parallel, len(runs) * window * FLOAT64), 1)


@dataclass(frozen=True)
class RouterBuffer:
    """What the ranks that share a sequence tell each other in one MoE layer's router; `is_recomputed`: again where the router's forward is."""

    operation: str
    what: str
    num_bytes: float
    is_recomputed: bool


def router_buffers(config: Config) -> Iterator[RouterBuffer]:
    """Of one MoE layer and micro-batch."""
    moe, t, capacity = config.moe, config.train, _capacity(config)
    assert moe is not None
    tokens, scopes = t.micro_batch_size * config.data.seq_length, _aux_scopes(config)
    if moe.capacity_scope == "micro_batch" and capacity is not None and capacity < tokens:
        yield RouterBuffer("all_gather", "priorities of tokens", tokens * moe.num_experts * FP32, True)
    if {"sequence", "micro_batch"} & set(scopes):
        sets = t.micro_batch_size if "sequence" in scopes else 1
        yield RouterBuffer("all_reduce", "sums of the auxiliary loss", sets * (2 * moe.num_experts + 1) * FP32, False)


def _aux_scopes(config: Config) -> list[str]:
    moe = config.moe
    return [] if moe is None or moe.aux_loss == "none" else [moe.aux_scope, *(extra.scope for extra in moe.extra_aux_losses)]


def _capacity(config: Config) -> int | None:
    """Slots of an expert, for one rank or one micro-batch as `moe.capacity_scope` says."""
    moe, p = config.moe, config.parallel
    if moe is None or moe.capacity_factor is None:
        return None
    tokens = config.train.micro_batch_size * config.data.seq_length // (p.tp * p.cp if moe.capacity_scope == "rank" else 1)
    return math.ceil(tokens * moe.topk / moe.num_experts * moe.capacity_factor)


def _experts(config: Config, stage: int, micro_batches: int) -> Iterator[Traffic]:
    p, moe, sparse = config.parallel, config.moe, set(config.moe_layers)
    if moe is None:
        return
    runs = [count for layer, count in forwards(config, stage, {"moe"}) if layer in sparse]
    forward, backward = micro_batches * sum(runs), micro_batches * len(runs)
    tokens, ranks, experts = _tokens(config) // p.tp, p.etp * p.ep, moe.num_experts
    row = config.model.hidden_size * COMPUTE_BYTES[config.train.precision]
    row_fp32 = config.model.hidden_size * FP32
    if moe.dispatcher == "allgather":
        gathered = forward * (row + experts * (FP32 + BOOL)) + backward * row_fp32
        scattered = forward * row_fp32 + backward * (row + experts * FP32)
        yield _exact("etp_ep", "all_gather", "tokens, probs and map; gradients of results", (ranks - 1) * tokens * gathered, 3 * forward + backward)
        yield _exact("etp_ep", "reduce_scatter", "results; gradients of tokens", (ranks - 1) * tokens * scattered, forward + 2 * backward)
        return
    if not moe.pad_to_capacity:
        yield _exact("etp_ep", "all_gather", "tokens of every expert", forward * (ranks - 1) * experts * INT64, forward)
    rows = routed_rows(config, tokens)

    def exchanged(out: float, into: float) -> float:
        # Rows leave by dispatch and by combine's way back; what came in leaves by combine and by dispatch's way back.
        return forward * (out * (row + FP32) + into * row) + backward * (out * row + into * (row + FP32))

    leaving = rows.balanced * (p.ep - 1) / p.ep
    yield Traffic("ep", "all_to_all", "tokens and probs", exchanged(leaving, leaving), exchanged(rows.out, rows.into_from_others), 3 * (forward + backward))
    gathered, scattered = forward * (row + FP32) + backward * row_fp32, forward * row_fp32 + backward * (row + FP32)
    received, most = (p.etp - 1) * rows.balanced, (p.etp - 1) * rows.into
    yield Traffic("etp", "all_gather", "rows and probs; gradients of results", received * gathered, most * gathered, 2 * forward + backward)
    yield Traffic("etp", "reduce_scatter", "results; gradients of rows", received * scattered, most * scattered, forward + 2 * backward)


@dataclass(frozen=True)
class Rows:
    """Assignments of one rank in one MoE layer and micro-batch: kept by a balanced router, and the most that leave, come in, and come from other ranks."""

    balanced: float
    out: float
    into: float
    into_from_others: float


def routed_rows(config: Config, tokens: int) -> Rows:
    """Of a rank with `tokens` tokens, for one MoE layer and micro-batch."""
    moe, p = config.moe, config.parallel
    assert moe is not None
    routed, capacity = tokens * moe.topk, _capacity(config)
    here = moe.num_experts // p.ep
    elsewhere = moe.num_experts - here
    if moe.pad_to_capacity and capacity is not None:
        return Rows(moe.num_experts * capacity, elsewhere * capacity, p.ep * here * capacity, (p.ep - 1) * here * capacity)
    out, from_one = tokens * min(moe.topk, elsewhere), tokens * min(moe.topk, here)
    if capacity is None:
        return Rows(routed, out, p.ep * from_one, (p.ep - 1) * from_one)
    by_rank = moe.capacity_scope == "rank" or p.tp * p.cp == 1
    slots = moe.num_experts * capacity / (1 if by_rank else p.tp * p.cp)
    # The slots of an expert are there once for every rank, or once for every micro-batch that meets in the group.
    times = p.ep if by_rank else min(p.ep, -(-p.ep * p.etp // (p.tp * p.cp)) + (p.ep * p.etp % (p.tp * p.cp) > 0))
    limit = here * min(capacity, tokens * (1 if by_rank else p.tp * p.cp))
    return Rows(
        min(routed, slots), min(out, elsewhere * min(capacity, tokens)), min(p.ep * from_one, times * limit),
        min((p.ep - 1) * from_one, (times - by_rank) * limit),
    )  # fmt: skip


def _pipeline(config: Config, stage: int, micro_batches: int) -> Iterator[Traffic]:
    p, is_first, is_last = config.parallel, stage == 0, stage == config.parallel.pp - 1
    if p.pp == 1:
        return
    activations = _tokens(config) // p.tp * config.model.hidden_size * COMPUTE_BYTES[config.train.precision]
    sends = 2 * p.vpp - is_first - is_last
    yield _exact("pp", "send", "activations and their gradients", micro_batches * sends * activations, micro_batches * sends)
    if config.model.tie_embeddings and (is_first or is_last):
        size = sum(chunk.shared_embedding for chunk in held_parameters(config)[stage]) * FP32
        yield _exact("embedding", "all_reduce", "gradients of tied embeddings", ring("all_reduce", 2, size), 1)


def parameter_traffic(config: Config, world_size: int, stage: int) -> Iterator[Traffic]:
    """What a rank of a stage sends once a step for its gradients and parameters."""
    p = config.parallel
    ranks, expert_ranks = world_size // (p.tp * p.pp), world_size // (p.etp * p.ep * p.pp)
    size = COMPUTE_BYTES[config.train.precision]
    chunks = held_parameters(config)[stage]
    dense = [buffer_numbers(chunk, ranks, is_fp32=size == FP32) for chunk in chunks]
    half, fp32 = (sum(column) for column in zip(*dense, strict=True))
    experts = sum(padded(chunk.experts, expert_ranks) for chunk in chunks)
    yield _exact("dp_cp", "reduce_scatter", "gradients", ring("reduce_scatter", ranks, (half + fp32) * FP32), len(chunks))
    yield _exact("dp_cp", "all_gather", "parameters", ring("all_gather", ranks, half * size + fp32 * FP32), len(chunks))
    yield _exact("expert_dp", "reduce_scatter", "gradients of experts", ring("reduce_scatter", expert_ranks, experts * FP32), len(chunks))
    yield _exact("expert_dp", "all_gather", "parameters of experts", ring("all_gather", expert_ranks, experts * size), len(chunks))


def buffer_numbers(chunk: HeldParameters, ranks: int, *, is_fp32: bool) -> tuple[int, int]:
    """Numbers in the compute precision and in fp32 that a chunk's buffers for all but experts hold, padded; a shared embedding has a bucket of its own."""
    shared, rest = padded(chunk.shared_embedding, ranks), chunk.dense - chunk.shared_embedding
    if is_fp32:
        return 0, shared + padded(rest + chunk.routers, ranks)
    return shared + padded(rest, ranks), padded(chunk.routers, ranks)


def padded(count: int, ranks: int) -> int:
    multiple = math.lcm(ranks, BUFFER_MULTIPLE)
    return -(-count // multiple) * multiple
