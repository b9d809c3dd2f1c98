"""Orders of execution: those of the papers' figures, and rules that every order keeps. megatron-core itself: tests/distributed/test_pipeline_order.py."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.pipeline import Message, Op, blocking_calls, held, order

CASES = [(schedule, stages, 1, count) for schedule in ("1f1b", "zero-bubble") for stages in (1, 2, 3, 4, 7) for count in (1, 2, 5, 16)]
CASES += [("interleaved", stages, chunks, groups * stages) for stages in (2, 3, 4) for chunks in (2, 3) for groups in (1, 2, 5)]


def written(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> str:
    """As in a figure: forwards F1, backwards B1, later chunks primed, weights' parts W1; micro-batches from 1."""
    return " ".join(f"{op.kind}{op.micro_batch + 1}{chr(39) * op.chunk}" for op in order(schedule, stages, chunks, micro_batches, stage))


def test_1f1b_of_the_megatron_figure() -> None:
    """Narayanan et al., arXiv 2104.04473, figure 4 above: four devices, eight micro-batches."""
    assert written("1f1b", 4, 1, 8, 0) == "F1 F2 F3 F4 B1 F5 B2 F6 B3 F7 B4 F8 B5 B6 B7 B8"
    assert written("1f1b", 4, 1, 8, 2) == "F1 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 F8 B7 B8"
    assert written("1f1b", 4, 1, 8, 3) == "F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 F8 B8"


def test_interleaved_of_the_megatron_figure() -> None:
    """The same figure below: two chunks on each device, the second one's passes primed."""
    assert written("interleaved", 4, 2, 8, 0).startswith("F1 F2 F3 F4 F1' F2' F3' F4' F5 F6 F7 B1' F8 B2' F5' B3' F6' B4' F7' B1 F8' B2 B3 B4 B5'")
    assert written("interleaved", 4, 2, 8, 3).startswith("F1 F2 F3 F4 F1' B1' F2' B2' F3' B3' F4' B4' F5 B1 F6 B2 F7 B3 F8 B4 F5' B5'")


def test_zero_bubble_of_its_figure() -> None:
    """Qi et al., arXiv 2401.10241, figure 2 (ZB-H1): the first device runs W right after its B, the last three micro-batches later."""
    assert written("zero-bubble", 4, 1, 8, 0).startswith("F1 F2 F3 F4 B1 W1 F5 B2 W2 F6 B3 W3")
    assert written("zero-bubble", 4, 1, 8, 3) == "F1 B1 F2 B2 F3 B3 F4 B4 W1 F5 B5 W2 F6 B6 W3 F7 B7 W4 F8 B8 W5 W6 W7 W8"


@pytest.mark.parametrize(("schedule", "stages", "chunks", "count"), CASES)
def test_everything_runs_once_and_nothing_before_what_it_needs(schedule: str, stages: int, chunks: int, count: int) -> None:
    kinds = "FBW" if schedule == "zero-bubble" else "FB"
    for stage in range(stages):
        ops = order(schedule, stages, chunks, count, stage)
        assert Counter(ops) == Counter(Op(kind, index, chunk) for kind in kinds for index in range(count) for chunk in range(chunks))  # type: ignore[arg-type]
        places = {op: place for place, op in enumerate(ops)}
        for first, second in zip(kinds, kinds[1:], strict=False):
            pairs = [(Op(first, index, chunk), Op(second, index, chunk)) for index in range(count) for chunk in range(chunks)]  # type: ignore[arg-type]
            assert all(places[before] < places[after] for before, after in pairs)


@pytest.mark.parametrize(("schedule", "stages", "chunks", "count"), [case for case in CASES if case[0] != "zero-bubble"])
def test_both_sides_of_every_message_come_to_an_exchange(schedule: str, stages: int, chunks: int, count: int) -> None:
    """All activations go from one piece to the next and all gradients back, each in one exchange of its sender and one of its receiver."""
    sides: dict[Message, list[int]] = {}
    for stage in range(stages):
        calls = blocking_calls(schedule, stages, chunks, count, stage)
        assert [call for call in calls if isinstance(call, Op)] == order(schedule, stages, chunks, count, stage)
        for message in [message for call in calls if not isinstance(call, Op) for message in call]:
            sides.setdefault(message, []).append(stage)
    last = stages * chunks - 1
    expected = {Message("F", index, piece): {piece % stages, (piece + 1) % stages} for index in range(count) for piece in range(last)}
    expected |= {Message("B", index, piece + 1): {piece % stages, (piece + 1) % stages} for index in range(count) for piece in range(last)}
    assert {message: set(found) for message, found in sides.items()} == expected
    assert all(len(found) == 2 for found in sides.values())


@pytest.mark.parametrize(("schedule", "stages", "chunks", "count"), CASES)
def test_held_is_the_fullest_moment(schedule: str, stages: int, chunks: int, count: int) -> None:
    """Whatever the chunks weigh, no moment of the whole order holds more than the fullest of those that `held` names."""
    for stage in range(stages):
        for weights in ([1] * chunks, list(range(1, chunks + 1)), list(range(chunks, 0, -1)), [10**index for index in range(chunks)]):
            level = peak = 0
            for op in order(schedule, stages, chunks, count, stage):
                if op.kind == "F":
                    level += weights[op.chunk]
                elif op.kind == ("W" if schedule == "zero-bubble" else "B"):
                    level -= weights[op.chunk]
                peak = max(peak, level)
            found = held(schedule, stages, chunks, count, stage)
            assert max(sum(number * weight for number, weight in zip(numbers, weights, strict=True)) for numbers in found) == peak


def test_held_of_known_schedules() -> None:
    """1F1B holds p - s micro-batches, ZB-H1 p on every stage (arXiv 2401.10241, section 2.2), interleaved on the first stage 1 + (p - 1) / (p v) times
    what 1F1B does (Korthikanti et al., arXiv 2205.05198, section 4.2): with chunks of 1 / v of its layers, p v + p - 1 of them."""
    assert [held("1f1b", 4, 1, 16, stage) for stage in range(4)] == [((4,),), ((3,),), ((2,),), ((1,),)]
    assert [max(held("zero-bubble", 4, 1, 16, stage)) for stage in range(4)] == [(4,)] * 4
    assert {sum(numbers) for numbers in held("interleaved", 4, 2, 16, 0)} == {4 * 2 + 4 - 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gpipe", 4, 1, 8), "1f1b, interleaved, zero-bubble"),
        (("1f1b", 4, 2, 8), "schedule=interleaved"),
        (("interleaved", 4, 1, 8), "schedule=1f1b"),
        (("interleaved", 4, 2, 10), "use 8 or 12 micro-batches"),
        (("interleaved", 4, 2, 3), "use 4 micro-batches"),
        (("1f1b", 0, 1, 8), "stages=0"),
        (("1f1b", 4, 1, 0), "micro_batches=0"),
    ],
)
def test_what_cannot_run_is_answered_with_what_can(arguments: tuple[str, int, int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        order(*arguments, 0)
