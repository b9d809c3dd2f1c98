"""Bytes of one rank of every pipeline stage: what it holds all the time, and the most that a step adds.

Held, with N parameters of a rank (megatron-core's buffers, padded), d ranks that share their optimizer (data and context parallel; for experts expert data
parallel) and b bytes a number in the compute precision:

    weights    b N, routers 4 each            gradients   4 N, whole on every rank
    masters    4 N / d in bf16 and fp16, none for what is fp32 anyway            moments   8 N / d, or 4 N / d with optim.moments=bf16

A step is followed from one moment to the next in the order in which megatron-core runs forwards and backwards (`pipeline.order`). At each of them a stage
holds the activations of every micro-batch between its forward and its backward (`activations.py`), and with several stages the output it has sent on, T H b.
The moments looked at are the end of a forward, the loss's backward, the backward of every layer, with the layer recomputed where it is, and the embedding's
gradient. The optimizer's step adds nothing: it works in place, and what it uses beside that is made once and kept.

    loss       final norm T (H b + 4), hidden states G H b, logits G V b of a rank where they are kept, 24 G of statistics; in its
               backward the weight's gradient V H b (made or stood in for), fp32 gradient of hidden states 4 G H, and blocks of logits (`output_loss.py`)
    temporary  the rest of that moment: gradients, and what is computed again
    made once  rotary tables, S D fp32 for the angles and twice that for cosines and sines; the buffer for gathered tokens, G H b; two pieces of fp32 moments
               where they are kept in bf16; what libraries take (`Device`)

What torch's allocator takes from the device above that is `fragmentation`: FRAGMENTATION of activations, loss and temporary. What a CUDA context and NCCL take
outside that allocator is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.activations import GPU, Device, Tokens, added_gradient, given_rows, layer_activations, layer_parts, plan_bytes, tokens_of
from megatron_skywork.plan.communication import COMPUTE_BYTES, FP32, INT64, buffer_numbers, padded
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.parameters import held_parameters
from megatron_skywork.plan.pipeline import order
from megatron_skywork.plan.stages import batch, pieces, recomputed_layers, stage_chunks

# Reserved over allocated bytes of a step at its peak, mean of the 18 cases of docs/measurements/h200_memory.json (0.03 to 0.23).
FRAGMENTATION = 0.09
# The loss works on blocks of this multiple of vocabulary entries (`model.output_loss`).
COLUMN_MULTIPLE = 64
# Tokens, labels and positions in int64 and the mask in fp32.
BATCH_BYTES = 3 * INT64 + FP32

# Beside what torch allocates, a GPU holds a CUDA context and NCCL's buffers, which are not counted here. They were not measured: this is a choice.
RESERVE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of one stage at the moment of a step at which it holds most.

    Args:
        weights, gradients, masters, moments: held all the time.
        activations: of all micro-batches between forward and backward.
        loss: what the loss keeps and needs; 0 where another moment is the peak.
        temporary: what only that moment needs: gradients, and a layer computed again.
        made_once: what the first step makes and later ones use again: rotary tables, the buffer that tensor parallelism gathers into, scratch space,
            libraries' memory.
        communication: what the pipeline's schedule still holds of tensors that it has sent or received.
        fragmentation: allowance for what the allocator cannot use.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    loss: int
    temporary: int
    made_once: int
    communication: int
    fragmentation: int

    @property
    def held(self) -> int:
        """Between steps: weights, gradients and the optimizer."""
        return self.weights + self.gradients + self.masters + self.moments

    @property
    def step(self) -> int:
        """What a step adds to what is there before it, from the second one on."""
        return self.activations + self.loss + self.temporary + self.communication

    @property
    def allocated(self) -> int:
        """All but the allowance: what torch's allocator calls its peak."""
        return self.held + self.made_once + self.step

    @property
    def total(self) -> int:
        return self.allocated + self.fragmentation


@dataclass(frozen=True)
class _Moment:
    """Of one micro-batch in one piece: bytes of activations, of the loss and beside them."""

    activations: int
    loss: int
    temporary: int

    @property
    def total(self) -> int:
        return self.activations + self.loss + self.temporary


def stage_memory(config: Config, world_size: int, *, worst_case: bool = False, device: Device = GPU) -> list[StageMemory]:
    """What one rank of each pipeline stage allocates at its peak.

    Args:
        config: checked for this world size.
        worst_case: dropless routing in which a rank gets what no router can exceed, instead of a balanced one.
        device: what runs it.
    """
    micro_batches = batch(config, world_size).micro_batches
    stages = []
    for stage in range(config.parallel.pp):
        moment = max(_step(config, stage, micro_batches, worst_case, device), key=lambda moment: moment.total)
        communication = _passed_on(config, stage)
        slack = round(FRAGMENTATION * (moment.total + communication))
        held = _held(config, world_size, stage)
        stages.append(StageMemory(*held, moment.activations, moment.loss, moment.temporary, _made_once(config, stage, device), communication, slack))
    return stages


