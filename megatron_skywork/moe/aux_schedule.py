"""A schedule for auxiliary-loss coefficients that do not adapt: a factor over the steps, linear between the points that are given."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_skywork.config.schema import AuxSchedulePoint


def schedule_factor(points: Sequence[AuxSchedulePoint], step: int) -> float:
    """What the coefficients are multiplied by in `step`: 1 without points, the first or the last point's factor outside them.

    Args:
        points: with ascending steps.
        step: of the optimizer, from 1.
    """
    if not points:
        return 1.0
    for before, after in zip(points, points[1:], strict=False):
        if before.step <= step < after.step:
            passed = (step - before.step) / (after.step - before.step)
            return before.factor + passed * (after.factor - before.factor)
    return points[0].factor if step < points[0].step else points[-1].factor
