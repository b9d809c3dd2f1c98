"""Parameters, FLOPs, stages and batches against formulas written out by hand."""

from pathlib import Path

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.plan.flops import formula_text, forward_flops_per_token, matmul_parameters, report_flops_per_token, train_flops_per_token
from megatron_skywork.plan.parameters import count_parameters, stage_parameters
from megatron_skywork.plan.stages import batch, pieces, recomputed_layers, stage_chunks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# hidden 8, 2 heads of 4, vocabulary 10 padded to 12
SMALL = {"num_layers": 4, "hidden_size": 8, "ffn_hidden_size": 20, "num_attention_heads": 2, "vocab_size": 10, "vocab_divisible_by": 4}


def make(model=None, **sections) -> Config:
    sections.setdefault("data", {"mock": True, "seq_length": 16})
    sections.setdefault("train", {"steps": 1, "global_batch_size": 8})
    return Config.model_validate({"model": {**SMALL, **(model or {})}, **sections})


def test_skywork_moe_has_the_published_size():
    config = load_config([str(CONFIGS / "skywork_moe_146b.yaml")], [], 1536)
    count = count_parameters(config)
    attention, expert = 4 * 4608 * 4608, 3 * 4608 * 12288
    rest = 52 * (attention + 2 * 4608 + 16 * 4608) + 2 * 65532 * 4608 + 4608
    assert count.total == rest + 52 * 16 * expert == 146_356_130_304
    assert count.active == rest + 52 * 2 * expert == 22_691_271_168
    assert count.padded_total == count.total + 2 * 4 * 4608
    # 690 tokens/s on 312 TFLOP/s is the 35.3 % that the report's own convention gives
    assert report_flops_per_token(config) * 690 / 312e12 == pytest.approx(0.353, abs=5e-4)


def test_skywork_13b_has_the_published_size():
    count = count_parameters(load_config([str(CONFIGS / "skywork_13b.yaml")], [], 512))
    assert count.total == count.active == 52 * (4 * 4608**2 + 3 * 4608 * 12288 + 2 * 4608) + 2 * 65519 * 4608 + 4608 == 13_854_113_280


@pytest.mark.parametrize(("model", "moe", "total", "active"), [
    ({}, None, 2 * 80 + 8 + 4 * (4 * 64 + 16 + 480), None),
    ({"tie_embeddings": True}, None, 80 + 8 + 4 * (4 * 64 + 16 + 480), None),
    ({"num_query_groups": 1}, None, 2 * 80 + 8 + 4 * (64 + 2 * 32 + 64 + 16 + 480), None),
    ({"qkv_bias": True, "qk_norm": True}, None, 2 * 80 + 8 + 4 * (4 * 64 + 24 + 8 + 16 + 480), None),
    ({"head_dim": 6}, None, 2 * 80 + 8 + 4 * (4 * 96 + 16 + 480), None),
    ({}, {"num_experts": 4, "topk": 1}, 2 * 80 + 8 + 4 * (4 * 64 + 16 + 32 + 4 * 480), 2 * 80 + 8 + 4 * (4 * 64 + 16 + 32 + 480)),
    ({}, {"num_experts": 4, "topk": 1, "shared_expert_ffn_hidden_size": 6, "shared_expert_gate": True},
     2 * 80 + 8 + 4 * (4 * 64 + 16 + 32 + 4 * 480 + 144 + 8), 2 * 80 + 8 + 4 * (4 * 64 + 16 + 32 + 480 + 144 + 8)),
    ({}, {"num_experts": 4, "ffn_hidden_size": 10, "layers": [1, 3], "shared_expert_ffn_hidden_size": 6},
     2 * 80 + 8 + 4 * (4 * 64 + 16) + 2 * 480 + 2 * (32 + 4 * 240 + 144), 2 * 80 + 8 + 4 * (4 * 64 + 16) + 2 * 480 + 2 * (32 + 2 * 240 + 144)),
])
def test_counts_of_small_models(model, moe, total, active):
    count = count_parameters(make(model, moe=moe))
    assert (count.total, count.active) == (total, active or total)
    assert sum(count.components.values()) == count.total and sum(count.active_components.values()) == count.active
    assert count.padded_total - count.total == 2 * 8 * (1 if model.get("tie_embeddings") else 2)


@pytest.mark.parametrize("name", ["tiny.yaml", "skywork_13b.yaml", "skywork_moe_146b.yaml"])
def test_counts_equal_the_sum_over_the_table_of_weights(name):
    """The converter lists every tensor with its shape; the formula must come to the same number."""
    from megatron_skywork.convert.files.checkpoint_folder import count_parameters as count_weights

    config = load_config([str(CONFIGS / name)])
    count = count_parameters(config)
    assert count_weights(config.model, config.moe) == {"total": count.total, "active": count.active}


