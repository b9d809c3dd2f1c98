"""The hash of a tensor's bits finds every flip of one bit, and the vote over hashes names whom it can."""

from __future__ import annotations

import pytest
import torch

from megatron_skywork.train.nonfinite import made_here
from megatron_skywork.train.replicas import Suspect, checksum, described, odd_ones, odd_weights

_INTEGERS = {2: torch.int16, 4: torch.int32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_flip_of_one_bit_is_found(dtype: torch.dtype) -> None:
    tensor = torch.randn(23, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = odd_weights(8, tensor.device)  # three pieces, the last one short
    whole, bits = checksum(tensor, weights), tensor.view(_INTEGERS[tensor.element_size()])
    seen = {int(whole)}
    for place in range(23):
        for bit in range(8 * tensor.element_size()):
            flip = 1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit)
            bits[place] ^= flip
            seen.add(int(checksum(tensor, weights)))
            bits[place] ^= flip
    assert len(seen) == 1 + 23 * 8 * tensor.element_size() and checksum(tensor, weights) == whole


def test_what_changes_several_elements_is_found_too() -> None:
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    weights = odd_weights(1024, tensor.device)
    hashes = {int(checksum(tensor, weights))}
    for first, second in ((0, 1), (0, 1024), (7, 4999), (2048, 3072)):  # the same place of two pieces as well
        swapped = tensor.clone()
        swapped[[first, second]] = swapped[[second, first]]
        flipped = tensor.clone()
        flipped[[first, second]] *= -1
        hashes |= {int(checksum(swapped, weights)), int(checksum(flipped, weights))}
    hashes |= {int(checksum(tensor.roll(1), weights)), int(checksum(tensor + 0.1, weights)), int(checksum(torch.zeros(5000), weights))}
    assert len(hashes) == 1 + 2 * 4 + 3
    assert checksum(torch.zeros(3), weights) != checksum(-torch.zeros(3), weights) and int(checksum(tensor.view(50, 100), weights)) in hashes


def test_weights_are_odd_and_differ() -> None:
    weights = odd_weights(2**18, torch.device("cpu"))
    assert bool((weights & 1).all()) and weights.unique().numel() == 2**18
    # Each bit above the lowest is set in half of them.
    shares = torch.stack([(weights >> bit & 1).double().mean() for bit in range(1, 64)])
    assert bool((shares - 0.5).abs().max() < 0.01)


def test_the_vote() -> None:
    assert odd_ones([5, 5, 5]) == [] and odd_ones([5]) == []
    assert odd_ones([5, 5, 6, 5]) == [2] and odd_ones([7, 5, 5, 6, 5]) == [0, 3]
    assert odd_ones([5, 6]) == [0, 1] and odd_ones([5, 5, 6, 6]) == [0, 1, 2, 3] and odd_ones([1, 2, 3]) == [0, 1, 2]


def test_suspects_in_words() -> None:
    one = Suspect(3, "b", outvoted=True, num_tensors=2, first=["norm", "gate"])
    assert described([Suspect(1, "a", False, 1, ["x"]), one]) == "rank 3 on b differs from the majority in 2 tensors, first norm"
    assert "ranks 0 on a and 1 on a hold copies that differ, and no majority" in described([Suspect(rank, "a", False, 1, ["x"]) for rank in (0, 1)])


def test_where_a_value_that_is_not_finite_began() -> None:
    # Parameter 4: rank 2 added it, the sum lies in rank 0's shard. Parameter 7: nobody has it outside, so rank 1 made it within its own shard.
    outside: list[set[int]] = [set(), set(), {4}]
    inside: list[set[int]] = [{4}, {7}, set()]
    assert [made_here(outside, inside, rank) for rank in range(3)] == [set(), {7}, {4}]
