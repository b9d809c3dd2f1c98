"""Attention without a mask: equal to the masked one, forwards and backwards, and no tensor of sequence x sequence on the way.

Shapes: S sequence, B batch, N query heads, G key/value groups, D head width, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_skywork import device
from megatron_skywork.model import attention
from megatron_skywork.model.attention import TorchCoreAttention, causal_attention, document_attention
from megatron_skywork.model.documents import Documents

S, B, N, G, D = 37, 3, 6, 2, 8
LENGTHS = [[37], [1, 20, 1, 15], [30, 7]]


def _documents(lengths: list[list[int]] = LENGTHS) -> Documents:
    return Documents(torch.tensor([row + [0] * (sum(row) - len(row)) for row in lengths]), torch.device("cpu"))


def _inputs(dtype: torch.dtype = torch.float32, groups: int = G) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(S, B, heads, D, generator=generator).to(dtype).requires_grad_() for heads in (N, groups, groups)]


def _masked(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, lengths: list[list[int]]) -> Tensor:
    """softmax over an explicit mask, in fp64."""
    query, key, value = (tensor.double().permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    document_BS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    seen_B1SS = (document_BS[:, :, None] == document_BS[:, None, :]).tril()[:, None]
    scores = (query @ key.transpose(-1, -2) / D**0.5).masked_fill(~seen_B1SS, -torch.inf)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output, *torch.autograd.grad((output * weight).sum(), inputs)]


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("groups", [N, G, 1])
def test_documents_see_only_themselves(groups: int) -> None:
    inputs = _inputs(groups=groups)
    found = _with_gradients(lambda *qkv: document_attention(*qkv, _documents(), 0.0, None), inputs)
    _assert_same(found, _with_gradients(lambda *qkv: _masked(*qkv, LENGTHS), inputs))


def test_sequences_of_one_document_are_plainly_causal() -> None:
    inputs = _inputs()
    expected = _with_gradients(lambda *qkv: _masked(*qkv, [[S]] * B), inputs)
    _assert_same(_with_gradients(lambda *qkv: causal_attention(*qkv, 0.0, None), inputs), expected)
    _assert_same(_with_gradients(lambda *qkv: document_attention(*qkv, _documents([[S]] * B), 0.0, None), inputs), expected)


def test_dropout_stays_within_documents() -> None:
    query, key, value = _inputs()
    torch.manual_seed(3)
    output = document_attention(query, key, value, _documents(), 0.3, None)
    assert not torch.allclose(output, document_attention(query, key, value, _documents(), 0.0, None), atol=1e-3)
    (gradient,) = torch.autograd.grad(output[30:, 2].sum(), value)
    assert gradient[30:, 2].any() and not gradient[:30].any() and not gradient[:, :2].any()


class _Watch(TorchDispatchMode):
    """Writes down the shapes of all tensors made, and the inputs of the attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []
        self.kernel_inputs: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.kernel_inputs.append(args[:3])
        result = function(*args, **(kwargs or {}))
        self.made += [tuple(value.shape) for value in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(value, Tensor)]
        return result


@pytest.mark.parametrize("documents", [None, _documents()])
def test_no_mask_is_made_and_no_key_copied(documents: Documents | None) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=N * D, num_attention_heads=N, num_query_groups=G, attention_dropout=0.0)
    layer = TorchCoreAttention(config, 1, AttnMaskType.causal, "self")
    query, key, value = _inputs()
    with _Watch() as watch:
        layer(query, key, value, None, packed_seq_params=documents).sum().backward()
    assert watch.made and not [shape for shape in watch.made if shape.count(S) > 1]
    assert len(watch.kernel_inputs) == (1 if documents is None else sum(map(len, LENGTHS)))
    for _, *shared in watch.kernel_inputs:
        assert all(tensor.shape[1] in (G, B * G) for tensor in shared)
        assert [tensor.untyped_storage().data_ptr() for tensor in shared] == [tensor.untyped_storage().data_ptr() for tensor in (key, value)]


def test_a_mask_is_refused() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=N * D, num_attention_heads=N)
    with pytest.raises(ValueError, match="packed_seq_params"):
        TorchCoreAttention(config, 1, AttnMaskType.causal, "self")(*_inputs(), torch.ones(1, 1, S, S).bool())


def _packed_attention(query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int, **options: Any):
    """What torch promises of its variable-length kernel, in plain steps."""
    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind(query_TND, key_TGD, value_TGD, ends_q, ends_k, longest_q, longest_k, **options)
    assert ends_q.dtype == ends_k.dtype == torch.int32 and longest_q == longest_k == int(ends_q.diff().max()) and options["window_size"] == (-1, 0)
    assert options["enable_gqa"] and options["scale"] is None
    pieces = [torch.arange(begin, end) for begin, end in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True)]
    outputs = [causal_attention(query_TND[piece, None], key_TGD[piece, None], value_TGD[piece, None], 0.0, None)[:, 0] for piece in pieces]
    return torch.cat(outputs).unflatten(-1, (-1, D))


def test_the_variable_length_kernel_is_given_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("torch's kernel shares keys from 2.12 on")
    monkeypatch.setattr(attention, "_varlen_attn", lambda shared: _packed_attention)
    monkeypatch.setattr(device, "has_flash_attention", lambda: True)
    inputs = _inputs(torch.bfloat16)
    found = _with_gradients(lambda *qkv: document_attention(*qkv, _documents(), 0.0, None), inputs)
    for mine, theirs in zip(found, _with_gradients(lambda *qkv: _masked(*qkv, LENGTHS), inputs), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=0.03, atol=0.03)


def test_the_variable_length_kernel_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    kernel = attention._variable_length_kernel
    monkeypatch.setattr(device, "has_flash_attention", lambda: False)
    assert kernel(torch.bfloat16, 128, 0.0, False) is None
    monkeypatch.setattr(device, "has_flash_attention", lambda: True)
    assert kernel(torch.bfloat16, 128, 0.0, False) is kernel(torch.float16, 256, 0.0, False) is not None
    assert [kernel(torch.float32, 128, 0.0, False), kernel(torch.bfloat16, 100, 0.0, False), kernel(torch.bfloat16, 512, 0.0, False)] == [None] * 3
    assert kernel(torch.bfloat16, 128, 0.1, False) is None
