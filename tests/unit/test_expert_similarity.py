"""The mean cosine between experts against the definition, pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_skywork.moe.expert_similarity import local_experts, mean_pairwise_cosine


def _experts(count: int, alike: float, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Experts of two matrices with a common part, so that their similarity is between 0 and 1."""
    generator = torch.Generator().manual_seed(count)
    common = [torch.randn(shape, generator=generator) for shape in ((12, 7), (7, 6))]
    return [[(alike * part + torch.randn(part.shape, generator=generator)).to(dtype) for part in common] for _ in range(count)]


def _by_pairs(experts: list[list[torch.Tensor]]) -> float:
    flat = [torch.cat([tensor.double().flatten() for tensor in expert]) for expert in experts]
    cosines = [float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0 for a, b in itertools.combinations(flat, 2)]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "alike"), [(2, 1.0), (5, 0.0), (16, 3.0)])
def test_it_is_the_mean_over_pairs(count: int, alike: float, dtype: torch.dtype) -> None:
    experts = _experts(count, alike, dtype)
    expected = _by_pairs(experts)
    for chunk_numbers in (5, 42, 1 << 20):
        found = mean_pairwise_cosine(experts, chunk_numbers=chunk_numbers)
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_have_similarity_one_however_large_they_are(dtype: torch.dtype) -> None:
    """A norm accumulated in fp32 over this many numbers is wrong in the fifth digit."""
    expert = [(torch.randn(3_000_000, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)]
    assert float(mean_pairwise_cosine([expert] * 3, chunk_numbers=1 << 20)) == pytest.approx(1.0, abs=1e-6)


def test_scale_does_not_matter_and_opposites_are_minus_one() -> None:
    expert = _experts(2, 0.0)[0]
    assert float(mean_pairwise_cosine([expert, [1e-3 * tensor for tensor in expert]])) == pytest.approx(1.0, abs=1e-6)
    assert float(mean_pairwise_cosine([expert, [-2 * tensor for tensor in expert]])) == pytest.approx(-1.0, abs=1e-6)


def test_a_zero_expert_is_orthogonal_to_all() -> None:
    expert = _experts(2, 0.0)[0]
    zero = [torch.zeros_like(tensor) for tensor in expert]
    assert float(mean_pairwise_cosine([expert, zero, expert])) == pytest.approx(1 / 3, abs=1e-6)
    assert float(mean_pairwise_cosine([zero, zero])) == 0.0


def test_what_has_no_pairs_or_no_common_shape_is_refused() -> None:
    expert = _experts(2, 0.0)[0]
    with pytest.raises(ValueError, match="no pairs"):
        mean_pairwise_cosine([expert])
    with pytest.raises(ValueError, match="different shapes"):
        mean_pairwise_cosine([expert, expert[::-1]])


class _Stacked(torch.nn.Module):
    """Parameter names of GroupedExperts."""

    def __init__(self, count: int):
        super().__init__()
        self.weight1, self.weight2 = torch.nn.Parameter(torch.randn(count, 6, 2)), torch.nn.Parameter(torch.randn(count, 2, 3))


class _OneByOne(torch.nn.Module):
    """Parameter names of megatron-core's TEGroupedMLP."""

    def __init__(self, count: int):
        super().__init__()
        for matrix in ("linear_fc1", "linear_fc2"):
            linear = torch.nn.Module()
            for expert in range(count):
                linear.register_parameter(f"weight{expert}", torch.nn.Parameter(torch.full((2, 3), float(expert))))
            self.add_module(matrix, linear)


def test_both_expert_classes_are_taken_apart() -> None:
    stacked = _Stacked(12)
    found = local_experts(stacked)
    assert len(found) == 12
    for index, expert in enumerate(found):
        assert len(expert) == 2 and torch.equal(expert[0], stacked.weight1[index]) and torch.equal(expert[1], stacked.weight2[index])
    one_by_one = local_experts(_OneByOne(12))
    assert [[float(tensor.detach().mean()) for tensor in expert] for expert in one_by_one] == [[float(expert)] * 2 for expert in range(12)]


def test_a_parameter_of_unknown_experts_is_refused() -> None:
    unknown = _OneByOne(2)
    unknown.linear_fc1.register_parameter("weight", torch.nn.Parameter(torch.zeros(2, 2, 3)))
    with pytest.raises(ValueError, match=r"_OneByOne\.linear_fc1\.weight does not say whose"):
        local_experts(unknown)
