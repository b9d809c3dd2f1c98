"""The clock of a pipeline: when each stage does what in one step, how long it stands idle and how much it holds, from what each piece of the model costs.

A discrete-event simulation in which every event is computed once, in an order that respects what it waits for. A piece of work starts when its stage is
done with the one before it (`plan.pipeline.order`) and its input is there. Inputs travel in one of two ways:

    overlap_sends=True    megatron-core's `overlap_p2p_comm`, which it has for "interleaved" alone; for "1f1b" a what-if, and "zero-bubble" is always taken
                          so, as its authors built it. A message leaves when it is made, after those that go the same way on the same link, and takes
                          `send_seconds`; its sender works on.
    overlap_sends=False   megatron-core's calls as they are (`plan.pipeline.blocking_calls`). An exchange is a rendezvous: a message starts when its sender and
                          its receiver have both come to the call in which it stands (NCCL's send and gloo's wait for the receiver), the call
                          comes back when all its messages are through, and nobody works meanwhile. The two directions do not slow each other down.

Left out: the optimizer, gradient reduction, and what the first and last micro-batch cost more than others.

All of it is made of maxima and sums, so the times of one round of the steady state (`plan.pipeline_program`) are a function f of those of the round before,
with f(t + d) = f(t) + d (Baccelli et al., Synchronization and Linearity, 1992, chapter 3). Once a round is one of the last p rounds moved by a single d, so
are all later ones, and `simulate` skips them. f brings no two states further apart, so an error of rounding in d adds up and does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.pipeline import Op, check, held, order
from megatron_skywork.plan.pipeline_program import Program, Step, program

# Rounds all of whose times differ by one shift, up to this share of the time so far, count as the same.
STEADY = 1e-13


@dataclass(frozen=True)
class PieceCost:
    """What one of the pp * vpp pieces of the model costs for one micro-batch, on one GPU.

    Args:
        forward_seconds: its layers, and embedding or loss where it has them.
        backward_seconds: all of it, recomputation included.
        weight_seconds: the part of `backward_seconds` that only gradients of weights need, which "zero-bubble" puts off.
        send_seconds: its activations on their way to the next piece; gradients on their way back take as long.
        kept_bytes: held from the start of its forward to the end of its backward ("zero-bubble": of the weights' part).
    """

    forward_seconds: float
    backward_seconds: float
    weight_seconds: float = 0.0
    send_seconds: float = 0.0
    kept_bytes: float = 0.0


class Event(NamedTuple):
    """A piece of work and when it ran, in seconds from the start of the step."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class StageTimeline:
    """One stage's step.

    Args:
        busy_seconds: at work; the same whatever the schedule.
        idle_seconds: the rest of the step, time in blocking exchanges included.
        peak_bytes: most that its micro-batches hold at once.
        events: in order; empty unless they were asked for.
    """

    busy_seconds: float
    idle_seconds: float
    peak_bytes: float
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Timeline:
    """A step of the whole pipeline.

    Args:
        seconds: from the first start to the last end of any work.
        stages: in order.
    """

    seconds: float
    stages: tuple[StageTimeline, ...]

    @property
    def bubble(self) -> float:
        """Idle share of all stages' time: 1 - mean busy / seconds. With equal stages and free sends (p - 1) / (M + p - 1) for 1f1b."""
        return sum(stage.idle_seconds for stage in self.stages) / (len(self.stages) * self.seconds)

    @property
    def overhead(self) -> float:
        """Idle time over busy time of the busiest stage, the one that would set the pace of an endless pipeline: the textbook's (p - 1) / M for 1f1b."""
        return self.seconds / max(stage.busy_seconds for stage in self.stages) - 1


def simulate(
    pieces: Sequence[PieceCost], *, stages: int, micro_batches: int, schedule: str = "1f1b", overlap_sends: bool = False, keep_events: bool = False
) -> Timeline:
    """Run one step.

    Args:
        pieces: in model order; piece i is on stage i % stages.
        schedule: "1f1b", "interleaved" (more than one piece per stage) or "zero-bubble".
        overlap_sends: as in the module's docstring.
        keep_events: every event of every stage; without them a long steady state costs nothing.

    Raises:
        ConfigError: pieces that do not go round the stages, a time below zero, or what `plan.pipeline.check` refuses.
    """
    chunks = _checked_chunks(pieces, stages, micro_batches, schedule)
    is_overlapped = overlap_sends or schedule == "zero-bubble"
    steps = program(schedule, stages, chunks, micro_batches, is_overlapped)
    clock = _Clock(stages, _costs(pieces, schedule), [piece.send_seconds for piece in pieces], is_overlapped)
    clock.run(steps.first)
    done, skipped, remaining = 0, 0.0, steps.num_rounds
    while remaining:
        clock.run(steps.round)
        done, remaining = done + 1, remaining - 1
        found = clock.recurrence(len(steps.round), min(stages, done - 1)) if remaining and not skipped and not keep_events else None
        if found is not None:
            rounds, shift = found
            skipped, remaining = remaining // rounds * shift, remaining % rounds
    clock.run(steps.last)
    events = _events(steps, clock, stages) if keep_events else [()] * stages
    return _timeline(pieces, stages, chunks, micro_batches, schedule, max(clock.ends) + skipped, events)


def lower_bound(pieces: Sequence[PieceCost], *, stages: int, micro_batches: int, schedule: str = "1f1b") -> float:
    """Seconds below which no step of this schedule can be, whether sends are overlapped or not; costs microseconds, for a search to discard by.

    Let stage s do c = sum of its forwards and backwards per micro-batch, piece s be its first and piece q its last. Nothing on s can start before a
    micro-batch came through pieces 0 .. s - 1, `head`; after the last gradient s makes, which is piece s's, that goes back through them, `tail`. So

        seconds >= head + M c + tail.

    The first backward on s starts only when the first micro-batch went through the whole model and back to piece q, `trip`, and by then s has run no more
    than the first w + 1 forwards of its order. All the rest is still to be done:

        seconds >= trip + M c - (first w + 1 forwards) + tail.

    With "zero-bubble" backward in head, tail and trip is without the weights' part, which may run while the tail does: there tail counts only as far
    as it is longer than all of the stage's weights' parts together.
    """
    chunks = _checked_chunks(pieces, stages, micro_batches, schedule)
    costs, total = _costs(pieces, schedule), len(pieces)
    forward, backward, weight = (costs[kind * total : (kind + 1) * total] for kind in range(3))
    sends = [piece.send_seconds for piece in pieces]
    through = sum(forward) + sum(sends[:-1])
    bounds = []
    head = tail = 0.0
    for stage in range(stages):
        last = total - stages + stage
        own = range(stage, total, stages)
        work = micro_batches * sum(forward[piece] + backward[piece] + weight[piece] for piece in own)
        after = max(0.0, tail - micro_batches * weight[stage])
        trip = through + sum(backward[last + 1 :]) + sum(sends[last:-1])
        early = sum(number * forward[piece] for number, piece in zip(_early(schedule, stages, chunks, micro_batches, stage), own, strict=True))
        bounds += [head + work + after, trip + work - early + after]
        head += forward[stage] + sends[stage]
        tail += backward[stage] + sends[stage]
    return max(bounds)


def memory_over_time(timeline: Timeline, pieces: Sequence[PieceCost]) -> list[list[tuple[float, float]]]:
    """For each stage (seconds, bytes held from then on) wherever it changes; of a timeline that kept its events."""
    stages = len(timeline.stages)
    result = []
    for number, stage in enumerate(timeline.stages):
        release = "W" if any(event.op.kind == "W" for event in stage.events) else "B"
        # What is given back at a moment goes before what is taken at the same moment, as on the device.
        changes = sorted(
            [(event.end, 0, -pieces[event.op.chunk * stages + number].kept_bytes) for event in stage.events if event.op.kind == release]
            + [(event.start, 1, pieces[event.op.chunk * stages + number].kept_bytes) for event in stage.events if event.op.kind == "F"]
        )
        line, level = [(0.0, 0.0)], 0.0
        for moment, _, change in changes:
            level += change
            line.append((moment, level))
        result.append(line)
    return result


# -------------------------------------------------------------------------------------------------------------------------------- the clock


class _Clock:
    """Runs steps one after the other.

    Attributes:
        starts, ends: of every step so far; entry 0 is the start of time.
        arrivals: when what a step sent is there, where sends are overlapped.
    """

    def __init__(self, stages: int, costs: list[float], sends: list[float], is_overlapped: bool):
        self.starts, self.ends, self.arrivals = [0.0], [0.0], [0.0]
        self._free, self._lanes = [0.0] * stages, [0.0] * (2 * stages)
        self._costs, self._sends = costs, sends
        self.run = self._run_overlapped if is_overlapped else self._run_blocking

    def _run_overlapped(self, steps: Sequence[Step]) -> None:
        starts, ends, arrivals, free, lanes, costs, sends = self.starts, self.ends, self.arrivals, self._free, self._lanes, self._costs, self._sends
        number = len(ends)
        for stage, _, cost, waits, lane, sent in steps:
            start = free[stage]
            for back, _ in waits:
                if arrivals[number - back] > start:
                    start = arrivals[number - back]
            end = free[stage] = start + costs[cost]
            starts.append(start)
            ends.append(end)
            if lane >= 0:
                leaves = lanes[lane] if lanes[lane] > end else end
                end = lanes[lane] = leaves + sends[sent]
            arrivals.append(end)
            number += 1

    def _run_blocking(self, steps: Sequence[Step]) -> None:
        starts, ends, free, costs, sends = self.starts, self.ends, self._free, self._costs, self._sends
        number = len(ends)
        for stage, _, cost, waits, _, _ in steps:
            start = comes = free[stage]
            for back, piece in waits:
                other = ends[number - back]
                done = (other if other > comes else comes) + sends[piece]
                if done > start:
                    start = done
            end = free[stage] = start + costs[cost]
            starts.append(start)
            ends.append(end)
            number += 1

    def recurrence(self, length: int, most: int) -> tuple[int, float] | None:
        """How many rounds of `length` steps ago everything was as in the last one but for one shift, and that shift."""
        lists = [self.ends, self.arrivals] if len(self.arrivals) > 1 else [self.ends]
        allowed, ends = STEADY * self.ends[-1], self.ends
        for period in range(1, most + 1):
            back = period * length
            shift = ends[-1] - ends[-1 - back]
            if abs(ends[-length] - ends[-length - back] - shift) <= allowed and all(
                abs(now - before - shift) <= allowed
                for times in lists for now, before in zip(times[-length:], times[-length - back : len(times) - back], strict=True)
            ):  # fmt: skip
                return period, shift
        return None


# ------------------------------------------------------------------------------------------------------------------------------------ results


def _events(steps: Program, clock: _Clock, stages: int) -> list[tuple[Event, ...]]:
    """What every stage did, in order."""
    found: list[list[Event]] = [[] for _ in range(stages)]
    parts = [(steps.first, 0), *((steps.round, number) for number in range(steps.num_rounds)), (steps.last, steps.num_rounds - 1)]
    times = zip(clock.starts[1:], clock.ends[1:], strict=True)
    for part, number in parts:
        later = number * steps.round_micro_batches
        for step in part:
            start, end = next(times)
            if step.op is not None:
                found[step.stage].append(Event(step.op._replace(micro_batch=step.op.micro_batch + later), start, end))
    return [tuple(events) for events in found]


def _timeline(
    pieces: Sequence[PieceCost], stages: int, chunks: int, micro_batches: int, schedule: str, seconds: float, events: Sequence[tuple[Event, ...]]
) -> Timeline:
    lines = []
    for stage in range(stages):
        own = pieces[stage::stages]
        busy = micro_batches * sum(piece.forward_seconds + piece.backward_seconds for piece in own)
        peak = max(sum(number * piece.kept_bytes for number, piece in zip(numbers, own, strict=True))
                   for numbers in held(schedule, stages, chunks, micro_batches, stage))  # fmt: skip
        lines.append(StageTimeline(busy, max(0.0, seconds - busy), peak, events[stage]))
    return Timeline(seconds, tuple(lines))


def _costs(pieces: Sequence[PieceCost], schedule: str) -> list[float]:
    """Seconds of F, B and W of every piece, one after the other, and of nothing."""
    weights = [piece.weight_seconds if schedule == "zero-bubble" else 0.0 for piece in pieces]
    backwards = [piece.backward_seconds - weight for piece, weight in zip(pieces, weights, strict=True)]
    return [*(piece.forward_seconds for piece in pieces), *backwards, *weights, 0.0]


def _checked_chunks(pieces: Sequence[PieceCost], stages: int, micro_batches: int, schedule: str) -> int:
    """Pieces per stage."""
    if stages < 1 or not pieces or len(pieces) % stages:
        raise ConfigError(f"{len(pieces)} pieces do not go round {stages} stages; give parallel.pp * parallel.vpp pieces")
    for index, piece in enumerate(pieces):
        if not (piece.forward_seconds > 0 and piece.backward_seconds >= piece.weight_seconds >= 0 and piece.send_seconds >= 0 and piece.kept_bytes >= 0):
            raise ConfigError(f"piece {index}: {piece}: forward must take time, the weights' part be at most the whole backward, and nothing be below 0")
    check(schedule, stages, len(pieces) // stages, micro_batches)
    return len(pieces) // stages


@lru_cache(maxsize=4096)
def _early(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> tuple[int, ...]:
    """How many forwards through each of its chunks a stage runs before its first backward."""
    numbers = [0] * chunks
    for op in order(schedule, stages, chunks, min(micro_batches, 3 * stages), stage):
        if op.kind != "F":
            break
        numbers[op.chunk] += 1
    return tuple(numbers)
