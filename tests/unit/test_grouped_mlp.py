"""Experts as grouped products: against one expert after the other in float64, forward and backward, with and without torch's grouped kernel.

On a machine with a GPU everything here runs on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_skywork.moe import grouped_mlp as module
from megatron_skywork.moe import swiglu
from megatron_skywork.moe.grouped_mlp import grouped_mlp

pytestmark = pytest.mark.usefixtures("on_the_device")
HIDDEN, WIDTH = 24, 40
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["grouped", "loop"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of computing the products."""
    if request.param == "loop":
        monkeypatch.setattr(module, "_grouped_mm", None)
    yield request.param


def one_by_one(rows: Tensor, probs: Tensor, weight1: Tensor, weight2: Tensor, counts: list[int]) -> Tensor:
    """The formula, an expert at a time."""
    outputs = []
    for expert, (x, p) in enumerate(zip(rows.split(counts), probs.split(counts), strict=True)):
        gate, up = (x @ weight1[expert].T).chunk(2, dim=-1)
        outputs.append((gate * torch.sigmoid(gate) * up * p.unsqueeze(-1)) @ weight2[expert].T)
    return torch.cat(outputs)


def inputs(counts: list[int], dtype: torch.dtype, spare: int = 0) -> list[Tensor]:
    torch.manual_seed(0)
    experts, rows = len(counts), sum(counts) + spare
    tensors = [
        torch.randn(rows, HIDDEN).to(dtype),
        torch.rand(rows),
        (torch.randn(experts, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).to(dtype),
        (torch.randn(experts, HIDDEN, WIDTH) / WIDTH**0.5).to(dtype),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(("hidden", "width"), [(24, 41), (23, 40), (24, 40)], ids=["odd inner width", "odd hidden size", "no rows"])
def test_what_the_grouped_kernel_cannot_take_is_computed_one_by_one(hidden: int, width: int) -> None:
    """Rows that are not a multiple of 16 bytes, and a rank that receives no row at all."""
    torch.manual_seed(3)
    counts = [3, 0, 4] if (hidden, width) != (24, 40) else [0, 0, 0]
    rows, weight1, weight2 = torch.randn(sum(counts), hidden), torch.randn(3, 2 * width, hidden), torch.randn(3, hidden, width)
    tensors = [tensor.requires_grad_() for tensor in (rows, torch.rand(sum(counts)), weight1, weight2)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    assert not module._kernel_fits(rows, weight2)
    output = grouped_mlp(*tensors, torch.tensor(counts).cumsum(0).int())
    wanted = one_by_one(*exact, counts)
    output.sum().backward()
    wanted.sum().backward()
    assert output.shape == wanted.shape and (not counts[0] or relative(output, wanted) < 2e-6)
    for tensor, other in zip(tensors, exact, strict=True):
        assert tensor.grad is not None and torch.allclose(tensor.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-12))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", [[5, 9, 2, 16], [0, 7, 0, 1], [31], [8, 8, 8, 8]], ids=str)
def test_equals_one_expert_after_the_other(kernel: str, dtype: torch.dtype, counts: list[int]) -> None:
    tensors = inputs(counts, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    upstream = torch.randn(sum(counts), HIDDEN).to(dtype)
    output = grouped_mlp(*tensors, torch.tensor(counts).cumsum(0).int())
    wanted = one_by_one(*exact, counts)
    output.backward(upstream)
    wanted.backward(upstream.double())
    assert output.dtype == dtype and tensors[1].grad is not None and tensors[1].grad.dtype == torch.float32
    for found, right in [(output, wanted), *((tensor.grad, other.grad) for tensor, other in zip(tensors, exact, strict=True))]:
        assert relative(found, right) < TOLERANCE[dtype]


def test_weights_get_contiguous_gradients_in_their_own_shape(kernel: str) -> None:
    """Anything else would be copied when it is added to the gradient buffer."""
    tensors = inputs([5, 0, 11], torch.bfloat16)
    output = grouped_mlp(*tensors, torch.tensor([5, 5, 16], dtype=torch.int32))
    for weight, gradient in zip(tensors[2:], torch.autograd.grad(output.sum(), tensors[2:]), strict=True):
        assert gradient.shape == weight.shape and gradient.is_contiguous() and gradient.dtype == weight.dtype
        assert not gradient[1].any(), "an expert without rows has no gradient"


def test_rows_behind_the_last_run_have_no_influence(kernel: str) -> None:
    """Not even where they hold what happened to be in memory."""
    counts, spare = [4, 6], 5
    tensors = inputs(counts, torch.float32, spare)
    ends = torch.tensor(counts).cumsum(0).int()
    reference = [tensor.detach()[: sum(counts)].clone().requires_grad_() for tensor in tensors[:2]] + [t.detach().clone().requires_grad_() for t in tensors[2:]]
    with torch.no_grad():
        tensors[0][sum(counts) :], tensors[1][sum(counts) :] = float("nan"), float("nan")
    upstream = torch.randn(sum(counts), HIDDEN)
    output = grouped_mlp(*tensors, ends)
    output.backward(torch.cat([upstream, torch.full((spare, HIDDEN), float("nan"))]))
    wanted = grouped_mlp(*reference, ends)
    wanted.backward(upstream)
    assert torch.equal(output[: sum(counts)], wanted)
    for found, right in zip(tensors, reference, strict=True):
        assert found.grad is not None and right.grad is not None
        assert torch.equal(found.grad[: right.shape[0]], right.grad)


def test_keeps_nothing_but_its_input_and_the_first_product() -> None:
    """The activation is made again in backward: [R, F] less to hold."""
    tensors = inputs([5, 11], torch.bfloat16)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        grouped_mlp(*tensors, torch.tensor([5, 16], dtype=torch.int32))
    assert sorted(kept) == sorted([(16, HIDDEN), (16, 2 * WIDTH), (16,), (2, 2 * WIDTH, HIDDEN), (2, HIDDEN, WIDTH), (2,)])


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_blocks_of_rows_give_what_the_whole_gives(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes blocks that fit its cache, a GPU everything at once."""
    torch.manual_seed(1)
    gate_up, probs, grad = torch.randn(rows, 2 * WIDTH), torch.rand(rows), torch.randn(rows, WIDTH)
    blocks = swiglu.weighted_swiglu(gate_up, probs), *swiglu.weighted_swiglu_backward(gate_up, probs, grad)
    monkeypatch.setattr(swiglu, "BLOCK_NUMBERS", 2 * WIDTH * 3)
    small = swiglu.weighted_swiglu(gate_up, probs), *swiglu.weighted_swiglu_backward(gate_up, probs, grad)
    whole = swiglu._forward(gate_up, probs), *swiglu._backward(gate_up, probs, grad)
    for one, two, three in zip(blocks, small, whole, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(two, three, rtol=1e-6, atol=1e-6)
    assert torch.equal(blocks[0], blocks[3]), "the activation made again is the activation"
