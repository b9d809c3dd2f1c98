"""The clock of a pipeline against textbook bubbles, cases worked out by hand, an independent solver of what waits for what, and the report's example."""

from __future__ import annotations

import random
import time
from collections import defaultdict

import pytest

from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.pipeline import Message, Op, blocking_calls, order
from megatron_skywork.plan.pipeline_program import program
from megatron_skywork.plan.simulation import PieceCost, Timeline, lower_bound, memory_over_time, simulate


def equal(stages: int, chunks: int = 1, forward: float = 1.0, backward: float = 2.0, weight: float = 1.0) -> list[PieceCost]:
    """Equal pieces with free sends, whose sum over the chunks of a stage is what is asked for."""
    return [PieceCost(forward / chunks, backward / chunks, weight / chunks)] * (stages * chunks)


# --- published formulas ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (4, 8), (4, 80), (16, 256)])
def test_textbook_bubble_of_1f1b(stages: int, micro_batches: int, overlap: bool) -> None:
    """(p - 1) / M of the ideal time: arXiv 2104.04473, section 2.2."""
    found = simulate(equal(stages), stages=stages, micro_batches=micro_batches, overlap_sends=overlap)
    assert found.overhead == pytest.approx((stages - 1) / micro_batches)
    assert found.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(2, 2, 2), (4, 2, 8), (4, 3, 80), (8, 4, 256)])
def test_textbook_bubble_of_interleaved(stages: int, chunks: int, micro_batches: int, overlap: bool) -> None:
    """1 / v of the bubble of 1F1B: arXiv 2104.04473, section 2.2."""
    found = simulate(equal(stages, chunks), stages=stages, micro_batches=micro_batches, schedule="interleaved", overlap_sends=overlap)
    assert found.overhead == pytest.approx((stages - 1) / (chunks * micro_batches))


@pytest.mark.parametrize(("forward", "backward", "weight"), [(1.0, 2.0, 1.0), (1.0, 1.9, 0.8)])
def test_bubble_of_zero_bubble_h1(forward: float, backward: float, weight: float) -> None:
    """(p - 1)(T_F + T_B - T_W) seconds, where 1F1B has (p - 1)(T_F + T_B + T_W): arXiv 2401.10241, table 2. T_B is backward without the weights' part."""
    for stages, micro_batches in ((2, 4), (4, 8), (8, 64)):
        pieces = equal(stages, 1, forward, backward, weight)
        found = simulate(pieces, stages=stages, micro_batches=micro_batches, schedule="zero-bubble")
        assert found.stages[0].idle_seconds == pytest.approx((stages - 1) * (forward + (backward - weight) - weight))
        plain = simulate(pieces, stages=stages, micro_batches=micro_batches)
        assert plain.stages[0].idle_seconds == pytest.approx((stages - 1) * (forward + backward))


# --- by hand -----------------------------------------------------------------------------------------------------------------------------


def test_sends_by_hand() -> None:
    """Two stages, two micro-batches, F 1, B 2, a send 1 second.

    Blocking: 0 runs F1 0-1; hands over 1-2; F2 2-3, and waits in send_forward_recv_backward. 1 runs F1 2-3 and B1 3-5, then both exchange 5-6;
    0 runs B1 6-8, 1 runs F2 6-7, B2 7-9; 9-10 the gradient; 0 runs B2 10-12.
    Overlapped: 0 runs F1 0-1, F2 1-2; 1 runs F1 2-3, B1 3-5, F2 5-6, B2 6-8; 0 runs B1 6-8, B2 9-11.
    """
    pieces = [PieceCost(1.0, 2.0, send_seconds=1.0)] * 2
    blocking = simulate(pieces, stages=2, micro_batches=2, overlap_sends=False, keep_events=True)
    assert [(event.start, event.end) for event in blocking.stages[0].events] == [(0, 1), (2, 3), (6, 8), (10, 12)]
    assert [(event.start, event.end) for event in blocking.stages[1].events] == [(2, 3), (3, 5), (6, 7), (7, 9)]
    overlapped = simulate(pieces, stages=2, micro_batches=2, overlap_sends=True, keep_events=True)
    assert [(event.start, event.end) for event in overlapped.stages[0].events] == [(0, 1), (1, 2), (6, 8), (9, 11)]
    assert [(event.start, event.end) for event in overlapped.stages[1].events] == [(2, 3), (3, 5), (5, 6), (6, 8)]


