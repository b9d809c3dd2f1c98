"""On a GPU: compiled functions, grouped products and attention kernels against the same formulas in float64 on the host.

Sizes are odd where they may be, experts are without rows, and a second call has other sizes, so that nothing compiled for the first is trusted with them.
Shapes: T tokens, E experts, H hidden, F inner width, S sequence, B batch, N query heads, G key/value groups, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_skywork import device, weight_gradients
from megatron_skywork.model import attention, output_loss, rope
from megatron_skywork.model.documents import Documents
from megatron_skywork.model.norm import RMSNorm
from megatron_skywork.moe import gating_norm, grouped_mlp, swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not device.has_gpu(), reason="needs an NVIDIA GPU")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [torch.float32, torch.bfloat16]


def error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    assert torch.isfinite(found).all()
    return float((found.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30))


def compare(function: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype, exact: Callable[..., Any] | None = None) -> None:
    """Output and gradients of `function` on the GPU in `dtype`, against the same (or `exact`) on the host in float64, from the same rounded inputs."""
    there = [tensor.to(device.current(), dtype).requires_grad_() for tensor in inputs]
    here = [tensor.to(dtype).double().requires_grad_() for tensor in inputs]
    output, wanted = function(*there), (exact or function)(*here)
    upstream = torch.randn(wanted.shape, dtype=torch.float64)
    found = torch.autograd.grad(output, there, upstream.to(device.current(), output.dtype))
    expected = torch.autograd.grad(wanted, here, upstream.to(output.dtype).double())
    for mine, theirs in zip([output, *found], [wanted, *expected], strict=True):
        assert error(mine, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_experts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, width = 64, 176
    for counts in ([70, 0, 33, 129], [0, 5, 0, 1000], [300, 300, 300, 300]):
        inputs = [torch.randn(sum(counts), hidden), torch.rand(sum(counts)), torch.randn(4, 2 * width, hidden) / 8, torch.randn(4, hidden, width) / 13]

        def exact(rows: Tensor, probs: Tensor, weight1: Tensor, weight2: Tensor, counts: list[int] = counts) -> Tensor:
            outputs = []
            for expert, (x, p) in enumerate(zip(rows.split(counts), probs.split(counts), strict=True)):
                gate, up = (x @ weight1[expert].T).chunk(2, dim=-1)
                outputs.append((gate * torch.sigmoid(gate) * up * p.unsqueeze(-1)) @ weight2[expert].T)
            return torch.cat(outputs)

        ends = torch.tensor(counts).cumsum(0).int().to(device.current())
        compare(lambda *tensors, ends=ends: grouped_mlp.grouped_mlp(tensors[0], tensors[1].float(), *tensors[2:], ends), inputs, dtype, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for tokens in (65, 1027):
        compare(
            lambda gate_up, probs: swiglu.weighted_swiglu(gate_up, probs.float()),
            [torch.randn(tokens, 2 * 88), torch.rand(tokens)],
            dtype,
            lambda gate_up, probs: torch.nn.functional.silu(gate_up[:, :88]) * gate_up[:, 88:] * probs[:, None],
        )


def test_gate_normalization() -> None:
    torch.manual_seed(2)
    for tokens in (65, 1027):
        compare(
            lambda logits: gating_norm.normalize_logits(logits, 1.0, 1e-6),
            [3 * torch.randn(tokens, 16)],
            torch.float32,
            lambda logits: (logits - logits.mean(-1, keepdim=True)) / (logits.var(-1, keepdim=True) + 1e-6).sqrt(),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_positions(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    angles = torch.randn(37, 1, 1, 32).repeat(1, 1, 1, 2)

    def turned(states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * angles.double().cos() + torch.cat([-second, first], -1) * angles.double().sin()

    there = angles.to(device.current())
    compare(lambda states: rope.apply_rotary(states, there), [torch.randn(37, 2, 4, 64)], dtype, turned)


@pytest.mark.parametrize(("groups", "dtype"), [(4, torch.bfloat16), (2, torch.bfloat16), (1, torch.float32), (4, torch.float16)])
def test_documents_of_any_length(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    sequence, batch, heads, width = 300, 2, 4, 64
    rows = [[300], [1, 130, 2, 167]]
    lengths = torch.tensor([row + [0] * (sequence - len(row)) for row in rows])
    inputs = [torch.randn(sequence, batch, count, width) for count in (heads, groups, groups)]

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        key, value = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (key, value))
        document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
        seen = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        scores = (query @ key.transpose(-1, -2) / width**0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)

    documents = Documents(lengths, device.current())
    compare(lambda *qkv: attention.document_attention(*qkv, documents, 0.0, None), inputs, dtype, exact)


def test_whole_sequences_take_a_fused_kernel() -> None:
    """With scores in memory, 32k tokens of 8 heads would take 16 GiB in bf16 alone."""
    query, key, value = (torch.randn(32768, 1, heads, 64, device=device.current(), dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2))
    attention.causal_attention(query, key, value, 0.0, None).sum().backward()
    assert device.peak_memory_bytes() < 4 * 2**30


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    layer = RMSNorm(TransformerConfig(num_layers=1, hidden_size=96, num_attention_heads=4, params_dtype=dtype), 96).to(device.current())

    def normalized(states: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (states,))

    for tokens in (65, 1027):
        inputs = [torch.randn(tokens, 96), torch.rand(96) + 0.5]
        compare(normalized, inputs, dtype, lambda states, weight: states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-5) * weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_the_loss(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    block, column = 3 * torch.randn(130, 512), torch.randint(0, 512, (130,))
    statistics = output_loss.block_statistics(block.to(device.current(), dtype), column.to(device.current()))
    wanted = torch.nn.functional.cross_entropy(block.to(dtype).double(), column, reduction="none")
    assert error(output_loss.losses_from(statistics), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_added_to_an_fp32_buffer(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    buffer, grad, inputs = torch.randn(176, 64), torch.randn(70, 176).to(dtype), torch.randn(70, 64).to(dtype)
    wanted = buffer.double() + grad.double().t() @ inputs.double()
    there = buffer.to(device.current())
    weight_gradients.accumulate(there, grad.to(device.current()), inputs.to(device.current()))
    assert error(there, wanted) < 1e-6, "summed in fp32 and not rounded on the way"


def test_experts_add_their_gradients_in_fp32() -> None:
    torch.manual_seed(8)
    counts, hidden, width = [70, 0, 33, 129], 64, 176
    ends = torch.tensor(counts).cumsum(0).int().to(device.current())
    tensors = [torch.randn(sum(counts), hidden), torch.rand(sum(counts)), torch.randn(4, 2 * width, hidden) / 8, torch.randn(4, hidden, width) / 13]
    rows, probs, *weights = [
        tensor.to(device.current(), torch.float32 if index == 1 else torch.bfloat16).requires_grad_() for index, tensor in enumerate(tensors)
    ]
    upstream = torch.randn_like(rows)
    plain = torch.autograd.grad(grouped_mlp.grouped_mlp(rows, probs, *weights, ends), weights, upstream)
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    for _ in range(2):
        grouped_mlp.grouped_mlp(rows, probs, *weights, ends, accumulates=True).backward(upstream)
    for weight, gradient in zip(weights, plain, strict=True):
        assert error(weight.main_grad, 2 * gradient.cpu().double()) < 4e-3
