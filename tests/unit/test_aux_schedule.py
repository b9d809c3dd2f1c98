"""The factor on fixed auxiliary-loss coefficients over the steps."""

import pytest

from megatron_skywork.config.schema import AuxSchedulePoint
from megatron_skywork.moe.aux_schedule import schedule_factor


def test_factor_is_linear_between_points_and_constant_outside():
    points = [AuxSchedulePoint(step=10, factor=1.0), AuxSchedulePoint(step=20, factor=0.0), AuxSchedulePoint(step=40, factor=0.5)]
    steps = [1, 10, 15, 19, 20, 30, 40, 1000]
    assert [schedule_factor(points, step) for step in steps] == pytest.approx([1.0, 1.0, 0.5, 0.1, 0.0, 0.25, 0.5, 0.5])


def test_without_points_nothing_changes():
    assert schedule_factor([], 7) == 1.0
