"""What waits for what in one step of a pipeline, as a list of events in an order in which each one's conditions come before it; without any times.

`plan.simulation` runs such a program with the costs of a model. Between warm-up and end a pipeline repeats a round: one micro-batch, or with "interleaved" one
group of them through all chunks. A program holds that round once, so a step of thousands of micro-batches needs no longer program than one of a few per stage.

A round is a set of slots. The slot of an event is its number k of passes after the warm-up of its stage, with "interleaved" k - stage. No event waits for
one of a later slot, nor for one further back than the slot before its own: with w of `plan.pipeline`, forward number k + w of a stage is forward k - 1 after
the warm-up of the stage before ("interleaved": k - 2), and backward k is backward k of the stage after; on the ring from last to first stage they are
k + p - 2 and k - p. Both sides of a blocking exchange are in one slot. So events sorted by slot stay in a possible order, and every round waits for the same
places of itself and of the round before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_skywork.plan.pipeline import KINDS, Exchange, Message, Op, blocking_calls, order, warm_up


class Step(NamedTuple):
    """One event: what a stage waits for, then what it does.

    Args:
        stage: from 0.
        op: the work; None for an exchange that is followed by another one.
        cost: index into the seconds of (F, B, W) x pieces, with a last one that is 0.
        waits: pairs of how many steps back, and the piece whose `send_seconds` a message takes. Sends overlapped: the step that sent what is needed.
            Blocking: the step after which the other side comes to the exchange, in which then the message travels.
        lane: the link, and direction, on which the result leaves, or -1.
        sent: the piece whose `send_seconds` it takes there.
    """

    stage: int
    op: Op | None
    cost: int
    waits: tuple[tuple[int, int], ...]
    lane: int
    sent: int


@dataclass(frozen=True)
class Program:
    """A step as warm-up, rounds and end; steps are counted from 1, and 0 is the start of time.

    Args:
        first: before the rounds; the whole step if there are fewer micro-batches than would make a round.
        round: the steady state, once.
        last: after the rounds.
        num_rounds: how often.
        round_micro_batches: finished by one round.
    """

    first: list[Step]
    round: list[Step]
    last: list[Step]
    num_rounds: int
    round_micro_batches: int


def program(schedule: str, stages: int, chunks: int, micro_batches: int, is_overlapped: bool) -> Program:
    """The program of a step; arguments have passed `plan.pipeline.check`."""
    in_round = stages if schedule == "interleaved" else 1
    # The fewest that hold a round: with "zero-bubble" the last stage must have W in it, with "interleaved" stage 0 must have k >= 0.
    shown = 3 * stages if schedule == "interleaved" else 2 * stages + 1
    if micro_batches <= shown:
        return Program(_compile(schedule, stages, chunks, micro_batches, is_overlapped)[0], [], [], 0, in_round)
    steps, slots = _compile(schedule, stages, chunks, shown, is_overlapped)
    end = _end_of_rounds(schedule, stages, chunks, shown)
    first, last = (sum(slot < limit for slot in slots) for limit in (end - in_round * chunks, end))
    return Program(steps[:first], steps[first:last], steps[last:], 1 + (micro_batches - shown) // in_round, in_round)


def _shear(schedule: str) -> int:
    return 1 if schedule == "interleaved" else 0


def _end_of_rounds(schedule: str, stages: int, chunks: int, micro_batches: int) -> int:
    """The first slot that is not as those before on every stage: with its last forward a stage receives no further input."""
    warm = [warm_up(schedule, stages, chunks, micro_batches, stage) for stage in range(stages)]
    return min(micro_batches * chunks - warm[stage] - 1 - _shear(schedule) * stage for stage in range(stages))


@lru_cache(maxsize=64)
def _compile(schedule: str, stages: int, chunks: int, micro_batches: int, is_overlapped: bool) -> tuple[list[Step], list[int]]:
    """The whole step sorted by slot, and the slots. Independent of costs: a search that tries many on one schedule pays once."""
    build = _overlapped if is_overlapped else _blocking
    events = build(schedule, stages, chunks, micro_batches)
    passes = {"F": [-1 - warm_up(schedule, stages, chunks, 3 * stages, stage) for stage in range(stages)], "B": [-1] * stages}
    now, slots = [0] * stages, []
    for event in events:
        if event.op is not None and event.op.kind != "W":
            passes[event.op.kind][event.stage] += 1
            now[event.stage] = passes[event.op.kind][event.stage]
        slots.append(now[event.stage] - _shear(schedule) * event.stage)
    end = _end_of_rounds(schedule, stages, chunks, micro_batches)

    def place_in_time(number: int) -> tuple[int, int, int]:
        """By slot. In slots of rounds forwards, then backwards from the last stage on, then W, so that all are alike; in others as they were found."""
        event, slot = events[number], slots[number]
        if 0 <= slot < end and event.op is not None:
            return slot, KINDS.index(event.op.kind), -event.stage
        return slot, number, 0

    sequence = sorted(range(len(events)), key=place_in_time)
    places = [0] * (len(events) + 1)
    for place, number in enumerate(sequence, 1):
        places[number + 1] = place
    return [_relative(events[number], places, place) for place, number in enumerate(sequence, 1)], [slots[number] for number in sequence]


def _relative(event: Step, places: list[int], place: int) -> Step:
    """With conditions counted back from the event's own place in the sorted order."""
    return event._replace(waits=tuple((place - places[number], piece) for number, piece in event.waits))


