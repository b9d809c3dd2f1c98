"""Cuts of a pipeline against every cut there is, and the bounds they are proven by."""

import itertools
import math
import random

import pytest

from megatron_skywork.plan.simulation import PieceCost, simulate
from megatron_skywork.plan.split_bounds import Bounds, Load, Pipeline
from megatron_skywork.plan.splits import best_split, given_split


def compositions(layers, pieces):
    for borders in itertools.combinations(range(1, layers), pieces - 1):
        yield tuple(end - start for start, end in zip((0, *borders), (*borders, layers), strict=True))


def seconds_of(pipeline: Pipeline, sizes, recomputed) -> float:
    """A cut's time, its costs added up by hand."""
    costs, start = [], 0
    for piece, (size, again) in enumerate(zip(sizes, recomputed, strict=True)):
        own = list(pipeline.layers[start : start + size])
        own += [pipeline.embedding] * (piece == 0) + [pipeline.output] * (piece == len(sizes) - 1)
        extra = sum(layer.recompute_seconds for layer in pipeline.layers[start : start + again])
        costs.append(PieceCost(
            sum(load.forward_seconds for load in own), sum(load.backward_seconds for load in own) + extra, sum(load.weight_seconds for load in own),
            pipeline.send_seconds))  # fmt: skip
        start += size
    return simulate(costs, stages=pipeline.stages, micro_batches=pipeline.micro_batches, schedule=pipeline.schedule,
                    overlap_sends=pipeline.overlap_sends).seconds  # fmt: skip


def fits(pipeline: Pipeline, sizes, recomputed) -> bool:
    for stage in range(pipeline.stages):
        pieces = range(stage, len(sizes), pipeline.stages)
        ranges = tuple((sum(sizes[:piece]), sizes[piece]) for piece in pieces)
        if pipeline.memory(stage, ranges, tuple(recomputed[piece] for piece in pieces)) > pipeline.room_bytes:
            return False
    return True


def of_every_cut(pipeline: Pipeline) -> float:
    """The shortest time of all cuts and all numbers of recomputed layers that fit, by trying each."""
    shortest = math.inf
    for sizes in compositions(len(pipeline.layers), pipeline.pieces):
        for recomputed in itertools.product(*(range(size + 1 if pipeline.recompute else 1) for size in sizes)):
            if fits(pipeline, sizes, recomputed):
                shortest = min(shortest, seconds_of(pipeline, sizes, recomputed))
    return shortest


