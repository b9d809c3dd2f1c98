"""First weights of a router: sizes, angles, centroids found again, and texts that say nothing refused."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_skywork.convert.upcycling.methods import router_init
from megatron_skywork.convert.upcycling.methods.seeds import generator
from megatron_skywork.errors import DataError


def root_mean_square(rows_EH: torch.Tensor) -> float:
    return rows_EH.double().square().mean().sqrt().item()


def clusters(sizes: list[int], hidden: int = 32, spread: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens around as many far centres as there are sizes, in mixed order, and the number of each one's centre."""
    draw = torch.Generator().manual_seed(len(sizes))
    centres_EH = torch.randn(len(sizes), hidden, generator=draw) * 3 + 1
    group_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[torch.randperm(sum(sizes), generator=draw)]
    return (centres_EH[group_T] + spread * torch.randn(sum(sizes), hidden, generator=draw)).to(dtype), group_T


def test_normal_and_zero() -> None:
    rows_EH = router_init.normal(64, 512, 0.01, generator(1))
    assert rows_EH.dtype == torch.float32 and rows_EH.shape == (64, 512)
    assert rows_EH.std().item() == pytest.approx(0.01, rel=0.02) and abs(rows_EH.mean().item()) < 3e-4
    assert torch.equal(rows_EH, router_init.normal(64, 512, 0.01, generator(1)))
    assert not torch.equal(rows_EH, router_init.normal(64, 512, 0.01, generator(2)))
    assert torch.equal(router_init.zero(4, 6), torch.zeros(4, 6))


@pytest.mark.parametrize(("num_rows", "hidden"), [(1, 16), (8, 64), (48, 48), (100, 30), (7, 3)])
def test_orthogonal_rows_have_one_length_and_right_angles(num_rows: int, hidden: int) -> None:
    rows_EH = router_init.orthogonal(num_rows, hidden, 0.02, generator(1))
    assert rows_EH.dtype == torch.float32 and rows_EH.shape == (num_rows, hidden)
    assert root_mean_square(rows_EH) == pytest.approx(0.02, rel=1e-6)
    for block_EH in rows_EH.double().split(hidden):
        gram = block_EH @ block_EH.T / (0.02**2 * hidden)
        assert torch.allclose(gram, torch.eye(len(block_EH), dtype=torch.float64), atol=1e-6)
    assert not torch.equal(rows_EH, router_init.orthogonal(num_rows, hidden, 0.02, generator(2)))


def test_orthogonal_directions_are_random() -> None:
    """No coordinate is preferred, as it would be by the identity or by a factorization's fixed signs."""
    first_SH = torch.stack([router_init.orthogonal(4, 8, 1.0, generator(seed))[0] for seed in range(400)])
    assert first_SH.mean(0).abs().max() < 4 / math.sqrt(400)
    assert (first_SH.square().mean(0) - 1).abs().max() < 0.35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clusters_are_found_whatever_their_sizes(dtype: torch.dtype) -> None:
    hidden_TH, group_T = clusters([900, 30, 200, 4, 60, 1500], spread=0.01, dtype=dtype)
    rows_EH = router_init.from_hidden(hidden_TH, 6, 0.01, generator(1))
    assert rows_EH.dtype == torch.float32 and rows_EH.shape == (6, 32)
    assert rows_EH.double().mean(0).abs().max() < 1e-8
    assert root_mean_square(rows_EH) == pytest.approx(0.01, rel=1e-6)
    centroids = torch.stack([hidden_TH[group_T == number].double().mean(0) for number in range(6)])
    expected_EH = centroids - centroids.mean(0)
    expected_EH *= 0.01 / root_mean_square(expected_EH)
    # The order of the rows is k-means++'s.
    nearest = torch.cdist(expected_EH, rows_EH.double()).min(1)
    assert sorted(nearest.indices.tolist()) == list(range(6)) and nearest.values.max() < 1e-6


def cost(hidden_TH: torch.Tensor, centroids_EH: torch.Tensor) -> float:
    """What k-means makes small: the mean squared distance from the nearest centroid."""
    return torch.cdist(hidden_TH.double(), centroids_EH).min(1).values.square().mean().item()


def test_centroids_are_the_means_of_their_tokens() -> None:
    hidden_TH, _ = clusters([700, 900, 1200], hidden=4, spread=2.0)
    start_EH = router_init.centroids(hidden_TH, 5, generator(1), rounds=0)
    assert all((hidden_TH == row_H.float()).all(1).any() for row_H in start_EH)
    found_EH = router_init.centroids(hidden_TH, 5, generator(1), rounds=500)
    nearest_T = torch.cdist(hidden_TH.double(), found_EH).argmin(1)
    means_EH = torch.stack([hidden_TH[nearest_T == number].double().mean(0) for number in range(5)])
    assert torch.allclose(found_EH, means_EH, rtol=0, atol=1e-9)
    assert cost(hidden_TH, found_EH) < 0.9 * cost(hidden_TH, start_EH)