class _Stages:
    """Lets every stage go on with its calls as far as it can, and remembers which waits for what."""

    def __init__(self, calls: Sequence[Sequence[Op | Exchange]]):
        self._calls, self._places = calls, [0] * len(calls)
        self._ready = list(range(len(calls)))
        self._waiting: dict[tuple[Message, int], int] = {}

    def __iter__(self) -> Iterator[tuple[int, Op | Exchange]]:
        """A stage and the call it has come to, until all are done; one that waits comes back with the same call."""
        while self._ready:
            stage = self._ready[-1]
            if self._places[stage] == len(self._calls[stage]):
                self._ready.pop()
                continue
            self._places[stage] += 1
            yield stage, self._calls[stage][self._places[stage] - 1]

    def wait(self, key: tuple[Message, int]) -> None:
        """The stage that came last goes on when `key` came, with the same call."""
        stage = self._ready.pop()
        self._places[stage] -= 1
        self._waiting[key] = stage

    def came(self, key: tuple[Message, int]) -> None:
        if key in self._waiting:
            # Below the one that is running now.
            self._ready.insert(len(self._ready) - 1, self._waiting.pop(key))


def _overlapped(schedule: str, stages: int, chunks: int, micro_batches: int) -> list[Step]:
    """Events of a step in which messages travel beside the work."""
    pieces, steps, made = stages * chunks, list[Step](), dict[Message, int]()
    line = _Stages([order(schedule, stages, chunks, micro_batches, stage) for stage in range(stages)])
    for stage, call in line:
        assert isinstance(call, Op)
        piece = call.chunk * stages + stage
        back, end = (1, pieces - 1) if call.kind == "F" else (-1, 0)
        needed = Message(call.kind, call.micro_batch, piece - back)
        is_fed = call.kind != "W" and 0 <= needed.piece < pieces
        if is_fed and needed not in made:
            line.wait((needed, stage))
            continue
        # Gradients back from a piece take as long as activations to it.
        waits = ((made.pop(needed), piece - (call.kind == "F")),) if is_fed else ()
        sends = call.kind != "W" and piece != end
        lane, sent = (stage + stages * (call.kind == "B"), piece - (call.kind == "B")) if sends else (-1, 0)
        steps.append(Step(stage, call, KINDS.index(call.kind) * pieces + piece, waits, lane, sent))
        if sends:
            output = Message(call.kind, call.micro_batch, piece)
            made[output] = len(steps)
            line.came((output, (stage + back) % stages))
    return steps


def _blocking(schedule: str, stages: int, chunks: int, micro_batches: int) -> list[Step]:
    """Events of a step in which messages travel in blocking exchanges. An exchange is the beginning of the work that follows it, or an event without work."""
    pieces, steps, came = stages * chunks, list[Step](), dict[tuple[Message, int], int]()
    line = _Stages([blocking_calls(schedule, stages, chunks, micro_batches, stage) for stage in range(stages)])
    before, waits = [0] * stages, list[tuple[tuple[int, int], ...]]([()] * stages)

    def add(stage: int, op: Op | None, cost: int) -> None:
        steps.append(Step(stage, op, cost, waits[stage], -1, 0))
        before[stage], waits[stage] = len(steps), ()

    for stage, call in line:
        if isinstance(call, Op):
            add(stage, call, KINDS.index(call.kind) * pieces + call.chunk * stages + stage)
            continue
        if waits[stage]:
            add(stage, None, 3 * pieces)
        for message in call:
            came[message, stage] = before[stage]
            line.came((message, stage))
        others = [(message, _other_side(message, stage, stages)) for message in call]
        absent = next((other for other in others if other not in came), None)
        if absent is not None:
            line.wait(absent)
            continue
        waits[stage] = tuple((came[other], other[0].piece - (other[0].kind == "B")) for other in others)
    return steps


def _other_side(message: Message, stage: int, stages: int) -> int:
    """The stage with which `stage` shares a message."""
    sender = message.piece % stages
    return (sender + (1 if message.kind == "F" else -1)) % stages if sender == stage else sender
