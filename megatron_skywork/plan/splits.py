"""Layers of each piece of a pipeline and how many of them it recomputes: the choice that makes a step shortest, with a proven bound beside it.

The report splits 52 layers over 12 stages by hand, and recomputes a different number on each (Skywork-MoE report, appendix B). Here pieces are contiguous
ranges of layers. Only the smallest recomputed numbers that fit are looked at: a step is a longest path through operations whose order does not depend on how
long they take, so a longer backward never makes it shorter.

    one piece per stage     cuts are taken in the order of their bounds (`split_bounds.py`; A*) and timed by `simulation.py`, until the next bound is no less
                            than the shortest time found: then that time is the optimum
    several                 all cuts, if there are no more than `limit`; else from as even a cut as can be one layer is moved at a time until no move helps

Where the optimum is not proven, `Split.gap` says by how much another cut could at most be faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_skywork.plan.simulation import PieceCost, lower_bound, simulate
from megatron_skywork.plan.split_bounds import Bounds, Pipeline

# Two times that differ by less than this share are the same: sums of floats in another order.
SAME = 1e-9
# Longest piece that is looked at first, over an even share of all work; the shorter, the less there is to look at.
PIECE_SHARES = (1.3, 2.0, math.inf)


@dataclass(frozen=True)
class Split:
    """A cut of a pipeline.

    Args:
        layers, recomputed: of each piece in model order; a piece recomputes its first ones.
        seconds: simulated time of a step's pipeline.
        bound_seconds: no cut that fits takes less.
        timed: how many cuts were timed.
    """

    layers: tuple[int, ...]
    recomputed: tuple[int, ...]
    seconds: float
    bound_seconds: float
    timed: int

    @property
    def gap(self) -> float:
        """Share of the time by which another cut could at most be faster; 0: this is the optimum."""
        gap = 1 - self.bound_seconds / self.seconds
        return gap if gap > SAME else 0.0


def best_split(pipeline: Pipeline, *, limit: int = 2000, worth_seconds: float = math.inf) -> Split | None:
    """The cut with the shortest step that fits; None if none does.

    Args:
        limit: cuts that are timed at most, a few milliseconds each.
        worth_seconds: with several pieces per stage, even cuts that take longer are not improved.
    """
    pieces, layers = pipeline.pieces, len(pipeline.layers)
    if pieces > layers:
        return None
    if pipeline.schedule == "1f1b":
        return _in_order(pipeline, limit)
    bounds = Bounds(pipeline)
    if math.comb(layers - 1, pieces - 1) <= limit:
        return _of_all(bounds)
    return _improved(bounds, limit, worth_seconds)


def given_split(pipeline: Pipeline, layers: Sequence[int]) -> Split | None:
    """A given cut with the recomputed layers that fit and cost each stage least; None if it does not fit."""
    bounds = Bounds(pipeline)
    again = bounds.cheapest_recomputation(layers)
    if again is None:
        return None
    costs = bounds.piece_costs(layers, again)
    bound = lower_bound(costs, stages=pipeline.stages, micro_batches=pipeline.micro_batches, schedule=pipeline.schedule)
    return Split(tuple(layers), again, _seconds(pipeline, costs), bound, 1)


def _seconds(pipeline: Pipeline, costs: Sequence[PieceCost]) -> float:
    p = pipeline
    return simulate(costs, stages=p.stages, micro_batches=p.micro_batches, schedule=p.schedule, overlap_sends=p.overlap_sends).seconds


class _Best:
    """The best of the cuts timed so far; of equal ones that which recomputes less, then the more even one."""

    def __init__(self, bounds: Bounds):
        self._bounds, self.timed, self.seconds = bounds, 0, math.inf
        self.layers: tuple[int, ...] = ()
        self._recomputed: tuple[int, ...] = ()

    def time(self, layers: tuple[int, ...], recomputed: tuple[int, ...]) -> None:
        seconds = _seconds(self._bounds.pipeline, self._bounds.piece_costs(layers, recomputed))
        self.timed += 1
        is_same = abs(seconds - self.seconds) <= SAME * seconds
        if (is_same and _unevenness(layers, recomputed) < _unevenness(self.layers, self._recomputed)) or (not is_same and seconds < self.seconds):
            self.seconds, self.layers, self._recomputed = seconds, layers, recomputed

    def split(self, bound_seconds: float) -> Split | None:
        if not self.timed:
            return None
        return Split(self.layers, self._recomputed, self.seconds, min(bound_seconds, self.seconds), self.timed)


def _unevenness(layers: Sequence[int], recomputed: Sequence[int]) -> tuple[int, int]:
    return sum(recomputed), sum(size * size for size in layers)


def _in_order(pipeline: Pipeline, limit: int) -> Split | None:
    loads = [*pipeline.layers, pipeline.embedding, pipeline.output]
    even_seconds = sum(load.forward_seconds + load.backward_seconds for load in loads) / pipeline.stages
    for share in PIECE_SHARES:
        bounds = Bounds(pipeline, even_seconds * share)
        even = bounds.even_cut()
        if even is not None:
            break
    else:
        return None
    best = _Best(bounds)
    best.time(even, _fewest(bounds, even))
    # A cut that is faster has no piece that takes longer.
    if best.seconds / pipeline.micro_batches > even_seconds * share:
        bounds = Bounds(pipeline, best.seconds / pipeline.micro_batches)
    for bound, layers in bounds.cuts(best.seconds):
        if bound >= best.seconds * (1 - SAME):
            break
        if best.timed >= limit:
            return best.split(bound)
        if layers != even:
            best.time(layers, _fewest(bounds, layers))
    return best.split(best.seconds)


def _fewest(bounds: Bounds, layers: Sequence[int]) -> tuple[int, ...]:
    """Recomputed layers of a cut that fits, with one piece per stage."""
    return next(bounds.recomputations(layers))


def _of_all(bounds: Bounds) -> Split | None:
    pieces, layers = bounds.pipeline.pieces, len(bounds.pipeline.layers)
    best = _Best(bounds)
    for borders in combinations(range(1, layers), pieces - 1):
        sizes = tuple(end - start for start, end in zip((0, *borders), (*borders, layers), strict=True))
        for again in bounds.recomputations(sizes):
            best.time(sizes, again)
    return best.split(best.seconds)


def _improved(bounds: Bounds, limit: int, worth_seconds: float) -> Split | None:
    p = bounds.pipeline
    best, tried = _Best(bounds), set[tuple[int, ...]]()

    def least(sizes: Sequence[int], recomputed: Sequence[int]) -> float:
        return lower_bound(bounds.piece_costs(sizes, recomputed), stages=p.stages, micro_batches=p.micro_batches, schedule=p.schedule)

    def attempt(cuts: Iterable[tuple[int, ...]]) -> None:
        for sizes in cuts:
            if best.timed >= limit or sizes in tried or min(sizes) < 1:
                continue
            tried.add(sizes)
            # What recomputation a cut needs takes longer to find out than that it is too slow without.
            again = bounds.cheapest_recomputation(sizes) if least(sizes, (0,) * p.pieces) < best.seconds else None
            if again is not None and (not any(again) or least(sizes, again) < best.seconds):
                best.time(sizes, again)

    base, extra = divmod(len(p.layers), p.pieces)
    starts = {0, (p.pieces - extra) // 2, p.pieces - extra}
    attempt(tuple(base + (first <= piece < first + extra) for piece in range(p.pieces)) for first in sorted(starts))
    before = math.inf
    while best.timed < limit and best.seconds < min(before * (1 - SAME), worth_seconds):
        before, at = best.seconds, best.layers
        moves = ((giver, taker) for giver in range(p.pieces) for taker in range(p.pieces) if giver != taker)
        attempt(tuple(size - (piece == giver) + (piece == taker) for piece, size in enumerate(at)) for giver, taker in moves)
    return best.split(bounds.any_cut())
