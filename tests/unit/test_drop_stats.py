"""Dropped assignments counted from maps, with padding slots, zero weights and padding tokens in them."""

import torch

from megatron_skywork.moe.drop_stats import count_dropped, drop_rate, load_share, routed_per_expert

ROUTED = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
# Expert 0 has room for two tokens: tokens 0 and 1 stay.
CAPACITY_MASK = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)


def test_counts():
    assert routed_per_expert(ROUTED).tolist() == [4, 2, 2]
    # token 2 and 3 at expert 0, token 3 at expert 2
    assert count_dropped(ROUTED, ROUTED & CAPACITY_MASK).item() == 3
    assert count_dropped(ROUTED, ROUTED).item() == 0


def test_padding_to_capacity_counts_the_same():
    assert not torch.equal(CAPACITY_MASK, ROUTED & CAPACITY_MASK)
    assert count_dropped(ROUTED, CAPACITY_MASK).item() == count_dropped(ROUTED, ROUTED & CAPACITY_MASK).item() == 3


def test_padding_tokens_are_not_counted():
    valid = torch.tensor([True, True, True, False])
    assert routed_per_expert(ROUTED, valid).tolist() == [3, 2, 1]
    assert count_dropped(ROUTED, CAPACITY_MASK, valid).item() == 1


def test_counts_stay_exact_where_fp32_would_not():
    assert routed_per_expert(ROUTED).dtype == torch.float64
    assert (torch.tensor(2.0**24 + 1, dtype=torch.float64) + count_dropped(ROUTED, CAPACITY_MASK)).item() == 2**24 + 4


def test_rates_and_shares():
    assert drop_rate(torch.tensor(3.0), torch.tensor(8.0)).item() == 0.375
    assert drop_rate(torch.tensor(0.0), torch.tensor(0.0)).item() == 0
    torch.testing.assert_close(load_share(torch.tensor([[4.0, 2.0, 2.0], [0.0, 0.0, 0.0]])), torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]))
