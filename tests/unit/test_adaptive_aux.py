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


# Read off the report's figure 4: mean drop rate and mean coefficient of a layer over a stretch of training long against 1 / (1 - momentum) steps.
FIGURE_4 = {
    "layer 1, 20-50B": (0.02254, 0.00425), "layer 1, 500-600B": (0.02156, 0.00428), "layer 1, 900-1000B": (0.01709, 0.00342),
    "layer 2, 250-300B": (0.01443, 0.00285), "layer 2, 500-600B": (0.01134, 0.00226), "layer 2, 900-1000B": (0.00735, 0.00147),
    "layer 10, 20-50B": (0.00589, 0.00114), "layer 10, 500-600B": (0.00286, 0.00057), "layer 10, 900-1000B": (0.00194, 0.00039),
    "layer 27, 100-200B": (0.00266, 0.00053), "layer 27, 900-1000B": (0.00227, 0.00045),
    "layer 52, 20-50B": (0.0094, 0.00188), "layer 52, 900-1000B": (0.00818, 0.00164),
}  # fmt: skip


@pytest.mark.parametrize("place", FIGURE_4)
def test_the_reports_coefficients_follow_from_its_drop_rates(place):
    drop_rate, published = FIGURE_4[place]
    coefficient = 0.01
    for _ in range(1000):
        coefficient = next_coefficient(coefficient, drop_rate, **REPORT)
    assert coefficient == pytest.approx(published, rel=0.07)
    assert coefficient / drop_rate == pytest.approx(0.2, rel=0.02)


def test_the_cap_shows_where_the_report_shows_it():
    """Layer 1 over 250-300B: the drop rate swings around 4.8 %, its upper half is cut off at 5 %, and the mean coefficient stays below 0.2 of the mean rate."""
    coefficient, seen = 0.01, []
    for step in range(3000):
        drop_rate = 0.04789 + (0.04 if step // 250 % 2 else -0.04)
        coefficient = next_coefficient(coefficient, drop_rate, **REPORT)
        seen.append(coefficient)
    assert max(seen) <= 0.01 and sum(seen[500:]) / 2500 < 0.2 * 0.04789 - 0.001
