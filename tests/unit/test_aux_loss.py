"""The two load-balancing losses against loops over their definitions."""

import pytest
import torch

from megatron_skywork.moe.aux_loss import report_aux_loss, report_from_means, switch_aux_loss, switch_from_means


def _gate(tokens=12, experts=5, seed=0):
    return torch.softmax(torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _top(probs, topk):
    return torch.zeros_like(probs, dtype=torch.bool).scatter(1, probs.topk(topk, dim=1).indices, True)


def test_report_loss_is_equation_four():
    probs = _gate()
    tokens, experts = probs.shape
    expected = sum((1 / experts - sum(probs[i, j].item() for i in range(tokens)) / tokens) ** 2 for j in range(experts))
    assert report_aux_loss(probs).item() == pytest.approx(expected, rel=1e-12)


def test_report_loss_at_its_ends():
    assert report_aux_loss(torch.full((6, 4), 0.25)).item() == 0
    one_expert = torch.zeros(6, 4)
    one_expert[:, 2] = 1
    assert report_aux_loss(one_expert).item() == pytest.approx(1 - 1 / 4)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_switch_loss_is_its_definition(topk):
    probs = _gate(seed=1)
    routing_map = _top(probs, topk)
    tokens, experts = probs.shape
    expected = 0.0
    for j in range(experts):
        share = sum(bool(routing_map[i, j]) for i in range(tokens)) / (tokens * topk)
        expected += experts * share * sum(probs[i, j].item() for i in range(tokens)) / tokens
    assert switch_aux_loss(probs, routing_map, topk).item() == pytest.approx(expected, rel=1e-12)


def test_switch_loss_of_an_even_load_is_one():
    probs = torch.full((4, 4), 0.25)
    assert switch_aux_loss(probs, torch.eye(4, dtype=torch.bool), 1).item() == pytest.approx(1.0)


def test_gradients():
    probs = _gate(seed=2).requires_grad_()
    tokens, experts = probs.shape
    routing_map = _top(probs.detach(), 2)
    (report,) = torch.autograd.grad(report_aux_loss(probs), probs)
    torch.testing.assert_close(report, (-2 / tokens * (1 / experts - probs.detach().mean(0))).expand(tokens, experts))
    (switch,) = torch.autograd.grad(switch_aux_loss(probs, routing_map, 2), probs)
    torch.testing.assert_close(switch, (experts * routing_map.double().mean(0) / 2 / tokens).expand(tokens, experts))


def test_means_of_parts_give_the_loss_of_the_whole():
    probs = _gate(tokens=16, seed=3)
    routing_map = _top(probs, 2)
    halves = probs.view(2, 8, 5).mean(1).mean(0)
    torch.testing.assert_close(report_from_means(halves), report_aux_loss(probs))
    load = routing_map.double().sum(0) / 32
    torch.testing.assert_close(switch_from_means(halves, load), switch_aux_loss(probs, routing_map, 2))