def test_the_start_spreads_out() -> None:
    """k-means++ misses none of 12 far and equal clusters; 12 tokens at random would miss four."""
    hidden_TH, group_T = clusters([100] * 12)
    for seed in range(5):
        start_EH = router_init.centroids(hidden_TH, 12, generator(seed), rounds=0)
        assert len(set(group_T[torch.cdist(start_EH, hidden_TH.double()).argmin(1)].tolist())) == 12


def test_a_row_depends_on_the_seed_and_not_on_what_all_tokens_share() -> None:
    hidden_TH, _ = clusters([400, 300, 500], spread=4.0)
    rows_EH = router_init.from_hidden(hidden_TH, 5, 1.0, generator(1))
    assert torch.equal(rows_EH, router_init.from_hidden(hidden_TH, 5, 1.0, generator(1)))
    assert not torch.equal(rows_EH, router_init.from_hidden(hidden_TH, 5, 1.0, generator(2)))
    assert torch.allclose(rows_EH, router_init.from_hidden(hidden_TH + 7.0, 5, 1.0, generator(1)), atol=1e-4)


def test_an_empty_cluster_takes_the_farthest_token_of_one_that_can_spare_it() -> None:
    nearest_T = torch.tensor([0, 0, 0, 2, 2, 4])
    distance_T = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0, 9.0])
    router_init._fill_empty(nearest_T, distance_T, 5)
    # Token 5 is farthest, and the only one of its centroid; then token 1 and token 4 are.
    assert nearest_T.tolist() == [0, 1, 0, 2, 3, 4]


def test_a_centroid_that_no_token_is_near_is_set_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TH, _ = clusters([100, 100], spread=0.01)
    far_EH = torch.stack([hidden_TH[0], hidden_TH[0] + 1e4]).double()
    monkeypatch.setattr(router_init, "_spread_start", lambda *_: far_EH)
    found_EH = router_init.centroids(hidden_TH, 2, generator(1))
    assert cost(hidden_TH, far_EH) > 100 and cost(hidden_TH, found_EH) < 0.01


def test_as_many_tokens_as_rows_are_the_rows() -> None:
    hidden_TH = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    rows_EH = router_init.centroids(hidden_TH, 3, generator(1))
    assert sorted(rows_EH.tolist()) == [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("different", [0, 1, 2])
@pytest.mark.parametrize("hidden", [2, 301])
def test_fewer_different_tokens_than_rows_are_refused(different: int, hidden: int) -> None:
    hidden_TH = torch.randn(different, hidden, generator=torch.Generator().manual_seed(1)).repeat(20, 1)
    with pytest.raises(DataError, match=f"gives {different} different hidden states, and 3 experts"):
        router_init.from_hidden(hidden_TH, 3, 0.01, generator(1))


def test_texts_give_their_mean_states_whatever_their_length() -> None:
    draw = torch.Generator().manual_seed(1)
    texts = [(torch.randn(length, 16, generator=draw) + torch.randn(16, generator=draw)).bfloat16() for length in (3, 2000, 1)]
    rows_EH = router_init.from_texts(texts, 0.01)
    assert rows_EH.dtype == torch.float32 and root_mean_square(rows_EH) == pytest.approx(0.01, rel=1e-6)
    assert rows_EH.double().mean(0).abs().max() < 1e-8
    unit_EH = torch.nn.functional.normalize(torch.stack([text.double().mean(0) for text in texts]), dim=1)
    expected_EH = unit_EH - unit_EH.mean(0)
    assert torch.allclose(rows_EH.double(), expected_EH * (0.01 / root_mean_square(expected_EH)), atol=1e-8)
    # A text's own states get its own expert, and a louder text is no more wanted than a quiet one.
    assert (unit_EH @ rows_EH.double().T).argmax(1).tolist() == [0, 1, 2]
    assert torch.allclose(rows_EH, router_init.from_texts([texts[0] * 4, *texts[1:]], 0.01), atol=1e-8)


def test_texts_that_say_nothing_are_refused() -> None:
    text = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    with pytest.raises(DataError, match="number 2 has no tokens"):
        router_init.from_texts([text, text[:0]], 0.01)
    with pytest.raises(DataError, match="2 texts give the router the same hidden state"):
        router_init.from_texts([text, text.flip(0)], 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_states_are_refused(bad: float) -> None:
    text = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    damaged = text.clone()
    damaged[3, 2] = bad
    with pytest.raises(DataError, match="number 2 hold NaN or infinite"):
        router_init.from_texts([text, damaged], 0.01)
    with pytest.raises(DataError, match="NaN or infinite"):
        router_init.from_hidden(damaged, 2, 0.01, generator(1))