def room_bytes(cluster: Cluster, reserve_bytes: float = RESERVE_BYTES) -> float:
    """What a run may allocate on one GPU."""
    return cluster.gpu.memory_bytes - reserve_bytes


@lru_cache(maxsize=4096)
def _states(pp: int, vpp: int, micro_batches: int, stage: int) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
    """At the ends of forwards and the starts of backwards: which of the two, of which chunk, and micro-batches held of each chunk.

    Of the moments of a kind and chunk only those are told at which no other one holds as many of every chunk.
    """
    counts = [0] * vpp
    found: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    # The steady state has come after three rounds.
    for op in order("1f1b" if vpp == 1 else "interleaved", pp, vpp, min(micro_batches, 3 * pp), stage):
        counts[op.chunk] += op.kind == "F"
        found.setdefault((op.kind, op.chunk), set()).add(tuple(counts))
        counts[op.chunk] -= op.kind == "B"

    def is_fullest(state: tuple[int, ...], others: set[tuple[int, ...]]) -> bool:
        return not any(state != other and all(count <= more for count, more in zip(state, other, strict=True)) for other in others)

    return tuple((kind, chunk, state) for (kind, chunk), states in found.items() for state in sorted(states) if is_fullest(state, states))


def _step(config: Config, stage: int, micro_batches: int, worst_case: bool, device: Device) -> Iterator[_Moment]:
    held = _stage_pieces(config, stage, worst_case, device)
    waiting = 0 if device.is_gpu else micro_batches * tokens_of(config).group * BATCH_BYTES
    plans = _plans_of_recomputed_layers(config, stage)
    for kind, chunk, counts in _states(config.parallel.pp, config.parallel.vpp, micro_batches, stage):
        others = [count - (number == chunk) for number, count in enumerate(counts)]
        activations = sum(count * piece.kept.activations for count, piece in zip(others, held, strict=True))
        for moment in [held[chunk].kept] if kind == "F" else held[chunk].backward:
            yield _Moment(plans + activations + moment.activations, moment.loss, moment.temporary + waiting)


def _plans_of_recomputed_layers(config: Config, stage: int) -> int:
    """Every dispatcher holds where its last micro-batch's rows lie, also where the layer or its experts keep nothing of them."""
    p, sparse = config.parallel, set(config.moe_layers)
    recomputes_experts = p.recompute == "selective" and "moe" in p.recompute_modules
    again = recomputed_layers(config)[stage :: p.pp]
    layers = [layer for chunk, number in zip(stage_chunks(config)[stage], again, strict=True) for layer in (chunk if recomputes_experts else chunk[:number])]
    return sum(plan_bytes(config, given_rows(config)) for layer in layers if layer in sparse)


# ------------------------------------------------------------------------------------------------------------------- of one micro-batch


@dataclass(frozen=True)
class _Piece:
    """One micro-batch in one piece of the model: what it keeps from forward to backward, and the moments of its backward."""

    kept: _Moment
    backward: list[_Moment]


def _stage_pieces(config: Config, stage: int, worst_case: bool, device: Device) -> list[_Piece]:
    p = config.parallel
    return [_piece(config, number, worst_case, device) for number in range(stage, p.pp * p.vpp, p.pp)]


def _piece(config: Config, number: int, worst_case: bool, device: Device) -> _Piece:
    p, tokens, row = config.parallel, tokens_of(config), _row(config)
    layers, again = pieces(config)[number], recomputed_layers(config)[number]
    is_first, is_last = number == 0, number == p.pp * p.vpp - 1
    kept = [sum(layer_activations(config, layer, index < again, device=device, worst_case=worst_case).values()) for index, layer in enumerate(layers)]
    before = list(accumulate(kept, initial=tokens.group * BATCH_BYTES * (is_first or is_last) * device.is_gpu))
    output = 0 if is_last else tokens.rank * row
    loss_kept, loss_backward = _loss(config, tokens, device) if is_last else (0, 0)
    end = _Moment(before[-1] + output, loss_kept, 0)
    moments = [end] if not is_last else [_Moment(end.activations, loss_kept + loss_backward, 0)]
    # Where the embedding is the output layer too, autograd adds its two gradients: the first waits for the second.
    waiting = _vocabulary(config) * row * (config.model.tie_embeddings and is_first and is_last)
    for index, layer in enumerate(layers):
        attention, feed_forward = layer_parts(config, layer, device=device, worst_case=worst_case)
        first_half = attention.whole if index < again else sum(attention.kept.values())
        # A layer computed again gives its output again.
        peak = max(first_half + feed_forward.peak, attention.peak) + tokens.rank * row * (index < again) - kept[index]
        # The gradient that came from the next stage is held until the whole piece is through.
        received = output * (index < len(layers) - 1)
        moments.append(_Moment(before[index + 1] + output, 0, peak + waiting + received))
    if is_first:
        # Zeros for every entry of the vocabulary, into which the gradients of those that occurred are added.
        added = added_gradient(config, device, _vocabulary(config) * config.model.hidden_size)
        moments.append(_Moment(before[0] + output, 0, max(added + tokens.rank * row, _vocabulary(config) * row + tokens.group * row) + waiting))
    return _Piece(end, moments)