def test_ranks_together_hold_the_model():
    """Sum over ranks, with what is replicated taken out by hand: norms on tp ranks, routers on tp * ep ranks."""
    moe = {"num_experts": 4, "layers": [1, 2, 3], "shared_expert_ffn_hidden_size": 6}
    one = make(moe=moe)
    assert stage_parameters(one) == [count_parameters(one).padded_total]
    split = make(moe=moe, parallel={"tp": 2, "ep": 2, "pp": 2, "layers_per_stage": [1, 3]})
    attention, expert = 4 * 64 // 2, 480
    first = 12 * 8 // 2 + (attention + 16) + 480 // 2
    last = 12 * 8 // 2 + 8 + 3 * (attention + 16 + 32 + 2 * expert + 144 // 2)
    assert stage_parameters(split) == [first, last]
    gated = {**moe, "shared_expert_gate": True}
    assert stage_parameters(make(moe=gated)) == [count_parameters(make(moe=gated)).padded_total]
    assert stage_parameters(make(moe=gated, parallel={"tp": 2, "ep": 2, "pp": 2, "layers_per_stage": [1, 3]})) == [first, last + 3 * 8]
    etp = make(moe=moe, parallel={"etp": 2})
    assert stage_parameters(one)[0] - stage_parameters(etp)[0] == 3 * 4 * expert // 2


def test_tied_embeddings_are_held_once_or_twice():
    tied = {"tie_embeddings": True}
    assert stage_parameters(make(tied)) == [count_parameters(make(tied)).padded_total]
    assert sum(stage_parameters(make(tied, parallel={"pp": 2}))) == count_parameters(make(tied)).padded_total + 12 * 8


def test_flops_by_hand():
    config = make(moe={"num_experts": 4, "topk": 2})
    products = 4 * (4 * 64 + 32 + 2 * 480) + 80
    assert matmul_parameters(config) == products
    assert forward_flops_per_token(config) == 2 * products + 4 * 2 * 8 * 16
    assert train_flops_per_token(config) == 3 * forward_flops_per_token(config)
    assert report_flops_per_token(config) == 6 * count_parameters(config).active + 12 * 4 * 8 * 16
    assert f"{train_flops_per_token(config):.4g}" in formula_text(config) and "N_matmul" in formula_text(config) and "\n" not in formula_text(config)


def test_biases_and_head_norms_are_no_products_and_a_tied_output_is():
    plain, dressed, tied = make(), make({"qkv_bias": True, "qk_norm": True}), make({"tie_embeddings": True})
    assert matmul_parameters(plain) == matmul_parameters(dressed) == matmul_parameters(tied) == 4 * (4 * 64 + 480) + 80


def test_flops_equal_a_count_of_every_product():
    """The formula against a walk over the actual matrix shapes of one sequence, with the exact causal sum S (S + 1) / 2 instead of S * S / 2."""
    config = make({"num_query_groups": 1}, moe={"num_experts": 4, "layers": [0, 2], "ffn_hidden_size": 12})
    length, flops = 16, 0
    for layer in range(4):
        flops += 2 * length * 8 * (8 + 4 + 4) + 2 * length * 8 * 8
        flops += 2 * 2 * 8 * length * (length + 1) // 2
        flops += 2 * length * (8 * 4 + 2 * 3 * 8 * 12) if layer in (0, 2) else 2 * length * 3 * 8 * 20
    flops += 2 * length * 8 * 10
    extra = 4 * 2 * 8 * length  # the diagonal's other half
    assert forward_flops_per_token(config) * length == flops - extra


def test_stages_hold_every_layer_once_in_order():
    config = make({"num_layers": 8}, parallel={"pp": 2, "vpp": 2, "layers_per_stage": [1, 3, 2, 2]})
    assert pieces(config) == [[0], [1, 2, 3], [4, 5], [6, 7]]
    assert stage_chunks(config) == [[[0], [4, 5]], [[1, 2, 3], [6, 7]]]
    assert stage_chunks(make(parallel={"pp": 2})) == [[[0, 1]], [[2, 3]]]


@pytest.mark.parametrize(("recompute", "asked", "found"), [
    ("none", None, [0, 0]), ("selective", None, [0, 0]), ("full", None, [1, 3]), ("full", 2, [1, 2]), ("full", [0, 3], [0, 3]),
])  # fmt: skip
def test_recomputed_layers_of_each_stage(recompute, asked, found):
    config = make(parallel={"pp": 2, "layers_per_stage": [1, 3], "recompute": recompute, "recompute_layers": asked})
    assert recomputed_layers(config) == found


def test_batch():
    config = make(parallel={"tp": 2, "pp": 2}, train={"steps": 1, "global_batch_size": 24, "micro_batch_size": 2})
    cut = batch(config, 12)
    assert (cut.data_parallel, cut.micro_batches, cut.tokens_per_step) == (3, 4, 384)
