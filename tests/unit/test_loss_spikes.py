"""Loss spikes: the score by hand, a window that spikes do not move, a level that stays, and a state that is plain JSON."""

from __future__ import annotations

import json
import random

import pytest

from megatron_skywork.config.schema import Spikes
from megatron_skywork.train.loss_spikes import LossWindow, spike_score


def observed(window: LossWindow, losses: list[float]) -> list[int]:
    """Which of the losses were spikes, by position."""
    return [place for place, loss in enumerate(losses) if window.observe(loss) is not None]


def noise(count: int, level: float = 3.0, deviation: float = 0.02, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, deviation) for _ in range(count)]


def test_the_score_is_that_of_iglewicz_and_hoaglin():
    # Median 3, distances 2 1 0 1 2, so MAD 1; 0.6745 (10 - 3) / 1 is their score.
    median, score = spike_score(10.0, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert median == 3.0 and score == pytest.approx(0.6745 * 7, rel=1e-4)
    # Three fifths of the window may be anything but its middle: a mean would be 200 here.
    assert spike_score(10.0, [2.0, 3.0, 4.0, 5.0, 1000.0]) == pytest.approx((4.0, 6 / 1.4826))


def test_a_score_is_that_many_standard_deviations_of_normal_losses():
    _, score = spike_score(3.0 + 5 * 0.02, noise(20_000))
    assert score == pytest.approx(5, rel=0.03)


def test_spikes_are_found_and_nothing_else_is():
    losses = noise(400)
    for place in (100, 101, 102, 250):
        losses[place] += 1.0
    assert observed(LossWindow(Spikes()), losses) == [100, 101, 102, 250]
    assert observed(LossWindow(Spikes(policy="off")), losses) == []
    falling = [8.0 - 5.0 * min(1.0, step / 200) + noise_ for step, noise_ in enumerate(noise(400, 0.0))]
    assert observed(LossWindow(Spikes()), falling) == []
    # Equal to the last digit, and one in a thousand more.
    assert observed(LossWindow(Spikes()), [2.0] * 100 + [2.002, 2.0, 2.5]) == [102]


def test_no_verdict_before_the_window_holds_enough():
    losses = [*noise(40), 9.0]
    assert observed(LossWindow(Spikes(minimum_steps=40)), losses) == [40]
    assert observed(LossWindow(Spikes(minimum_steps=41)), losses) == []


def test_a_level_that_stays_is_accepted_when_it_fills_half_of_the_window():
    spikes = observed(LossWindow(Spikes(window=64)), noise(100) + noise(200, level=4.0, seed=1))
    assert spikes[0] == 100 and len(spikes) <= 32 and max(spikes) < 132


def test_the_window_goes_on_from_its_state():
    losses = [*noise(60), 5.0, *noise(20, seed=2), 4.0]
    whole, halves = LossWindow(Spikes(window=48)), LossWindow(Spikes(window=48))
    expected = [whole.observe(loss) for loss in losses]
    found = [halves.observe(loss) for loss in losses[:70]]
    again = LossWindow(Spikes(window=48))
    again.load_state_dict(json.loads(json.dumps(halves.state_dict())))
    assert found + [again.observe(loss) for loss in losses[70:]] == expected and again.state_dict() == whole.state_dict()
    shorter = LossWindow(Spikes(window=40, minimum_steps=40))
    shorter.load_state_dict(whole.state_dict())
    assert shorter.state_dict()["losses"] == losses[-40:]