def _loss(config: Config, tokens: Tokens, device: Device) -> tuple[int, int]:
    """What final norm, output layer and loss keep, and what their backward needs beside that."""
    t, number, row, entries = config.train, COMPUTE_BYTES[config.train.precision], _row(config), _vocabulary(config)
    keeps = t.keep_logits and number < FP32
    # Of the norm's output the output layer keeps what it multiplies: with sequence parallelism the whole sequence's.
    kept = tokens.rank * (row + FP32) + tokens.group * (row + 4 * FP32 + INT64)
    columns = min(entries, max(1, device.loss_block_bytes // (FP32 * tokens.group * COLUMN_MULTIPLE)) * COLUMN_MULTIPLE)
    block = tokens.group * columns
    # A block's gradient, which is one kernel, or else comes from the block's logits in fp32 and their exponents.
    gradient = number if device.is_gpu and config.model.compile else FP32 + FP32 * (number < FP32)
    # The gradient of the block before it waits to be replaced.
    blocks = block * (gradient + number * (not keeps) + number * (columns < entries))
    logits = tokens.group * entries * number * keeps
    weight = added_gradient(config, device, entries * config.model.hidden_size)
    return kept + logits, max(entries * row + tokens.group * config.model.hidden_size * FP32 + blocks, weight - logits)


def _row(config: Config) -> int:
    """Bytes of one token's hidden state."""
    return config.model.hidden_size * COMPUTE_BYTES[config.train.precision]


def _vocabulary(config: Config) -> int:
    """Entries of a rank."""
    return config.model.padded_vocab_size // config.parallel.tp


# ------------------------------------------------------------------------------------------------------------------- held all the time


def _held(config: Config, world_size: int, stage: int) -> tuple[int, int, int, int]:
    """Weights, gradients, masters and moments."""
    p, size = config.parallel, COMPUTE_BYTES[config.train.precision]
    ranks, expert_ranks = world_size // (p.tp * p.pp), world_size // (p.etp * p.ep * p.pp)
    chunks = held_parameters(config)[stage]
    dense = [buffer_numbers(chunk, ranks, is_fp32=size == FP32) for chunk in chunks]
    half, fp32 = (sum(column) for column in zip(*dense, strict=True))
    experts = sum(padded(chunk.experts, expert_ranks) for chunk in chunks)
    weights = half * size + fp32 * FP32 + experts * size
    masters = (half // ranks + experts // expert_ranks) * FP32 * (size < FP32)
    moments = 2 * ((half + fp32) // ranks + experts // expert_ranks) * COMPUTE_BYTES[config.optim.moments]
    return weights, (half + fp32 + experts) * FP32, masters, moments


def _made_once(config: Config, stage: int, device: Device) -> int:
    """What the first step makes and later ones use again."""
    m, number = config.model, COMPUTE_BYTES[config.train.precision]
    # Angles, and their cosines and sines: in fp32 where a GPU's kernel reads them.
    tables = config.data.seq_length * m.resolved_head_dim * (FP32 + 2 * (FP32 if device.is_gpu else number))
    # Experts have an optimizer of their own.
    optimizers = 1 + any(chunk.experts > 0 for chunk in held_parameters(config)[stage])
    scratch = 2 * device.optimizer_numbers * FP32 * (config.optim.moments == "bf16") * optimizers
    gathered = tokens_of(config).group * _row(config) * (config.parallel.tp > 1)
    return tables + scratch + gathered + device.library_bytes


def _passed_on(config: Config, stage: int) -> int:
    """Variables of megatron-core's schedules hold the gradient sent last until the next is there, interleaved ones two more tensors; so measured."""
    p = config.parallel
    tensors = 3 if p.vpp > 1 else int(stage > 0)
    return tensors * tokens_of(config).rank * _row(config)
