"""Gradients that a product adds to their buffer: the same sums as autograd's, and only where there is a buffer that may be added to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_skywork import device
from megatron_skywork.model.output_loss import output_losses
from megatron_skywork.moe.grouped_mlp import grouped_mlp
from megatron_skywork.weight_gradients import accumulate, can_accumulate, is_accumulated

pytestmark = pytest.mark.usefixtures("on_the_device")


def with_buffer(weight: Tensor) -> Tensor:
    """A weight as megatron-core's DDP keeps it, with the gradients of an earlier micro-batch in its buffer."""
    weight = weight.detach().requires_grad_()
    weight.main_grad = torch.randn(weight.shape, dtype=torch.float32)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


def test_a_product_is_added() -> None:
    torch.manual_seed(0)
    buffer, grad, inputs = torch.randn(7, 5), torch.randn(11, 7), torch.randn(11, 5)
    wanted = buffer.double() + grad.double().t() @ inputs.double()
    accumulate(buffer, grad, inputs)
    torch.testing.assert_close(buffer.double(), wanted, rtol=1e-6, atol=1e-6)
    assert can_accumulate(torch.float32) and can_accumulate(torch.bfloat16) == device.has_gpu()


@pytest.mark.parametrize("counts", [[3, 0, 4, 5], [0, 0, 12, 0]])
def test_experts_add_their_gradients(counts: list[int]) -> None:
    torch.manual_seed(1)
    rows, probs = torch.randn(sum(counts) + 2, 24), torch.rand(sum(counts) + 2)
    weights = [torch.randn(4, 80, 24) / 5, torch.randn(4, 24, 40) / 6]
    ends = torch.tensor(counts).cumsum(0).int()
    upstream = torch.randn(len(rows), 24)
    upstream[sum(counts) :] = 0
    plain = [tensor.detach().requires_grad_() for tensor in (rows, probs, *weights)]
    wanted = torch.autograd.grad(grouped_mlp(*plain, ends)[: sum(counts)], plain, upstream[: sum(counts)])
    inputs = [rows.detach().requires_grad_(), probs.detach().requires_grad_()]
    kept = [with_buffer(weight) for weight in weights]
    before = [weight.main_grad.clone() for weight in kept]  # type: ignore[attr-defined]
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):  # as recomputation does: what comes back is not the parameter
        output = grouped_mlp(*inputs, *kept, ends, accumulates=True)[: sum(counts)]
    output.backward(upstream[: sum(counts)])
    for mine, theirs in zip(inputs, wanted, strict=False):
        torch.testing.assert_close(mine.grad[: sum(counts)], theirs[: sum(counts)], rtol=1e-5, atol=1e-5)
    for weight, start, gradient in zip(kept, before, wanted[2:], strict=True):
        torch.testing.assert_close(weight.main_grad - start, gradient, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_the_output_layer_adds_its_gradient() -> None:
    torch.manual_seed(2)
    hidden, weight, labels = torch.randn(9, 6), torch.randn(200, 6), torch.randint(0, 200, (9,))
    plain = weight.detach().requires_grad_()
    output_losses(hidden, plain, labels, block_bytes=1).sum().backward()
    kept = with_buffer(weight)
    before = kept.main_grad.clone()  # type: ignore[attr-defined]
    output_losses(hidden, kept, labels, accumulates=True, block_bytes=1).sum().backward()
    torch.testing.assert_close(kept.main_grad - before, plain.grad, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


def test_what_must_go_through_autograd() -> None:
    """A weight outside training has no buffer, and a tied embedding's two gradients are summed by autograd."""
    weight = torch.randn(3, 2, requires_grad=True)
    assert not is_accumulated(weight)
    tied = with_buffer(weight)
    assert is_accumulated(tied)
    tied.zero_out_wgrad = True  # type: ignore[attr-defined]
    assert not is_accumulated(tied)
    output_losses(torch.randn(4, 2), weight, torch.tensor([0, 1, 2, 0]), accumulates=True).sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()
