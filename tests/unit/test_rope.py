"""Rotary positions: megatron-core's, to the last digits and better in half precision, with less kept for the backward.

Shapes: S sequence, B batch, N heads, D head width.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_skywork.model.rope import RotaryTables, apply_rotary, offer_fused_rotary, rotate

S, B, N, D = 300, 2, 4, 16


def _angles(rope_scaling: bool = False) -> Tensor:
    return RotaryEmbedding(D, 1.0, rotary_base=10000, rope_scaling=rope_scaling, use_cpu_initialization=True)(S)


def _theirs(x_SBND: Tensor, angles: Tensor) -> Tensor:
    return rope_utils._apply_rotary_pos_emb_bshd(x_SBND, angles)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rope_scaling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_least_as_exact_as_megatron_core(dtype: torch.dtype, rope_scaling: bool) -> None:
    angles = _angles(rope_scaling)
    x, gradient = (torch.randn(S, B, N, D).to(dtype) for _ in range(2))
    mine, theirs, exact = (value.clone().requires_grad_() for value in (x, x, x.double()))
    found, other, expected = apply_rotary(mine, angles), _theirs(theirs, angles), _theirs(exact, angles.double())
    assert found.dtype == dtype and _error(found, expected) <= _error(other, expected) < 4e-3
    for output, weight in ((found, gradient), (other, gradient), (expected, gradient.double())):
        output.backward(weight)
    assert _error(mine.grad, exact.grad) <= _error(theirs.grad, exact.grad) < 4e-3


def test_the_gradient_of_a_rotation_is_the_rotation_back() -> None:
    angles, x = _angles()[:5], torch.randn(5, 1, 2, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, angles), x.clone().requires_grad_())
    cos, sin = angles.double().cos(), angles.double().sin()
    assert torch.allclose(rotate(rotate(x, cos, sin), cos, sin, back=True), x)


def test_only_the_tables_are_kept() -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        apply_rotary(torch.randn(S, B, N, D, requires_grad=True), _angles())
    assert kept == [S * D, S * D]


def test_a_view_is_left_alone() -> None:
    qkv = torch.randn(S, B, N, 3 * D)
    before, key = qkv.clone(), qkv[..., D : 2 * D]
    assert torch.allclose(apply_rotary(key, _angles()), _theirs(key, _angles()), atol=1e-5)
    assert torch.equal(qkv, before)


def test_tables_are_made_once_per_angles_and_dtype() -> None:
    tables, angles = RotaryTables(), _angles().clone()
    first = tables.of(angles, torch.float32)
    assert tables.of(angles, torch.float32) is first and tables.of(angles.detach(), torch.float32) is first
    assert tables.of(angles[:100], torch.float32)[0].shape[0] == 100
    assert tables.of(angles, torch.bfloat16)[0].dtype == torch.bfloat16
    assert tables.of(angles, torch.float32) is not first
    other = tables.of(2 * angles, torch.float32)
    assert torch.equal(other[0], (2 * angles).cos()) and torch.equal(other[1], (2 * angles).sin())


def test_megatron_core_calls_it(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    fields = {"num_layers": 1, "hidden_size": N * D, "num_attention_heads": N, "apply_rope_fusion": True}
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        TransformerConfig(**fields)
    offer_fused_rotary()
    output = rope_utils.apply_rotary_pos_emb(torch.randn(S, B, N, D, requires_grad=True), _angles(), TransformerConfig(**fields))
    assert output.grad_fn is not None and output.grad_fn.name() == "_RotationBackward"


def test_other_kinds_of_rotary_positions_are_refused() -> None:
    for options in ({"interleaved": True}, {"freqs": _angles()[..., : D // 2]}):
        with pytest.raises(ValueError, match="apply_rope_fusion=false"):
            apply_rotary(**{"t": torch.randn(S, B, N, D), "freqs": _angles(), **options})
