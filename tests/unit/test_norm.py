"""RMSNorm: as exact as torch's own, with less kept for the backward."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_skywork.model.norm import RMSNorm, RMSNormFunction

SHAPES = [(50, 3, 64), (20, 3, 8, 16)]  # hidden states; queries with their heads


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, gradient = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    return [value.to(dtype) for value in (x, 1 + 0.1 * torch.randn(shape[-1], generator=generator), gradient)]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def run(function, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = function(x, weight, 1e-5)
        return [output, *torch.autograd.grad(output, [x, weight], gradient)]

    def theirs(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    values = _values(shape, dtype)
    exact = run(theirs, *(value.double() for value in values))
    for mine, other, expected in zip(run(RMSNormFunction.apply, *values), run(theirs, *values), exact, strict=True):
        assert mine.dtype == dtype and mine.shape == expected.shape
        # fp32 sums in another order may be a digit off; half precision is rounded once, at the end, in both.
        assert _error(mine, expected) <= (2e-7 if dtype is torch.float32 else 1.001 * _error(other, expected))


def test_gradients_are_the_derivatives() -> None:
    x, weight, _ = _values((4, 2, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: RMSNormFunction.apply(x, weight, 1e-5), (x.requires_grad_(), weight.requires_grad_()))


def test_only_the_input_the_weight_and_one_number_per_row_are_kept() -> None:
    kept: list[int] = []
    x, weight, _ = _values(SHAPES[0], torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        RMSNormFunction.apply(x.requires_grad_(), weight.requires_grad_(), 1e-5)
    assert sorted(kept) == [64, 150, 9600]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_built_as_megatron_core_builds_its_norms(sequence_parallel: bool) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=2, params_dtype=torch.bfloat16, bf16=True)
    config.sequence_parallel = sequence_parallel
    norm = RMSNorm(config, hidden_size=64, eps=1e-6)
    assert norm.weight.sequence_parallel is sequence_parallel and norm.weight.dtype == torch.bfloat16 and list(norm.state_dict()) == ["weight"]
    x, _, _ = _values(SHAPES[0], torch.bfloat16)
    assert torch.equal(norm(x), RMSNormFunction.apply(x, norm.weight, 1e-6))
