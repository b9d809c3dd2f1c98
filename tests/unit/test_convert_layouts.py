"""Layouts are invertible, and the one that computes an order computes megatron-core's."""

from __future__ import annotations

import pytest
import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.layouts import Experts, Layout, PaddedVocab, QkvByGroup, Same, Stacked, box, numel
from megatron_skywork.convert.table import weights

LAYOUTS = {
    "same": Same((3, 5)),
    "vocab padded": PaddedVocab(10, 16, 4),
    "vocab whole": PaddedVocab(16, 16, 4),
    "qkv GQA": QkvByGroup(6, 2, 4, (5,)),
    "qkv MHA": QkvByGroup(3, 3, 2, (7,)),
    "qkv one group": QkvByGroup(4, 1, 2, (3,)),
    "qkv bias": QkvByGroup(6, 3, 4),
    "gate and up": Stacked(2, (6, 4)),
    "experts fc1": Experts(3, Stacked(2, (6, 4))),
    "experts fc2": Experts(3, Same((4, 6))),
}


def random_parts(layout: Layout, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in layout.parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_inverse_of_forward_is_identity(name: str, dtype: torch.dtype):
    layout = LAYOUTS[name]
    parts = random_parts(layout, dtype)
    whole = layout.forward(parts)
    assert tuple(whole.shape) == layout.whole and whole.dtype == dtype
    back = layout.inverse(whole)
    assert [tuple(part.shape) for part in back] == list(layout.parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_cover_the_tensor_once_and_use_every_part_once(name: str):
    layout = LAYOUTS[name]
    seen = torch.zeros(layout.whole)
    for piece in layout.pieces:
        seen[box(piece)] += 1
    assert bool((seen == 1).all())
    assert sorted(index for piece in layout.pieces for index in piece.parts) == list(range(len(layout.parts)))


def test_qkv_order_is_query_heads_then_key_then_value_of_each_group():
    layout = QkvByGroup(heads=4, groups=2, head_dim=1)
    query, key, value = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    assert layout.forward([query, key, value]).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_padding_rows_are_zero_and_come_last():
    whole = LAYOUTS["vocab padded"].forward([torch.ones(10, 4)])
    assert bool((whole[:10] == 1).all()) and bool((whole[10:] == 0).all())


def test_gate_rows_stand_above_up_rows_in_every_expert():
    layout = Experts(2, Stacked(2, (1, 1)))
    whole = layout.forward([torch.full((1, 1), float(value)) for value in (1, 2, 3, 4)])
    assert whole.tolist() == [[[1.0], [2.0]], [[3.0], [4.0]]]


def model(**changes) -> Model:
    return Model(**{"num_layers": 3, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 10, **changes})


def test_table_names_are_unique_on_both_sides_and_shapes_agree():
    moe = Moe(num_experts=4, layers=[1], shared_expert_ffn_hidden_size=6)
    table = list(weights(model(qkv_bias=True, qk_norm=True), moe))
    ours = [weight.ours for weight in table]
    theirs = [name for weight in table for name in weight.theirs]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    for weight in table:
        assert len(weight.theirs) == len(weight.layout.parts), weight.ours
        padding = (weight.layout.whole[0] - 10) * 8 if weight.kind == "vocab" else 0
        assert numel(weight.layout.whole) == sum(map(numel, weight.layout.parts)) + padding, weight.ours


def test_dense_layers_and_mixtures_have_their_own_names():
    names = {weight.ours for weight in weights(model(), Moe(num_experts=2, layers=[1]))}
    assert {"decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.mlp.linear_fc1.weight"} <= names
    assert {
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
    } <= names
    assert not {"decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.0.mlp.router.weight"} & names


def test_tied_models_have_no_output_layer():
    assert "output_layer.weight" in {weight.ours for weight in weights(model(), None)}
    assert "output_layer.weight" not in {weight.ours for weight in weights(model(tie_embeddings=True), None)}


def test_parameter_counts_of_the_published_models():
    from megatron_skywork.convert.files.checkpoint_folder import count_parameters

    dense = Model(num_layers=52, hidden_size=4608, ffn_hidden_size=12288, num_attention_heads=36, vocab_size=65519)
    assert round(count_parameters(dense, None)["total"] / 1e9, 2) == 13.85
    counts = count_parameters(dense.model_copy(update={"vocab_size": 65532}), Moe(num_experts=16, topk=2))
    assert round(counts["total"] / 1e9, 2) == 146.36 and round(counts["active"] / 1e9, 2) == 22.69
