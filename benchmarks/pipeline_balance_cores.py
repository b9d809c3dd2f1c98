"""A pipeline whose stages share fewer cores than they are: the planner's clock gives every stage a processor of its own, and a small machine does not.

Of n stages that have work, each gets min(1, cores / n) of a core, which is how Linux shares them on average; a stage that waits for a neighbour takes none.
Everything else is as in `plan.simulation` with blocking exchanges, and with a core for every stage the same comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_skywork.plan.pipeline import Exchange, Message, Op, blocking_calls
from megatron_skywork.plan.simulation import PieceCost, simulate

Passes = dict[str, list[float]]
"""CPU seconds of a stage's forwards ("F") and backwards ("B") in a step, by micro-batch."""


def step_seconds(pieces: Sequence[PieceCost], micro_batches: int, cores: int) -> float:
    """Seconds of a 1F1B step of one piece per stage on so many cores."""
    if cores >= len(pieces):
        return simulate(pieces, stages=len(pieces), micro_batches=micro_batches).seconds
    passes = [{"F": [piece.forward_seconds] * micro_batches, "B": [piece.backward_seconds] * micro_batches} for piece in pieces]
    return replayed(passes, [piece.send_seconds for piece in pieces], cores)


def replayed(passes: Sequence[Passes], sends: Sequence[float], cores: int) -> float:
    """Seconds of a 1F1B step whose every pass takes as long as it says, by going from one moment at which something ends to the next.

    Args:
        passes: of each stage.
        sends: seconds of a message between each stage and the next.
    """
    stages, micro_batches = len(passes), len(passes[0]["F"])
    calls = [blocking_calls("1f1b", stages, 1, micro_batches, stage) for stage in range(stages)]
    places, left = [0] * stages, [0.0] * stages
    came: dict[Message, int] = {}
    arrivals: dict[Message, float] = {}
    now = 0.0

    def call(stage: int) -> Op | Exchange | None:
        return calls[stage][places[stage]] if places[stage] < len(calls[stage]) else None

    def come(stage: int) -> None:
        """A stage has got to its next call."""
        reached = call(stage)
        if isinstance(reached, Op):
            left[stage] = passes[stage][reached.kind][reached.micro_batch]
        for message in () if reached is None or isinstance(reached, Op) else reached:
            came[message] = came.get(message, 0) + 1
            if came[message] == 2:
                arrivals[message] = now + sends[message.piece - (message.kind == "B")]

    for stage in range(stages):
        come(stage)
    while any(call(stage) is not None for stage in range(stages)):
        working = [stage for stage in range(stages) if isinstance(call(stage), Op)]
        share = min(1.0, cores / max(1, len(working)))
        exchanges = {stage: reached for stage in range(stages) if (reached := call(stage)) is not None and not isinstance(reached, Op)}
        ends = {stage: max(arrivals[message] for message in reached) for stage, reached in exchanges.items() if all(one in arrivals for one in reached)}
        then = min([now + left[stage] / share for stage in working] + list(ends.values()))
        for stage in working:
            left[stage] -= (then - now) * share
        now = then
        done = [stage for stage in working if left[stage] <= 1e-12] + [stage for stage, end in ends.items() if end <= now]
        for stage in done:
            places[stage] += 1
            come(stage)
    return now
