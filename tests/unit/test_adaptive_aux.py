"""Adaptive coefficients: the report's recursion, its steady state and its cap."""

import pytest
import torch

from megatron_skywork.moe.adaptive_aux import next_coefficient

REPORT = {"sensitivity": 0.2, "maximum": 0.01, "momentum": 0.99}
# Mean drop rates that the report's figures show (layers' mean early and late, layer 1, and one above the cap's 5 %).
DROP_RATES = [0.0093, 0.0037, 0.048, 0.2]


def test_one_step():
    assert next_coefficient(0.004, 0.03, sensitivity=0.2, maximum=0.01, momentum=0.9) == pytest.approx(0.9 * 0.004 + 0.1 * 0.006)
    assert next_coefficient(0.004, 0.5, sensitivity=0.2, maximum=0.01, momentum=0.9) == pytest.approx(0.9 * 0.004 + 0.1 * 0.01)


@pytest.mark.parametrize("drop_rate", DROP_RATES)
@pytest.mark.parametrize("first", [0.0, 0.01, 0.5])
def test_constant_drop_rate_converges(drop_rate, first):
    coefficient = first
    for _ in range(2000):
        coefficient = next_coefficient(coefficient, drop_rate, **REPORT)
    assert coefficient == pytest.approx(min(0.2 * drop_rate, 0.01), rel=1e-4)
    if 0.2 * drop_rate < 0.01:
        assert coefficient / drop_rate == pytest.approx(0.2, rel=1e-4)


def test_speed_of_the_average():
    coefficient = 0.01
    for _ in range(100):
        coefficient = next_coefficient(coefficient, 0.0, **REPORT)
    assert coefficient == pytest.approx(0.01 * 0.99**100)


def test_tensors_follow_the_floats_in_fp32():
    coefficients, rates = torch.full((4,), 0.01), torch.tensor(DROP_RATES, dtype=torch.float64)
    floats = [0.01] * 4
    for _ in range(300):
        coefficients = next_coefficient(coefficients, rates, **REPORT)
        floats = [next_coefficient(one, rate, **REPORT) for one, rate in zip(floats, DROP_RATES, strict=True)]
    assert coefficients.dtype == torch.float32
    torch.testing.assert_close(coefficients, torch.tensor(floats), rtol=2e-5, atol=0)
