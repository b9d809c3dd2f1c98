"""Sample order is a function of (seed, index) and of nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_skywork.data.order import MAX_CYCLE, SampleOrder, blend_cycle, permute, whole_weights
from megatron_skywork.errors import DataError

BLENDS = [[1.0], [1, 1], [0.7, 0.2, 0.1], [7, 2, 1], [0.9, *[0.01] * 10], [1, 2, 3, 4, 5, 6, 7], [0.3333, 0.6667], [100, 1, 1, 1], [2.5] * 16]


@pytest.mark.parametrize("weights", BLENDS)
def test_every_prefix_of_a_blend_has_its_shares_to_within_one_sample(weights: list[float]) -> None:
    order = SampleOrder([50] * len(weights), weights, seed=3)
    n = 25_000
    dataset_N, _ = order.locate(np.arange(n))
    shares = np.array(weights) / sum(weights)
    counts_NK = np.cumsum(dataset_N[:, None] == np.arange(len(weights)), axis=0)
    errors_NK = counts_NK - np.arange(1, n + 1)[:, None] * shares
    bound = 0 if len(weights) == 1 else 1 - 1 / (2 * len(weights) - 2)
    assert np.abs(errors_NK).max() <= bound + 1e-6


def test_weights_become_whole_numbers() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([3.0]) == [1]
    assert whole_weights([0.5, 0.25]) == [2, 1]
    rounded = whole_weights([np.pi, 1.0, 1e-3])
    assert sum(rounded) == MAX_CYCLE
    assert np.abs(np.array(rounded) / MAX_CYCLE - np.array([np.pi, 1, 1e-3]) / (np.pi + 1 + 1e-3)).max() <= 1 / MAX_CYCLE
    with pytest.raises(DataError, match="smallest share"):
        whole_weights([1.0, 1e-9])


def test_the_cycle_ends_with_every_share_served() -> None:
    dataset_P, rank_P = blend_cycle((5, 3, 1))
    assert np.bincount(dataset_P).tolist() == [5, 3, 1]
    for d in range(3):
        assert rank_P[dataset_P == d].tolist() == list(range([5, 3, 1][d]))


def test_any_piece_is_the_same_piece_of_the_whole() -> None:
    order = SampleOrder([97, 13, 1], [0.6, 0.3, 0.1], seed=11)
    datasets, samples = order.locate(np.arange(5000))
    for begin, end in [(0, 1), (1, 2), (17, 400), (4999, 5000), (1234, 4321)]:
        again = SampleOrder([97, 13, 1], [0.6, 0.3, 0.1], seed=11).locate(np.arange(begin, end))
        assert (again[0] == datasets[begin:end]).all() and (again[1] == samples[begin:end]).all()
    backwards = order.locate(np.arange(4999, -1, -1))
    assert (backwards[1][::-1] == samples).all()


def test_epochs_are_different_permutations() -> None:
    sizes = [97, 40, 1]
    order = SampleOrder(sizes, [0.6, 0.3, 0.1], seed=11)
    datasets, samples = order.locate(np.arange(5000))
    for d, size in enumerate(sizes):
        walked = samples[datasets == d]
        epochs = [walked[begin : begin + size].tolist() for begin in range(0, len(walked) - size + 1, size)]
        assert len(epochs) > 5
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        if size > 1:
            assert all(first != second for first, second in itertools.pairwise(epochs))
            assert epochs[0] != list(range(size))


def test_seed_and_place_in_the_blend_change_the_order_and_not_the_blend() -> None:
    first, second = SampleOrder([60, 60], [1, 1], seed=1), SampleOrder([60, 60], [1, 1], seed=2)
    indices = np.arange(120)
    assert (first.locate(indices)[0] == second.locate(indices)[0]).all()
    assert (first.locate(indices)[1] != second.locate(indices)[1]).any()
    datasets, samples = first.locate(indices)
    assert (samples[datasets == 0] != samples[datasets == 1]).any()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 65537])
def test_permute_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_spreads_every_position_evenly() -> None:
    size, keys = 10, 4000
    images = np.stack([permute(np.arange(size), size, key) for key in range(keys)])
    for position in range(size):
        counts = np.bincount(images[:, position], minlength=size)
        assert np.abs(counts - keys / size).max() < 5 * np.sqrt(keys / size)
    # neighbours do not stay neighbours
    large = permute(np.arange(100_000), 100_000, 5)
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02


def test_a_far_index_needs_no_walk() -> None:
    order = SampleOrder([10**12, 3 * 10**9], [0.9, 0.1], seed=1)
    far = np.array([0, 10**15, 10**15 + 1, 2**62])
    datasets, samples = order.locate(far)
    assert ((samples >= 0) & (samples < np.array([10**12, 3 * 10**9])[datasets])).all()


def test_the_order_is_the_one_runs_were_started_with() -> None:
    """Another order under the same seed would make a resumed run repeat and skip samples; change these numbers only with that in mind."""
    datasets, samples = SampleOrder([1000, 50], [0.75, 0.25], seed=1234).locate([0, 1, 2, 3, 4, 5, 4000])
    assert datasets.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert samples.tolist() == [796, 625, 25, 893, 706, 864, 14]
