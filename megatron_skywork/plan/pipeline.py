"""In which order each pipeline stage runs forwards and backwards, and between which of them it talks to its neighbours.

With p stages, v chunks per stage and M micro-batches, stage s (from 0) starts with w forwards, then alternates one forward and one backward, and ends with
w backwards (Narayanan et al., arXiv 2104.04473, section 2.2):

    1f1b          w = p - s - 1. megatron-core's `forward_backward_pipelining_without_interleaving`.
    interleaved   w = 2 (p - s - 1) + (v - 1) p, counted in passes through one chunk. Passes go through chunk 0 with p micro-batches, then through chunk 1
                  with the same ones and so on; backwards take the chunks from the last. `forward_backward_pipelining_with_interleaving` with its default
                  group size, p micro-batches; it needs M to be a multiple of p.
    zero-bubble   ZB-H1 of Qi et al., arXiv 2401.10241, section 2.2: backward is cut in B (gradients of inputs, which the stage before waits for) and W
                  (gradients of weights, which nobody waits for). As 1f1b, and W of a micro-batch runs s backwards later than its B, so that every stage holds
                  the activations of at most p micro-batches. A what-if of the planner: the trainer runs the other two, megatron-core has no such schedule.

`tests/distributed/test_pipeline_order.py` holds the first two against what megatron-core does on real ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from megatron_skywork.errors import ConfigError

SCHEDULES = ("1f1b", "interleaved", "zero-bubble")
Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")


class Op(NamedTuple):
    """One piece of work of a stage: forward (F), backward (B; with "zero-bubble" without the weights' part) or the weights' part of backward (W)."""

    kind: Kind
    micro_batch: int
    chunk: int


class Message(NamedTuple):
    """What one stage hands to another: the activations (F) or the gradient (B) that `piece` of the model made of a micro-batch."""

    kind: Kind
    micro_batch: int
    piece: int


Exchange = tuple[Message, ...]
"""Messages a stage sends and receives in one call, which comes back when the last of them is done."""


def check(schedule: str, stages: int, chunks: int, micro_batches: int) -> None:
    """Refuse what cannot be run.

    Raises:
        ConfigError: an unknown schedule, a number below 1, chunks where the schedule has none, or micro-batches that do not go round the stages.
    """
    problems = [f"{name}={value}: must be 1 or more"
                for name, value in (("stages", stages), ("chunks", chunks), ("micro_batches", micro_batches)) if value < 1]  # fmt: skip
    if schedule not in SCHEDULES:
        problems.append(f"schedule={schedule!r}: use {', '.join(SCHEDULES)}")
    elif schedule != "interleaved" and chunks > 1:
        problems.append(f"schedule={schedule!r} takes one chunk per stage, and there are {chunks}; use schedule=interleaved, or parallel.vpp=1")
    elif schedule == "interleaved" and (stages < 2 or chunks < 2):
        problems.append(f"schedule='interleaved' takes 2 or more stages of 2 or more chunks, and there are {stages} of {chunks}; use schedule=1f1b")
    elif schedule == "interleaved" and not problems and micro_batches % stages:
        near = sorted({max(1, micro_batches // stages) * stages, -(-micro_batches // stages) * stages})
        problems.append(f"schedule='interleaved' sends micro-batches round in groups of parallel.pp={stages}, and {micro_batches} is not a multiple of it; "
                        f"use {' or '.join(map(str, near))} micro-batches (train.global_batch_size), or parallel.vpp=1")  # fmt: skip
    if problems:
        raise ConfigError(problems)


def warm_up(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> int:
    """Forwards a stage runs before it alternates: w of the module's docstring, or all there are."""
    after = stages - stage - 1
    return min(2 * after + (chunks - 1) * stages if schedule == "interleaved" else after, micro_batches * chunks)


def order(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> list[Op]:
    """The work of one stage in the order it is run.

    Args:
        schedule: "1f1b", "interleaved" or "zero-bubble".
        chunks: per stage; more than one with "interleaved" only.
        stage: from 0.

    Raises:
        ConfigError: as `check`.
    """
    check(schedule, stages, chunks, micro_batches)
    forwards, backwards = _passes(stages, chunks, micro_batches)
    warm = warm_up(schedule, stages, chunks, micro_batches, stage)
    lag = stage if schedule == "zero-bubble" else None
    ops = forwards[:warm]
    for index, backward in enumerate(backwards):
        ops += forwards[warm + index : warm + index + 1]
        ops.append(backward)
        if lag is not None and index >= lag:
            ops.append(Op("W", index - lag, 0))
    if lag is not None:
        ops += [Op("W", index, 0) for index in range(max(0, micro_batches - lag), micro_batches)]
    return ops


def _passes(stages: int, chunks: int, micro_batches: int) -> tuple[list[Op], list[Op]]:
    """Forwards and backwards in their order, the same on every stage: groups of `stages` micro-batches through one chunk after the other."""
    forwards = [Op("F", index, chunk) for first in range(0, micro_batches, stages)
                for chunk in range(chunks) for index in range(first, min(first + stages, micro_batches))]  # fmt: skip
    return forwards, [Op("B", index, chunks - 1 - chunk) for _, index, chunk in forwards]


def blocking_calls(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> list[Op | Exchange]:
    """The work of a stage and, between it, the blocking exchanges of megatron-core where `overlap_p2p_comm` is off, in the order of execution.

    Every message stands in two exchanges, its sender's and its receiver's. Not for "zero-bubble", which megatron-core does not have.
    """
    check(schedule, stages, chunks, micro_batches)
    calls = _interleaved_calls(stages, chunks, micro_batches, stage) if schedule == "interleaved" else _1f1b_calls(stages, micro_batches, stage)
    return [call for call in calls if call]


def _1f1b_calls(stages: int, micro_batches: int, stage: int) -> Iterator[Op | Exchange]:
    """`forward_backward_pipelining_without_interleaving`: recv_forward, send_forward, send_forward_recv_backward and so on; () where there is no neighbour."""
    is_first, is_last = stage == 0, stage == stages - 1

    def inputs(index: int) -> Exchange:
        return () if is_first else (Message("F", index, stage - 1),)

    def outputs(index: int) -> Exchange:
        return () if is_last else (Message("F", index, stage),)

    def gradients_in(index: int) -> Exchange:
        return () if is_last else (Message("B", index, stage + 1),)

    def gradients_out(index: int) -> Exchange:
        return () if is_first else (Message("B", index, stage),)

    warm = warm_up("1f1b", stages, 1, micro_batches, stage)
    for index in range(warm):
        yield inputs(index)
        yield Op("F", index, 0)
        yield outputs(index)
    if warm < micro_batches:
        yield inputs(warm)
    for index in range(micro_batches - warm):
        yield Op("F", index + warm, 0)
        yield outputs(index + warm) + gradients_in(index)
        yield Op("B", index, 0)
        yield gradients_out(index) + (inputs(index + warm + 1) if index + warm + 1 < micro_batches else ())
    for index in range(micro_batches - warm, micro_batches):
        yield gradients_in(index)
        yield Op("B", index, 0)
        yield gradients_out(index)


def _interleaved_calls(stages: int, chunks: int, micro_batches: int, stage: int) -> Iterator[Op | Exchange]:
    """`forward_backward_pipelining_with_interleaving`: after each pass (in the middle: pair of passes) one exchange with both neighbours.

    The first and the last stage form a ring: what the last stage made in its pass k - (p - 1) the first takes in the exchange after its pass k
    (`recv_tensor_from_previous_stage`), and so for gradients the other way round.
    """
    forwards, backwards = _passes(stages, chunks, micro_batches)
    total, behind = len(forwards), stages - 1
    warm = warm_up("interleaved", stages, chunks, micro_batches, stage)
    last_piece = stages * chunks - 1

    def sent(op: Op) -> Exchange:
        piece = op.chunk * stages + stage
        return () if piece == (last_piece if op.kind == "F" else 0) else (Message(op.kind, op.micro_batch, piece),)

    def received(passes: list[Op], done: int) -> Exchange:
        """What comes in after pass number `done`."""
        kind = passes[0].kind
        source, ring_end, end = (stage - 1, 0, chunks - 1) if kind == "F" else (stage + 1, stages - 1, 0)
        if stage != ring_end:
            coming = passes[done + 1] if done + 1 < total else None
            return () if coming is None else (Message(kind, coming.micro_batch, coming.chunk * stages + source),)
        if done < behind or passes[done - behind].chunk == end:
            return ()
        made = passes[done - behind]
        return (Message(kind, made.micro_batch, made.chunk * stages + source % stages),)

    def first_gradients() -> Exchange:
        return () if stage == stages - 1 else (Message("B", backwards[0].micro_batch, backwards[0].chunk * stages + stage + 1),)

    if stage > 0:
        yield (Message("F", forwards[0].micro_batch, stage - 1),)
    for index, forward in enumerate(forwards[:warm]):
        yield forward
        yield sent(forward) + received(forwards, index) + (first_gradients() if index == warm - 1 and warm < total else ())
    for index in range(total - warm):
        yield forwards[warm + index]
        yield backwards[index]
        arriving = received(forwards, warm + index) if warm + index + 1 < total else ()
        yield sent(forwards[warm + index]) + sent(backwards[index]) + arriving + received(backwards, index)
    if warm == total:
        yield first_gradients()
    for index in range(total - warm, total):
        yield backwards[index]
        yield sent(backwards[index]) + (received(backwards, index) if index + 1 < total else ())


@lru_cache(maxsize=4096)
def held(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> tuple[tuple[int, ...], ...]:
    """How many micro-batches' activations a stage holds of each of its chunks when it holds most.

    A micro-batch is held from the start of its forward to the end of its backward, with "zero-bubble" of its weights' part.

    Returns:
        numbers by chunk at the moments that may be the fullest: which of them means the most bytes depends on the chunks.
    """
    # The steady state repeats after `stages` micro-batches at most, and 3 * stages hold the warm-up and such a round; the end only gives back.
    ops = order(schedule, stages, chunks, min(micro_batches, 3 * stages), stage)
    numbers, found = [0] * chunks, set[tuple[int, ...]]()
    release = "W" if schedule == "zero-bubble" else "B"
    for op, following in zip(ops, ops[1:], strict=False):
        if op.kind == "F":
            numbers[op.chunk] += 1
            if following.kind != "F":
                found.add(tuple(numbers))
        elif op.kind == release:
            numbers[op.chunk] -= 1
    return tuple(sorted(found))
