"""Router health numbers at known gates and loads."""

import math

import pytest
import torch

from megatron_skywork.moe.router_health import LARGEST_RATIO, gate_entropy, gate_ratios, summarize_load


def test_entropy():
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]])
    expected = [math.log(4), 0.0, math.log(2), -(0.7 * math.log(0.7) + 0.3 * math.log(0.1))]
    torch.testing.assert_close(gate_entropy(probs), torch.tensor(expected))


def test_ratios():
    first, second = gate_ratios(torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    torch.testing.assert_close(first, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(second, torch.tensor([3.0, 1.0]))


def test_ratios_of_a_certain_gate_are_finite():
    first, second = gate_ratios(torch.tensor([[1.0, 0.0, 0.0]]))
    assert first.item() == LARGEST_RATIO and second.item() == 1.0


def test_ratios_of_two_experts():
    first, second = gate_ratios(torch.tensor([[0.2, 0.8]]))
    assert first.item() == pytest.approx(4.0) and second.item() == 1.0


def test_load_summary():
    summary = summarize_load(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.2990, 0.0010]]))
    torch.testing.assert_close(summary.max_over_mean, torch.tensor([1.0, 2.0, 4.0, 1.6]))
    torch.testing.assert_close(summary.variation[:3], torch.tensor([0.0, 1.0, math.sqrt(3)]))
    assert summary.is_dead.sum(dim=-1).tolist() == [0, 2, 3, 1] and summary.is_dead[3].tolist() == [False, False, False, True]
    # Of load / even share: [0, 0, 2, 2] and [0, 0, 0, 4].
    torch.testing.assert_close(summary.percentiles[:, 1:3], torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 2.8]]))