def made(seed: int, *, layers=6, stages=3, chunks=1, schedule="1f1b", overlap_sends=False, with_memory=True, kinds=2) -> Pipeline:
    """Layers of several kinds in any order, sends, and room that some cuts pass by only with recomputation."""
    chance = random.Random(seed)
    some = [Load(f := chance.uniform(0.5, 2), f * chance.uniform(1, 3), f * chance.uniform(0.3, 0.9), f * chance.uniform(0.5, 1.1)) for _ in range(kinds)]
    kept = {load: chance.uniform(1, 3) for load in some}
    of_layers = tuple(chance.choice(some) for _ in range(layers))
    micro_batches = stages * chance.randint(1, 4) if schedule == "interleaved" else chance.randint(1, 10)

    def memory(stage, ranges, recomputed):
        held = min(micro_batches, stages - stage)
        total = 0.5 * sum(size for _, size in ranges)
        for (start, size), again in zip(ranges, recomputed, strict=True):
            whole = sum(kept[load] for load in of_layers[start + again : start + size])
            total += held * (whole + 0.2 * again)
        return total

    room = chance.choice([0.12, 0.4, 0.7, 1.0, 1.4]) * memory(0, ((0, layers // stages),), (0,)) if with_memory else math.inf
    return Pipeline(
        of_layers, Load(0.1, 0.2), Load(chance.uniform(0, 2), chance.uniform(0, 4)), stages, chunks, micro_batches, schedule, overlap_sends,
        chance.choice([0.0, 0.05, 0.4]), memory, room)  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_one_piece_per_stage_is_the_best_of_all(seed):
    pipeline = made(seed, overlap_sends=seed % 3 == 0, with_memory=seed % 4 > 0, layers=5 + seed % 3, stages=2 + seed % 3)
    found, shortest = best_split(pipeline), of_every_cut(pipeline)
    if shortest == math.inf:
        assert found is None
        return
    assert found.seconds == pytest.approx(shortest, rel=1e-9) and found.gap == 0
    assert fits(pipeline, found.layers, found.recomputed) and sum(found.layers) == len(pipeline.layers)
    assert seconds_of(pipeline, found.layers, found.recomputed) == pytest.approx(found.seconds, rel=1e-12)


def test_some_of_these_cases_recompute_and_some_do_not_fit():
    """Or the test above would say little."""
    found = [best_split(made(seed, layers=5 + seed % 3, stages=2 + seed % 3)) for seed in range(24) if seed % 4 > 0]
    assert sum(split is None for split in found) >= 1
    assert sum(split is not None and sum(split.recomputed) > 0 for split in found) >= 5
    assert sum(split is not None and sum(split.recomputed) == 0 for split in found) >= 2


@pytest.mark.parametrize(("schedule", "chunks", "stages"), [("interleaved", 2, 2), ("zero-bubble", 1, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_other_schedules_are_the_best_of_all_while_all_can_be_timed(schedule, chunks, stages, seed):
    pipeline = made(seed, schedule=schedule, chunks=chunks, stages=stages, layers=6)
    found, shortest = best_split(pipeline), of_every_cut(pipeline)
    assert (found is None) == (shortest == math.inf)
    if found is not None:
        assert found.seconds == pytest.approx(shortest, rel=1e-9) and found.gap == 0 and fits(pipeline, found.layers, found.recomputed)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_come_in_order_and_no_cut_is_faster_than_its_own(seed):
    pipeline = made(seed, overlap_sends=seed % 2 == 0, layers=7, stages=2 + seed % 3, with_memory=seed % 3 > 0)
    bounds = Bounds(pipeline)
    cuts = list(bounds.cuts(1e9))
    found = [bound for bound, _ in cuts]
    assert found == pytest.approx(sorted(found), rel=1e-12)
    all_that_fit = {sizes for sizes in compositions(7, pipeline.stages) if bounds.cheapest_recomputation(sizes) is not None}
    assert {sizes for _, sizes in cuts} == all_that_fit and len(cuts) == len(all_that_fit)
    for bound, sizes in cuts:
        again = bounds.cheapest_recomputation(sizes)
        assert bound <= seconds_of(pipeline, sizes, again) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_with_too_many_cuts_to_time_the_bound_still_holds(seed):
    pipeline = made(seed, schedule="interleaved", chunks=2, stages=2, layers=7, with_memory=seed % 2 == 0)
    shortest, found = of_every_cut(pipeline), best_split(pipeline, limit=12)
    if found is not None:
        assert found.bound_seconds <= shortest * (1 + 1e-12) and shortest <= found.seconds * (1 + 1e-12)
        assert found.timed <= 12 and found.gap == pytest.approx(1 - found.bound_seconds / found.seconds)


@pytest.mark.parametrize("seed", range(6))
def test_a_search_that_is_cut_short_says_what_it_does_not_know(seed):
    pipeline = made(seed, layers=9, stages=4, overlap_sends=True, kinds=4, with_memory=False)
    shortest = min(seconds_of(pipeline, sizes, (0,) * 4) for sizes in compositions(9, 4))
    found = best_split(pipeline, limit=1)
    assert found.bound_seconds <= shortest * (1 + 1e-12) and found.seconds >= shortest * (1 - 1e-12)


def uniform(layers, stages, micro_batches, *, output=2.0, send=0.01, room=math.inf, kept=1.0) -> Pipeline:
    """Layers of one second forward and two backward; the output and the loss cost `output` layers (facts of the Skywork-MoE report's figure: about two)."""
    layer = Load(1.0, 2.0, 1.0, 1.0)

    def memory(stage, ranges, recomputed):
        held = min(micro_batches, stages - stage)
        return sum(size + held * ((size - again) * kept + 0.1 * again) for (_, size), again in zip(ranges, recomputed, strict=True))

    return Pipeline((layer,) * layers, Load(0.1, 0.2), Load(output, 2 * output), stages, 1, micro_batches, "1f1b", False, send, memory, room)


def test_the_report_s_question_is_answered_and_proven():
    """52 layers on 12 stages, 120 micro-batches, less room than stage 0 with 12 micro-batches in flight would like."""
    free, tight = uniform(52, 12, 120), uniform(52, 12, 120, room=45)
    at_ease, squeezed = best_split(free), best_split(tight)
    for split, pipeline in ((at_ease, free), (squeezed, tight)):
        assert sum(split.layers) == 52 and len(split.layers) == 12 and split.gap == 0
        # The loss costs two layers, so the last stage holds the fewest.
        assert split.layers[-1] == min(split.layers) and fits(pipeline, split.layers, split.recomputed)
        uneven = seconds_of(pipeline, (4, 4, 4, 4, 5, 5, 5, 5, 4, 4, 4, 4), (0,) * 12)
        assert split.seconds < uneven
    assert sum(at_ease.recomputed) == 0 and sum(squeezed.recomputed) > 0
    assert squeezed.recomputed[0] > 0 == squeezed.recomputed[-1], "the first stage holds 12 micro-batches, the last one"
    assert squeezed.seconds > at_ease.seconds


def test_the_report_s_example_gains_by_a_light_last_stage():
    """24 layers: the report's [5, 5, 5, 5, 4] over 5 stages is what moving single layers gives, and the best may only be better."""
    pipeline = uniform(24, 5, 16)
    assert best_split(pipeline).seconds <= seconds_of(pipeline, (5, 5, 5, 5, 4), (0,) * 5)


def test_a_given_cut_gets_the_fewest_recomputed_layers_that_fit():
    pipeline = uniform(12, 3, 8, room=13)
    split = given_split(pipeline, (4, 4, 4))
    assert split.layers == (4, 4, 4) and fits(pipeline, split.layers, split.recomputed)
    for stage, again in enumerate(split.recomputed):
        fewer = tuple(number - (index == stage) for index, number in enumerate(split.recomputed))
        assert again == 0 or not fits(pipeline, split.layers, fewer)
    assert split.bound_seconds <= split.seconds
    assert given_split(uniform(12, 3, 8, room=1), (4, 4, 4)) is None


def test_more_pieces_than_layers_is_no_cut():
    assert best_split(uniform(3, 4, 8)) is None
