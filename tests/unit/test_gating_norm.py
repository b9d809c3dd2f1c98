"""Gate-logit normalization: values, gradients, and the inputs that would break a division by the deviation."""

import pytest
import torch

from megatron_skywork.moe.gating_norm import normalize_logits


def _by_hand(logits, scale, eps, unbiased):
    rows = []
    for row in logits.double().tolist():
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / (len(row) - int(unbiased))
        rows.append([scale * (value - mean) / (variance + eps) ** 0.5 for value in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_values(scale, unbiased):
    logits = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 5
    expected = _by_hand(logits, scale, 1e-3, unbiased)
    torch.testing.assert_close(normalize_logits(logits, scale, 1e-3, unbiased=unbiased), expected)
    torch.testing.assert_close(normalize_logits(logits.float(), scale, 1e-3, unbiased=unbiased), expected.float(), rtol=1e-5, atol=1e-6)


def test_rows_have_the_deviation_that_was_asked_for():
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.1], [1.0], [10.0], [100.0], [1e4]])
    normalized = normalize_logits(logits, 2.0, 1e-12)
    torch.testing.assert_close(normalized.std(dim=-1), torch.full((5,), 2.0))
    torch.testing.assert_close(normalized.mean(dim=-1), torch.zeros(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_gradcheck(eps, unbiased):
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: normalize_logits(z, 1.7, eps, unbiased=unbiased), (logits,))


def test_gradient_equals_autograd_of_the_formula():
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weights = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    (ours,) = torch.autograd.grad((normalize_logits(logits, 0.5) * weights).sum(), logits)
    plain = 0.5 * (logits - logits.mean(-1, keepdim=True)) / (logits.var(-1, keepdim=True) + 1e-6).sqrt()
    (reference,) = torch.autograd.grad((plain * weights).sum(), logits)
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e6])
@pytest.mark.parametrize("experts", [2, 7, 16])
def test_equal_logits_give_zeros_and_finite_gradients(value, experts):
    logits = torch.full((3, experts), value, requires_grad=True)
    normalized = normalize_logits(logits)
    assert torch.equal(normalized, torch.zeros(3, experts))
    weights = torch.arange(experts, dtype=torch.float32).expand(3, experts)
    (normalized * weights).sum().backward()
    assert torch.isfinite(logits.grad).all()
    # d z~ / d z at equal logits is (identity - mean) / sqrt(eps)
    torch.testing.assert_close(logits.grad, (weights - weights.mean(-1, keepdim=True)) * 1e3)


def test_order_is_kept():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(normalize_logits(logits, 0.5).argsort(dim=-1), logits.argsort(dim=-1))


def test_low_precision_logits_are_computed_in_fp32():
    logits = (torch.randn(8, 16, generator=torch.Generator().manual_seed(6)) + 300).bfloat16().requires_grad_()
    normalized = normalize_logits(logits)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, normalize_logits(logits.float()))
    normalized.square().sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and torch.isfinite(logits.grad).all()


def test_huge_logits_stay_finite():
    assert torch.isfinite(normalize_logits(torch.tensor([[1e30, -1e30, 0.0, 5.0]]))).all()


def test_keeps_one_matrix_for_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        normalize_logits(torch.randn(10, 4, requires_grad=True))
    assert sorted(kept) == [(10, 1), (10, 4)]


@pytest.mark.parametrize("arguments", [{"eps": 0.0}, {"scale": 0.0}])
def test_meaningless_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="above 0"):
        normalize_logits(torch.randn(2, 4), **arguments)
    with pytest.raises(ValueError, match="at least 2 experts"):
        normalize_logits(torch.randn(2, 1))