def test_a_slow_link_sets_the_pace() -> None:
    """Overlapped messages of one direction follow each other on their link: with sends longer than all work, a step takes as long as they do."""
    pieces = [PieceCost(1.0, 1.0, send_seconds=10.0)] * 2
    found = simulate(pieces, stages=2, micro_batches=50, overlap_sends=True)
    # 1F1B lets two micro-batches be on their way, so a round trip of two sends and the work between finishes two.
    assert found.seconds / 50 == pytest.approx((2 * 10.0 + 4.0) / 2, rel=0.05)


def test_the_report_s_uneven_split() -> None:
    """Skywork-MoE report, appendix B: 24 layers as [5,5,5,5,4] over 5 stages instead of [6,6,6,6] over 4 reduce bubble time by up to 10 %.

    Taken from its figure: the loss costs two layer-forwards, backward is twice forward. It does not state how many micro-batches it compares. Here both
    get the same GPUs and the same global batch, so 4 pipelines of 5 stages run 5 micro-batches where 5 pipelines of 4 stages run 4.
    With a layer's forward as unit of time, M micro-batches on 4 stages take 24 M + 54, of which a GPU works 19.5 M and stands idle 4.5 M + 54; on 5 stages
    1.25 M micro-batches take 22.5 M + 60, idle 3 M + 60. Idle time falls by 10 % at M = 11 and by a third at most, the step by 6.25 % at most.
    """

    def split(layers: list[int], micro_batches: int) -> Timeline:
        forwards = [float(number) for number in layers]
        forwards[-1] += 2
        return simulate([PieceCost(cost, 2 * cost) for cost in forwards], stages=len(layers), micro_batches=micro_batches)

    for count in (8, 12, 16, 64, 1024):
        four, five = split([6, 6, 6, 6], count), split([5, 5, 5, 5, 4], count * 5 // 4)
        assert (four.seconds, five.seconds) == pytest.approx((24 * count + 54, 22.5 * count + 60))
        idle = [sum(stage.idle_seconds for stage in found.stages) / len(found.stages) for found in (four, five)]
        assert idle == pytest.approx([4.5 * count + 54, 3 * count + 60])
    fall = {count: 1 - (3 * count + 60) / (4.5 * count + 54) for count in (8, 11, 12, 16, 64)}
    assert {count: round(100 * value, 1) for count, value in fall.items()} == {8: 6.7, 11: 10.1, 12: 11.1, 16: 14.3, 64: 26.3}


# --- an independent solver -----------------------------------------------------------------------------------------------------------------


def solved(pieces: list[PieceCost], stages: int, count: int, schedule: str, overlap: bool) -> dict[tuple[int, Op], tuple[float, float]]:
    """Start and end of all work as the least solution of what each waits for: every condition is applied until none moves anything."""
    chunks = len(pieces) // stages
    calls = [order(schedule, stages, chunks, count, stage) if overlap else blocking_calls(schedule, stages, chunks, count, stage) for stage in range(stages)]

    def cost(op: Op, stage: int) -> float:
        piece = pieces[op.chunk * stages + stage]
        if schedule != "zero-bubble":
            return {"F": piece.forward_seconds, "B": piece.backward_seconds}[op.kind]
        return {"F": piece.forward_seconds, "B": piece.backward_seconds - piece.weight_seconds, "W": piece.weight_seconds}[op.kind]

    def travel(message: Message) -> float:
        return pieces[message.piece if message.kind == "F" else message.piece - 1].send_seconds

    start = [[0.0] * len(line) for line in calls]
    end = [[0.0] * len(line) for line in calls]
    made = {}
    for stage, line in enumerate(calls):
        for place, call in enumerate(line):
            if isinstance(call, Op):
                made[Message(call.kind, call.micro_batch, call.chunk * stages + stage)] = (stage, place)
    sides = defaultdict(list)
    for stage, line in enumerate(calls):
        for place, call in enumerate(line):
            for message in () if isinstance(call, Op) else call:
                sides[message].append((stage, place))
    arrival: dict[Message, float] = {message: 0.0 for message in made}
    is_moving = True
    while is_moving:
        before = (str(start), str(arrival))
        for stage, line in enumerate(calls):
            sent: dict[str, float] = {"F": 0.0, "B": 0.0}
            for place, call in enumerate(line):
                start[stage][place] = end[stage][place - 1] if place else 0.0
                if not isinstance(call, Op):
                    done = [max(start[s][p] for s, p in sides[message]) + travel(message) for message in call]
                    end[stage][place] = max(done)
                    continue
                piece = call.chunk * stages + stage
                needed = Message(call.kind, call.micro_batch, piece - 1 if call.kind == "F" else piece + 1)
                if overlap and call.kind != "W" and 0 <= needed.piece < len(pieces):
                    start[stage][place] = max(start[stage][place], arrival[needed])
                end[stage][place] = start[stage][place] + cost(call, stage)
                if call.kind != "W" and piece != (len(pieces) - 1 if call.kind == "F" else 0):
                    message = Message(call.kind, call.micro_batch, piece)
                    arrival[message] = sent[call.kind] = max(end[stage][place], sent[call.kind]) + travel(message)
        is_moving = before != (str(start), str(arrival))
    return {(stage, call): (start[stage][place], end[stage][place])
            for stage, line in enumerate(calls) for place, call in enumerate(line) if isinstance(call, Op)}  # fmt: skip


def random_case(seed: int) -> tuple[list[PieceCost], int, int, str, bool]:
    source = random.Random(seed)
    schedule = source.choice(["1f1b", "interleaved", "zero-bubble"])
    stages = source.randint(2, 4)
    chunks = source.randint(2, 3) if schedule == "interleaved" else 1
    count = stages * source.randint(1, 7) if schedule == "interleaved" else source.randint(1, 20)
    pieces = []
    for _ in range(stages * chunks):
        forward = source.uniform(0.5, 2)
        backward = forward * source.uniform(1, 3)
        pieces.append(PieceCost(forward, backward, backward * source.uniform(0, 0.6), source.choice([0, 0.1, 1.5]) * source.random(), source.random()))
    return pieces, stages, count, schedule, source.random() < 0.5 or schedule == "zero-bubble"


@pytest.mark.parametrize("seed", range(60))
def test_every_event_is_where_an_independent_solver_puts_it(seed: int) -> None:
    pieces, stages, count, schedule, overlap = random_case(seed)
    found = simulate(pieces, stages=stages, micro_batches=count, schedule=schedule, overlap_sends=overlap, keep_events=True)
    expected = solved(pieces, stages, count, schedule, overlap)
    events = {(stage, event.op): (event.start, event.end) for stage, line in enumerate(found.stages) for event in line.events}
    assert events.keys() == expected.keys()
    for key, times in events.items():
        assert times == pytest.approx(expected[key], abs=1e-9), key
    assert found.seconds == pytest.approx(max(end for _, end in expected.values()))
    for stage, line in enumerate(found.stages):
        assert line.busy_seconds == pytest.approx(sum(end - start for (where, _), (start, end) in expected.items() if where == stage))
        assert line.idle_seconds == pytest.approx(found.seconds - line.busy_seconds)


# --- long steps, bounds, memory --------------------------------------------------------------------------------------------------------------


def long_cases() -> list[tuple[list[PieceCost], int, int, str, bool]]:
    source = random.Random(5)
    cases = []
    for _ in range(120):
        schedule = source.choice(["1f1b", "interleaved", "zero-bubble"])
        stages, chunks = source.randint(2, 8), source.randint(2, 4) if schedule == "interleaved" else 1
        count = stages * source.randint(3, 40) if schedule == "interleaved" else source.randint(20, 200)
        spread, send = source.choice([0.0, 0.01, 0.3]), source.choice([0, 0.05, 1.0])
        forwards = [source.uniform(1, 1 + spread) for _ in range(stages * chunks)]
        pieces = [PieceCost(cost, 2 * cost, cost * source.uniform(0.5, 1), send * source.random(), source.random()) for cost in forwards]
        cases.append((pieces, stages, count, schedule, source.random() < 0.5))
    return cases


def test_a_skipped_steady_state_ends_where_a_whole_one_does() -> None:
    for pieces, stages, count, schedule, overlap in long_cases():
        short = simulate(pieces, stages=stages, micro_batches=count, schedule=schedule, overlap_sends=overlap)
        whole = simulate(pieces, stages=stages, micro_batches=count, schedule=schedule, overlap_sends=overlap, keep_events=True)
        assert short.seconds == pytest.approx(whole.seconds, rel=1e-10)
        assert [stage.peak_bytes for stage in short.stages] == [stage.peak_bytes for stage in whole.stages]


def test_no_step_is_below_the_lower_bound() -> None:
    nearness = defaultdict(list)
    for pieces, stages, count, schedule, overlap in long_cases() + [random_case(seed) for seed in range(100)]:
        found = simulate(pieces, stages=stages, micro_batches=count, schedule=schedule, overlap_sends=overlap).seconds
        bound = lower_bound(pieces, stages=stages, micro_batches=count, schedule=schedule)
        assert bound <= found * (1 + 1e-12)
        free = not any(piece.send_seconds for piece in pieces)
        nearness[schedule, free].append(bound / found)
    # A bound that is far off would discard nothing.
    assert min(nearness["1f1b", True]) > 0.95


def test_memory_over_time_peaks_at_the_peak() -> None:
    for seed in range(30):
        pieces, stages, count, schedule, overlap = random_case(seed)
        found = simulate(pieces, stages=stages, micro_batches=count, schedule=schedule, overlap_sends=overlap, keep_events=True)
        for stage, line in zip(found.stages, memory_over_time(found, pieces), strict=True):
            assert max(level for _, level in line) == pytest.approx(stage.peak_bytes)
            assert line[0][1] == 0 and line[-1][1] == pytest.approx(0, abs=1e-9)
            assert [moment for moment, _ in line] == sorted(moment for moment, _ in line)


@pytest.mark.parametrize(("schedule", "stages", "chunks"), [("1f1b", 5, 1), ("zero-bubble", 5, 1), ("interleaved", 4, 3)])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_program_waits_only_for_what_came_before(schedule: str, stages: int, chunks: int, overlap: bool) -> None:
    found = program(schedule, stages, chunks, 40 * stages, overlap or schedule == "zero-bubble")
    assert found.num_rounds > 30
    steps = [*found.first, *found.round, *found.last]
    assert all(1 <= back <= number for number, step in enumerate(steps, 1) for back, _ in step.waits)


def test_a_machine_of_ten_thousand_gpus_takes_seconds() -> None:
    """Pipelines of 64 stages of 4 chunks and 4,096 micro-batches."""
    source = random.Random(1)
    pieces = [PieceCost(cost, 2 * cost, cost, 0.01, 1.0) for cost in (source.uniform(1, 1.1) for _ in range(256))]
    started = time.process_time()
    found = simulate(pieces, stages=64, micro_batches=4096, schedule="interleaved")
    assert time.process_time() - started < 20
    assert found.seconds >= lower_bound(pieces, stages=64, micro_batches=4096, schedule="interleaved")


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([PieceCost(1, 2)] * 3, "3 pieces do not go round 2 stages"),
        ([], "0 pieces"),
        ([PieceCost(1, 2), PieceCost(0, 2)], "piece 1"),
        ([PieceCost(1, 2, weight_seconds=3), PieceCost(1, 2)], "piece 0"),
        ([PieceCost(float("nan"), 2), PieceCost(1, 2)], "piece 0"),
    ],
)
def test_impossible_costs_are_named(pieces: list[PieceCost], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(pieces, stages=2, micro_batches=4)
