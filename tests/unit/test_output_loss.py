"""Losses and gradients from blocks of the vocabulary, against torch's cross entropy of whole logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_skywork.model.output_loss import block_columns, block_gradient, block_statistics, losses_from, merge_statistics, output_losses

TOKENS, HIDDEN, VOCABULARY = 24, 16, 200
# bytes of a block -> entries in it: one block, several with a short last one, and many.
ONE_BLOCK, UNEVEN, MANY = 2**20, 4 * TOKENS * 128, 1
# Of the whole gradient's largest entry. 16-bit gradients of logits and of weights are each rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def sample(dtype: torch.dtype, scale: float = 1.0, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weight that want gradients, labels, and a random gradient of the losses with masked tokens in it."""
    generator = torch.Generator().manual_seed(7)
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight_VH = (scale * torch.randn(vocabulary, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    labels_T = torch.randint(vocabulary, (tokens,), generator=generator)
    labels_T[:2] = torch.tensor([0, vocabulary - 1])
    gradient_T = torch.randn(tokens, generator=generator)
    gradient_T[3::4] = 0.0
    return hidden_TH, weight_VH, labels_T, gradient_T


def reference(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, gradient_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and gradients of hidden states and weight, from logits rounded as the matrix product rounds them."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_TH, weight_VH))
    exact_TV = hidden @ weight.t()
    logits_TV = exact_TV + ((hidden_TH @ weight_VH.t()).double() - exact_TV).detach()
    losses_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
    losses_T.backward(gradient_T.double())
    assert hidden.grad is not None and weight.grad is not None
    return losses_T.detach(), hidden.grad, weight.grad


def assert_near(found: Tensor | None, expected: Tensor, tolerance: float) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@DTYPES
@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("block_bytes", [ONE_BLOCK, UNEVEN, MANY])
def test_losses_and_gradients_are_those_of_whole_logits(dtype: torch.dtype, keep_logits: bool, block_bytes: int) -> None:
    assert block_columns(TOKENS, block_bytes) == {ONE_BLOCK: 10880, UNEVEN: 128, MANY: 64}[block_bytes]
    hidden_TH, weight_VH, labels_T, gradient_T = sample(dtype)
    losses_T = output_losses(hidden_TH, weight_VH, labels_T, keep_logits=keep_logits, block_bytes=block_bytes)
    losses_T.backward(gradient_T)
    expected_losses, expected_hidden, expected_weight = reference(hidden_TH, weight_VH, labels_T, gradient_T)
    assert losses_T.dtype == torch.float32 and hidden_TH.grad is not None and hidden_TH.grad.dtype == dtype
    torch.testing.assert_close(losses_T.double(), expected_losses, rtol=2e-6, atol=2e-6)
    assert_near(hidden_TH.grad, expected_hidden, TOLERANCE[dtype])
    assert_near(weight_VH.grad, expected_weight, TOLERANCE[dtype])
    assert torch.equal(hidden_TH.grad[3::4], torch.zeros_like(hidden_TH.grad[3::4])), "masked tokens have no gradient"


@pytest.mark.parametrize("block_bytes", [ONE_BLOCK, MANY])
def test_large_logits_neither_overflow_nor_lose_the_loss(block_bytes: int) -> None:
    hidden_TH, weight_VH, labels_T, gradient_T = sample(torch.float32, scale=1000.0)
    logits_TV = (hidden_TH @ weight_VH.t()).detach()
    assert logits_TV.abs().max() > 5000
    labels_T[:4], labels_T[4:8] = logits_TV.argmax(-1)[:4], logits_TV.argmin(-1)[4:8]
    losses_T = output_losses(hidden_TH, weight_VH, labels_T, block_bytes=block_bytes)
    losses_T.backward(gradient_T)
    expected_losses, expected_hidden, expected_weight = reference(hidden_TH, weight_VH, labels_T, gradient_T)
    torch.testing.assert_close(losses_T.double(), expected_losses, rtol=1e-5, atol=1e-2)
    assert_near(hidden_TH.grad, expected_hidden, 1e-4)
    assert_near(weight_VH.grad, expected_weight, 1e-4)


def test_a_small_loss_beside_large_logits_is_exact() -> None:
    """A label 8 above the rest at logits near 10,000, where fp32 counts in steps of 1/1024: the loss, exp(-8) times 15, must not be rounded to such a step."""
    logits_TV = torch.full((1, 16), 9992.0)
    logits_TV[0, 5] = 10000.0
    column_T = torch.tensor([5])
    statistics_3T = block_statistics(logits_TV, column_T)
    loss_T = losses_from(statistics_3T)
    expected = torch.nn.functional.cross_entropy(logits_TV.double(), column_T)
    torch.testing.assert_close(loss_T[0].double(), expected, rtol=1e-4, atol=0)
    gradient_TV = block_gradient(logits_TV, column_T, statistics_3T, loss_T, torch.ones(1))
    torch.testing.assert_close(gradient_TV[0, 5].double(), (-expected).expm1(), rtol=1e-4, atol=0)


def test_statistics_of_blocks_merge_into_those_of_the_whole() -> None:
    logits_TV, column_T = 30 * torch.randn(6, 100, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 99, 50, 49, 51, 7])
    parts = torch.stack([block_statistics(logits_TV[:, first : first + 50], column_T - first) for first in (0, 50)])
    torch.testing.assert_close(merge_statistics(parts), block_statistics(logits_TV, column_T))


@DTYPES
def test_a_scaled_loss_has_a_scaled_gradient(dtype: torch.dtype) -> None:
    """As fp16's loss scale does; a power of two, so that the numbers are the same to the last bit where nothing leaves the range."""
    gradients = []
    for factor in (1.0, 64.0):
        hidden_TH, weight_VH, labels_T, gradient_T = sample(dtype)
        output_losses(hidden_TH, weight_VH, labels_T).backward(gradient_T * factor)
        assert weight_VH.grad is not None
        gradients.append(weight_VH.grad.float() / factor)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_a_shared_weight_gets_both_gradients() -> None:
    """Tied embeddings: the lookup's gradient and the output layer's add up in the same parameter."""
    _, weight_VH, labels_T, gradient_T = sample(torch.float32)
    tokens_T = labels_T.roll(1)
    output_losses(weight_VH[tokens_T], weight_VH, labels_T, block_bytes=MANY).backward(gradient_T)
    found, weight_VH.grad = weight_VH.grad, None
    torch.nn.functional.cross_entropy(weight_VH[tokens_T] @ weight_VH.t(), labels_T, reduction="none").backward(gradient_T)
    torch.testing.assert_close(found, weight_VH.grad, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Writes down the largest result of each dtype, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements[tensor.dtype] = max(self.elements.get(tensor.dtype, 0), tensor.numel())
        return result


@DTYPES
def test_nothing_is_larger_than_a_block(dtype: torch.dtype) -> None:
    hidden_TH, weight_VH, labels_T, gradient_T = sample(dtype, tokens=256, vocabulary=2048)
    block = 256 * 128
    with Largest() as largest:
        output_losses(hidden_TH, weight_VH, labels_T, keep_logits=False, block_bytes=4 * block).backward(gradient_T)
    assert max(largest.elements.values()) == block


def test_kept_logits_are_16_bits_wide_and_only_kept_for_a_backward() -> None:
    def saved_elements(dtype: torch.dtype, keep_logits: bool = True) -> int:
        sizes: list[int] = []
        hidden_TH, weight_VH, labels_T, _ = sample(dtype)

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output_losses(hidden_TH, weight_VH, labels_T, keep_logits=keep_logits)
        return sum(sizes)

    without = saved_elements(torch.float32)
    assert without < TOKENS * VOCABULARY
    assert saved_elements(torch.bfloat16, keep_logits=False) == without
    assert saved_elements(torch.bfloat16) == without + TOKENS * VOCABULARY
    with torch.no_grad():
        assert saved_elements(torch.bfloat16) == 0
