"""What cutting a model into pipeline pieces costs, and what no cut that begins in a given way takes less than.

With f_s, b_s (c_s = f_s + b_s) a stage's forward and backward of one of M micro-batches, S stages, C = c_0 + ... + c_(S-1), t the time of a send, and u what
the exchanges of a stage between two of its backwards take at least (0 where sends are overlapped; else 2 t, of the first and the last stage t), no 1F1B step
takes less than

    A_s = c_0 + ... + c_s + (M - 1) c_s + 2 s t + (M - 1) u                            one comes to the stage, it works on all, the last gradient leaves
    B_s = C + c_(s+1) + ... + c_(S-1) + (M - S + s) (c_s + u) - t + 2 (2 S - 2 - s) t  the first and the last go to the end and back, if M > S - s
    D_s = C + (M - 1) b_s + max(0, M - S + s) f_s + 2 (S - 1) t                        the first only, and the stage has its warm-up behind it
    D_s with f_s and b_s exchanged                                                     the last only, and the rest of its backwards are done meanwhile

Each is the length of a path through operations that wait for each other, which every 1F1B step contains (`pipeline.order`; S - s forwards come before a
stage's first backward). Of any schedule a stage's work, behind the shortest way to it, is a bound (`simulation.lower_bound` says more of a whole cut):

    E_s = f_0 + ... + f_(s-1) + s t + M (all of stage s) + the way back, b_0 + ... + b_(s-1) + s t, unless the schedule puts weights' gradients off

A cut that is begun is bounded by these of its pieces, with the least sum of costs that the other layers can come to, and by M times their least bottleneck.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import NamedTuple

from megatron_skywork.plan.simulation import PieceCost

# Ways to go on with a cut that are kept apart.
MOST_WAYS = 16
# Numbers of recomputed layers of a stage's chunks that are all tried.
MOST_COMBINATIONS = 40
# Start and number of layers of each chunk of a stage.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Load:
    """Seconds that one layer, the embedding or the output layer with the loss takes for one micro-batch.

    Args:
        backward_seconds: without `recompute_seconds`, which is what it takes longer if the layer is recomputed as a whole.
        weight_seconds: the part of backward that only weights' gradients need.
    """

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    weight_seconds: float = 0.0
    recompute_seconds: float = 0.0


@dataclass(frozen=True)
class Pipeline:
    """A model that is to be cut, and what it is cut for.

    Args:
        layers: in model order.
        embedding, output: what the first and the last piece hold beside layers.
        stages, chunks: pipeline stages, and pieces on each; piece i stands on stage i mod S.
        micro_batches: of one step on one data-parallel rank.
        schedule, overlap_sends: as `simulation.simulate` takes them.
        send_seconds: of a micro-batch's activations from any piece to the next.
        memory: bytes of a rank of a stage that holds these ranges of layers and recomputes so many of each, the first ones. A longer range takes no less;
            and what fits with all layers recomputed fits the better, the more are.
        room_bytes: what a rank has.
        recompute: whether whole layers may be recomputed.
    """

    layers: tuple[Load, ...]
    embedding: Load
    output: Load
    stages: int
    chunks: int
    micro_batches: int
    schedule: str
    overlap_sends: bool
    send_seconds: float
    memory: Callable[[int, Ranges, tuple[int, ...]], float] = field(repr=False)
    room_bytes: float = math.inf
    recompute: bool = True

    @property
    def pieces(self) -> int:
        return self.stages * self.chunks


class _Cost(NamedTuple):
    """Seconds of a piece for one micro-batch."""

    forward: float
    backward: float


class _Way(NamedTuple):
    """What some stages in a row come to; `before` being the costs of the stages ahead of them and C that of all.

    Args:
        total: sum of their costs.
        come: A = before + come.
        twice: B = 2 C - before + twice.
        there: D = C + there.
    """

    total: float
    come: float
    twice: float
    there: float


class _Begun(NamedTuple):
    """The first stages of a cut.

    Args:
        total: sum of their costs.
        come: the largest A.
        twice: B = 2 C + twice, the largest.
        there: D = C + there, the largest.
    """

    total: float
    come: float
    twice: float
    there: float

    def and_then(self, stage: _Way) -> _Begun:
        come, twice = max(self.come, self.total + stage.come), max(self.twice, stage.twice - self.total)
        return _Begun(self.total + stage.total, come, twice, max(self.there, stage.there))

    def bound(self, rest: _Way) -> float:
        """Of the whole, if the other stages go this way."""
        everything = self.total + rest.total
        come, twice = max(self.come, self.total + rest.come), max(self.twice, rest.twice - self.total)
        return max(come, 2 * everything + twice, everything + max(self.there, rest.there))


class Bounds:
    """Costs and bounds of the cuts of one pipeline; what it finds it keeps.

    Args:
        most_piece_seconds: pieces that take longer for a micro-batch are left out.
    """

    def __init__(self, pipeline: Pipeline, most_piece_seconds: float = math.inf):
        self.pipeline, layers = pipeline, pipeline.layers
        self._most_piece_seconds, self._is_uniform = most_piece_seconds, len(set(layers)) == 1
        self._roomy: dict[tuple[int, int], int] = {}
        self._sums = {name: [0.0, *accumulate(getattr(layer, name) for layer in layers)] for name in Load.__dataclass_fields__}
        self._costs: dict[tuple[int, int, int], _Cost | None] = {}
        self._smallest: dict[tuple[int, Ranges], list[tuple[int, ...]]] = {}
        self._rests: dict[tuple[int, int], tuple[float, float]] = {}
        self._found_ways: dict[tuple[int, int], list[_Way]] = {}

    def _sum(self, name: str, start: int, end: int) -> float:
        return self._sums[name][end] - self._sums[name][start]

    def _ends(self, piece: int) -> list[Load]:
        p = self.pipeline
        return [p.embedding] * (piece == 0) + [p.output] * (piece == p.pieces - 1)

    # --------------------------------------------------------------------------------------------------------------- memory and recomputation

    def smallest(self, stage: int, ranges: Ranges) -> list[tuple[int, ...]]:
        """Recomputed layers of each of a stage's ranges under which it fits, without those that others are nowhere above; empty if it never does.

        Of more than MOST_COMBINATIONS only one is found.
        """
        if (stage, ranges) not in self._smallest:
            sizes = tuple(size for _, size in ranges)
            nothing = (0,) * len(sizes)
            if self._fits(stage, ranges, nothing):
                found = [nothing]
            elif not self.pipeline.recompute or not self._fits(stage, ranges, sizes):
                found = []
            elif math.prod(size + 1 for size in sizes) > MOST_COMBINATIONS or len(sizes) == 1:
                found = [self._filled_up(stage, ranges)]
            else:
                found = []
                for numbers in sorted(product(*(range(size + 1) for size in sizes)), key=sum):
                    covered = any(all(few <= many for few, many in zip(other, numbers, strict=True)) for other in found)
                    if not covered and self._fits(stage, ranges, numbers):
                        found.append(numbers)
            self._smallest[stage, ranges] = found
        return self._smallest[stage, ranges]

    def _fits(self, stage: int, ranges: Ranges, recomputed: tuple[int, ...]) -> bool:
        return self.pipeline.memory(stage, ranges, recomputed) <= self.pipeline.room_bytes

    def _filled_up(self, stage: int, ranges: Ranges) -> tuple[int, ...]:
        """The fewest recomputed layers that fit, taken from the first chunk on, of which most micro-batches are held."""
        sizes = [size for _, size in ranges]

        def spread(number: int) -> tuple[int, ...]:
            return tuple(max(0, min(size, number - sum(sizes[:chunk]))) for chunk, size in enumerate(sizes))

        too_few, enough = 0, sum(sizes)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if self._fits(stage, ranges, spread(middle)):
                enough = middle
            else:
                too_few = middle
        return spread(enough)

    def repeated_seconds(self, ranges: Ranges, recomputed: Sequence[int]) -> float:
        """What recomputation adds to one micro-batch of a stage."""
        return sum(self._sum("recompute_seconds", start, start + again) for (start, _), again in zip(ranges, recomputed, strict=True))

    def ranges(self, sizes: Sequence[int], stage: int) -> Ranges:
        """Of the chunks of a stage in a cut."""
        return tuple((sum(sizes[:piece]), sizes[piece]) for piece in range(stage, len(sizes), self.pipeline.stages))

    def recomputations(self, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Recomputed layers of each piece under which a cut fits: every combination of the stages' smallest numbers."""
        p = self.pipeline
        for of_stages in product(*(self.smallest(stage, self.ranges(sizes, stage)) for stage in range(p.stages))):
            yield tuple(of_stages[piece % p.stages][piece // p.stages] for piece in range(p.pieces))

    def cheapest_recomputation(self, sizes: Sequence[int]) -> tuple[int, ...] | None:
        """Of those the one in which every stage does least; None if the cut does not fit."""
        p, again = self.pipeline, [0] * self.pipeline.pieces
        for stage in range(p.stages):
            ranges = self.ranges(sizes, stage)
            found = self.smallest(stage, ranges)
            if not found:
                return None
            again[stage :: p.stages] = min(found, key=lambda numbers, of=ranges: (self.repeated_seconds(of, numbers), numbers))  # type: ignore[misc]
        return tuple(again)

    # ----------------------------------------------------------------------------------------------------------------------------- costs

    def piece_costs(self, sizes: Sequence[int], recomputed: Sequence[int]) -> list[PieceCost]:
        """Costs of the pieces of a cut, as they are simulated."""
        costs, start = [], 0
        for piece, (size, again) in enumerate(zip(sizes, recomputed, strict=True)):
            forward, backward, weight = (
                self._sum(name, start, start + size) + sum(getattr(load, name) for load in self._ends(piece))
                for name in ("forward_seconds", "backward_seconds", "weight_seconds")
            )
            repeated = self._sum("recompute_seconds", start, start + again)
            costs.append(PieceCost(forward, backward + repeated, weight, self.pipeline.send_seconds))
            start += size
        return costs

    def _cost(self, piece: int, start: int, size: int) -> _Cost | None:
        """Of a range of layers as this piece, with the fewest recomputed layers that fit where a stage has one piece, else with none.

        None: it does not fit, or takes longer than a piece may.
        """
        start = 0 if self._is_uniform else start
        if (piece, start, size) not in self._costs:
            self._costs[piece, start, size] = self._new_cost(piece, start, size)
        return self._costs[piece, start, size]

    def _new_cost(self, piece: int, start: int, size: int) -> _Cost | None:
        bare = self._bare(piece, start, size)
        if sum(bare) > self._most_piece_seconds:
            return None
        if self.pipeline.chunks > 1:
            return bare
        fitting = self._smallest_of_one(piece, start, size)
        if fitting is None:
            return None
        cost = _Cost(bare.forward, bare.backward + self._sum("recompute_seconds", start, start + fitting))
        return cost if sum(cost) <= self._most_piece_seconds else None

    def _bare(self, piece: int, start: int, size: int) -> _Cost:
        ends = self._ends(piece)
        forward = self._sum("forward_seconds", start, start + size) + sum(load.forward_seconds for load in ends)
        return _Cost(forward, self._sum("backward_seconds", start, start + size) + sum(load.backward_seconds for load in ends))

    def _smallest_of_one(self, piece: int, start: int, size: int) -> int | None:
        """`smallest` for one piece per stage. What a longer range does without, a shorter one does too, which saves most calls of `memory`."""
        if (piece, start) not in self._roomy:
            longest = size
            while start + longest < len(self.pipeline.layers) and sum(self._bare(piece, start, longest + 1)) <= self._most_piece_seconds:
                longest += 1
            self._roomy[piece, start] = longest if self._fits(piece, ((start, longest),), (0,)) else 0
        if size <= self._roomy[piece, start]:
            return 0
        found = self.smallest(piece, ((start, size),))
        return found[0][0] if found else None

    def _rest(self, piece: int, start: int) -> tuple[float, float]:
        """Least bottleneck and least sum of the costs of the pieces from this one on, which hold the layers from `start` on; infinite if none fit."""
        if (piece, start) not in self._rests:
            p, layers = self.pipeline, len(self.pipeline.layers)
            bottleneck = total = math.inf if piece < p.pieces or start < layers else 0.0
            for size in range(1, layers - start - (p.pieces - piece - 1) + 1) if piece < p.pieces else ():
                cost = self._cost(piece, start, size)
                # More layers take longer, and do not fit either.
                if cost is None or sum(cost) >= max(bottleneck, total):
                    break
                after = self._rest(piece + 1, start + size)
                bottleneck, total = min(bottleneck, max(sum(cost), after[0])), min(total, sum(cost) + after[1])
            self._rests[piece, start] = bottleneck, total
        return self._rests[piece, start]

    # ---------------------------------------------------------------------------------------------------------------------------- bounds

    def even_cut(self) -> tuple[int, ...] | None:
        """The cut that fits whose largest piece costs least; None if none fits. With one piece per stage."""
        p, start, sizes, bottleneck = self.pipeline, 0, [], self._rest(0, 0)[0]
        if bottleneck == math.inf:
            return None
        for piece in range(p.pieces):
            for size in range(1, len(p.layers) - start + 1):
                cost = self._cost(piece, start, size)
                if cost is not None and sum(cost) <= bottleneck and self._rest(piece + 1, start + size)[0] <= bottleneck:
                    sizes.append(size)
                    start += size
                    break
        return tuple(sizes)

    def cuts(self, most_seconds: float) -> Iterator[tuple[float, tuple[int, ...]]]:
        """1F1B cuts that fit in the order of their bounds, with them; those whose bound is above `most_seconds` may be left out."""
        pieces, layers = self.pipeline.pieces, len(self.pipeline.layers)
        heap: list[tuple[float, int, tuple[int, ...], _Begun]] = []

        def push(sizes: tuple[int, ...], begun: _Begun) -> None:
            rests = self._ways(len(sizes), sum(sizes), most_seconds)
            bound = min((begun.bound(rest) for rest in rests), default=math.inf)
            if bound <= most_seconds:
                heapq.heappush(heap, (bound, -len(sizes), sizes, begun))

        push((), _Begun(0.0, 0.0, -math.inf, 0.0))
        while heap:
            bound, _, sizes, begun = heapq.heappop(heap)
            if len(sizes) == pieces:
                yield bound, sizes
                continue
            start = sum(sizes)
            for size in range(1, layers - start + 1):
                stage = self._stage(len(sizes), start, size)
                if stage is None or stage.come > most_seconds:
                    break
                push((*sizes, size), begun.and_then(stage))

    def _stage(self, stage: int, start: int, size: int) -> _Way | None:
        """The bounds of one stage with this range of layers, as the module's docstring has them; None if it does not fit."""
        cost = self._cost(stage, start, size)
        if cost is None:
            return None
        p, here = self.pipeline, sum(cost)
        stages, count, send = p.stages, p.micro_batches, p.send_seconds
        waits = not p.overlap_sends and stages > 1
        exchanges = send * waits * (1 if stage in (0, stages - 1) else 2)
        later = max(0, count - stages + stage)
        come = here + (count - 1) * (here + exchanges) + 2 * stage * send
        twice = later * (here + exchanges) - here - send * waits + 2 * (2 * stages - 2 - stage) * send
        there = (count - 1) * max(cost) + later * min(cost) + 2 * (stages - 1) * send
        return _Way(here, come, twice if later else -math.inf, there)

    def _ways(self, piece: int, start: int, most_seconds: float) -> list[_Way]:
        """What the pieces from this one on can come to: ways none of which is better in all than another. Too many are made one that is below them all."""
        p, layers = self.pipeline, len(self.pipeline.layers)
        if piece == p.pieces:
            return [_Way(0.0, 0.0, -math.inf, 0.0)] if start == layers else []
        if (piece, start) in self._found_ways:
            return self._found_ways[piece, start]
        found: list[_Way] = []
        for size in range(1, layers - start - (p.pieces - piece - 1) + 1):
            stage = self._stage(piece, start, size)
            if stage is None or stage.come > most_seconds:
                break
            if p.micro_batches * self._rest(piece + 1, start + size)[0] > most_seconds:
                continue
            for after in self._ways(piece + 1, start + size, most_seconds):
                way = _Way(
                    stage.total + after.total, max(stage.come, stage.total + after.come), max(stage.twice, after.twice - stage.total),
                    max(stage.there, after.there))  # fmt: skip
                if not any(all(a <= b for a, b in zip(other, way, strict=True)) for other in found):
                    found = [other for other in found if not all(a >= b for a, b in zip(other, way, strict=True))] + [way]
        while len(found) > MOST_WAYS:
            found.sort(key=lambda way: (way.come, way.twice))
            found = [_Way(*map(min, zip(*found[at : at + 2], strict=True))) for at in range(0, len(found), 2)]
        self._found_ways[piece, start] = found
        return found

    def any_cut(self) -> float:
        """Seconds that no cut takes less than, under any schedule."""
        p = self.pipeline
        if p.chunks == 1:
            bottleneck, total = self._rest(0, 0)
            return max(p.micro_batches * bottleneck, total)
        cheap = [0.0, *accumulate(sorted(load.forward_seconds + load.backward_seconds for load in p.layers))]
        ends = [load.forward_seconds + load.backward_seconds for load in (p.embedding, p.output)]

        def step(stage: int, layers: int) -> float:
            """Of a stage with so many layers: E_s of the module's docstring, every piece before it with the cheapest layer."""
            way = stage * (cheap[1] + 2 * p.send_seconds) + ends[0] * (stage > 0)
            return way + p.micro_batches * (cheap[layers] + ends[0] * (stage == 0) + ends[1] * (stage == p.stages - 1))

        most = len(p.layers) - (p.stages - 1) * p.chunks
        times = sorted({step(stage, layers) for stage in range(p.stages) for layers in range(p.chunks, most + 1)})
        return next(
            seconds for seconds in times
            if sum(max((layers for layers in range(most + 1) if step(stage, layers) <= seconds), default=0) for stage in range(p.stages)) >= len(p.layers)
        )  # fmt: skip
