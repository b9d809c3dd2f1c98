"""AdamW over lists: torch's numbers in fp32; in bf16 the same update rounded, in pieces of any size, and the limit above which moments no longer move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_skywork.config.schema import LARGEST_BETA_BF16, Optim
from megatron_skywork.optim import adamw
from megatron_skywork.optim.adamw import FusedAdamW

SHAPES = [(5, 3), (11,), (2, 2), (1,)]


def parameters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0}]


def trained(moments: torch.dtype, steps: int = 5, **settings: Any) -> tuple[list[Tensor], FusedAdamW]:
    params = parameters()
    gradients = {param: torch.empty_like(param) for param in params}
    optimizer = FusedAdamW(groups(params), lr=0.01, betas=(0.9, 0.95), **settings)
    optimizer.allocate(gradients, moments)
    go_on(optimizer, gradients, range(steps))
    return params, optimizer


def go_on(optimizer: FusedAdamW, gradients: dict[Tensor, Tensor], steps: range) -> None:
    for step in steps:
        for gradient, value in zip(gradients.values(), parameters(seed=1 + step), strict=True):
            gradient.copy_(value)
        optimizer.step()


def test_fp32_is_torch_s_adamw():
    expected = parameters()
    reference = torch.optim.AdamW(groups(expected), lr=0.01, betas=(0.9, 0.95), fused=True)
    for step in range(5):
        for param, value in zip(expected, parameters(seed=1 + step), strict=True):
            param.grad = value
        reference.step()
    found, _ = trained(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bf16_moments_are_the_fp32_update_rounded_to_nearest():
    """By the formulas, in fp64 between roundings; the kernel's fp32 differs from that by far less than bf16's spacing, so all but ties agree."""
    params, optimizer = trained(torch.bfloat16, steps=3)
    for number, param in enumerate(params):
        m, v = (torch.zeros_like(param, dtype=torch.bfloat16) for _ in range(2))
        for step in range(3):
            gradient = parameters(seed=1 + step)[number].double()
            m = (0.9 * m.double() + 0.1 * gradient).to(torch.bfloat16)
            v = (0.95 * v.double() + 0.05 * gradient.square()).to(torch.bfloat16)
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert torch.equal(state["exp_avg"], m) and torch.equal(state["exp_avg_sq"], v)


@pytest.mark.parametrize("numel", [1, 4, 7, 15, 16, 100])
def test_the_size_of_pieces_does_not_show(monkeypatch: pytest.MonkeyPatch, numel: int):
    expected, _ = trained(torch.bfloat16)
    monkeypatch.setattr(adamw, "PIECE_NUMEL", numel)
    found, optimizer = trained(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert optimizer._scratch is not None and optimizer._scratch.numel() == 2 * numel
    assert max(sum(tensor.numel() for tensor in piece.params) for pieces in optimizer._pieces or [] for piece in pieces) <= numel


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_as_if_never_saved(moments: torch.dtype):
    expected, whole = trained(moments, steps=5)
    _, first = trained(moments, steps=3)
    saved = first.state_dict()
    params = [param.clone() for group in first.param_groups for param in group["params"]]
    gradients = {param: torch.empty_like(param) for param in params}
    second = FusedAdamW(groups(params), lr=0.5)
    second.allocate(gradients, moments)
    go_on(second, gradients, range(7, 8))  # what was made for other moments must not be used again
    second.load_state_dict(saved)
    for param, value in zip(params, [param for group in first.param_groups for param in group["params"]], strict=True):
        param.copy_(value)
    go_on(second, gradients, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    assert all(value.dtype == moments for state in second.state.values() for value in state.values())
    assert [group["step"] for group in second.param_groups] == [group["step"] for group in whole.param_groups] == [5, 5]


def final_loss(moments: torch.dtype) -> tuple[float, float]:
    """First and last loss of a small regression."""
    generator = torch.Generator().manual_seed(3)
    inputs, wanted = torch.randn(256, 16, generator=generator), torch.randn(16, 4, generator=generator)
    targets = inputs @ wanted + 0.1 * torch.randn(256, 4, generator=generator)
    weight, gradient = torch.zeros(16, 4), torch.zeros(16, 4)
    optimizer = FusedAdamW([weight], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer.allocate({weight: gradient}, moments)
    losses = []
    for step in range(300):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        error = inputs[rows] @ weight - targets[rows]
        gradient.copy_(inputs[rows].T @ error / 32)
        losses.append(float(error.square().mean()))
        optimizer.step()
    return losses[0], sum(losses[-8:]) / 8


def test_training_with_bf16_moments_follows_fp32():
    first, wide = final_loss(torch.float32)
    _, narrow = final_loss(torch.bfloat16)
    assert wide < 0.01 * first
    assert narrow == pytest.approx(wide, rel=0.02)


def decayed(beta2: float) -> Tensor:
    """A second moment of every mantissa of bf16 after a step without gradient, over what it was."""
    before = (1 + torch.arange(128) / 128).to(torch.bfloat16)
    weight, gradient = torch.zeros(128), torch.zeros(128)
    optimizer = FusedAdamW([weight], betas=(0.9, beta2))
    optimizer.allocate({weight: gradient}, torch.bfloat16)
    optimizer.state[weight]["exp_avg_sq"].copy_(before)
    optimizer.step()
    return optimizer.state[weight]["exp_avg_sq"].float() / before.float()


def test_the_limit_of_beta_is_where_moments_stop_to_decay():
    assert bool((decayed(LARGEST_BETA_BF16) < 1).all())
    above = decayed(LARGEST_BETA_BF16 + 2**-12)
    assert bool((above == 1).any())
    assert bool((decayed(0.999) == 1).all()), "a usual value: nothing moves"
    # Where one mantissa stays, all that come down end there.
    weight, gradient = torch.zeros(1), torch.zeros(1)
    left = {}
    for beta2 in (LARGEST_BETA_BF16, LARGEST_BETA_BF16 + 2**-12):
        optimizer = FusedAdamW([weight], betas=(0.9, beta2))
        optimizer.allocate({weight: gradient}, torch.bfloat16)
        optimizer.state[weight]["exp_avg_sq"].fill_(2.0)
        for _ in range(2000):
            optimizer.step()
        left[beta2] = float(optimizer.state[weight]["exp_avg_sq"])
    assert left[LARGEST_BETA_BF16] < 0.01 < 0.5 < left[LARGEST_BETA_BF16 + 2**-12]


def broken(**settings: Any) -> list[str]:
    return [sentence for _, sentence in Optim(**{"beta2": 0.95}).model_copy(update=settings).rules()]


def test_settings_above_the_limit_are_refused_with_the_limit():
    assert not broken(moments="bf16") and not broken(beta2=0.999)
    assert not broken(moments="bf16", beta2=LARGEST_BETA_BF16)
    for name in ("beta1", "beta2"):
        (sentence,) = broken(moments="bf16", **{name: 0.999})
        assert f"{name}=0.999" in sentence and "0.99609375" in sentence and "moments=fp32" in sentence
