"""Which assignments an overfull expert keeps."""

import pytest
import torch

from megatron_skywork.moe.capacity import by_position, by_rank, drop_priority, slots
from megatron_skywork.parallel import sequence_part


def _routed(tokens=40, experts=6, topk=2, seed=0):
    probs = torch.softmax(torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)), dim=-1)
    routed = torch.zeros_like(probs, dtype=torch.bool).scatter(1, probs.topk(topk, dim=-1).indices, True)
    return probs * routed, routed


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [1, 5, 13, 39, 40, 100])
def test_every_expert_keeps_its_first(policy, capacity):
    probs, routed = _routed()
    taken = slots(drop_priority(probs, routed, policy), capacity)
    for expert in range(6):
        wanting = [token for token in range(40) if routed[token, expert]]
        if policy == "probs":
            wanting.sort(key=lambda token: -probs[token, expert].item())
        assert {token for token in range(40) if (taken & routed)[token, expert]} == set(wanting[:capacity])
    assert taken.sum(dim=0).tolist() == [min(capacity, 40)] * 6, "padding needs exactly as many slots as there are"


def test_ties_go_to_the_earlier_token():
    probs = torch.full((1000, 1), 0.5)
    taken = slots(drop_priority(probs, torch.ones_like(probs, dtype=torch.bool), "probs"), 300)
    assert taken[:300].all() and not taken[300:].any()


def test_a_weight_of_zero_comes_before_tokens_that_did_not_choose_the_expert():
    probs, routed = torch.tensor([[0.9], [0.0], [0.0], [0.8]]), torch.tensor([[True], [False], [True], [True]])
    assert slots(drop_priority(probs, routed, "probs"), 3).squeeze(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_padding_tokens_take_no_slot_from_others(policy):
    probs, routed = torch.tensor([[0.9], [0.3], [0.2], [0.1]]), torch.tensor([[True], [True], [True], [False]])
    valid = torch.tensor([False, True, True, True])
    for capacity, expected in ((2, [False, True, True, False]), (3, [True, True, True, False])):
        assert slots(drop_priority(probs, routed, policy, valid), capacity).squeeze(1).tolist() == expected


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="'random'"):
        drop_priority(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), "random")


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_rows_of_ranks_are_put_in_the_order_of_the_sequence(cp_size, tp_size):
    positions_SB = torch.arange(2 * cp_size * tp_size * 3 * 2).reshape(-1, 2)  # two sequences of a micro-batch, as the router flattens them
    parts = [sequence_part(positions_SB.t(), rank, cp_size).t().chunk(tp_size) for rank in range(cp_size)]
    ranked = torch.cat([piece.flatten() for part in parts for piece in part]).unsqueeze(1)
    assert by_position(ranked, cp_size).squeeze(1).tolist() == list(range(positions_SB.numel()))
    assert torch.equal(by_rank(by_position(ranked, cp_size), cp_size), ranked)
