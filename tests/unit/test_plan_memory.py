"""The planner's memory against a GPU's allocator, against counts by hand, and against the constants of the modules it stands for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.plan import activations
from megatron_skywork.plan.activations import CPU, GPU, layer_activations
from megatron_skywork.plan.memory import COLUMN_MULTIPLE, FRAGMENTATION, stage_memory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from memory_cases import LAYOUTS, layout_settings, settings  # noqa: E402

TRACED = json.loads((ROOT / "docs" / "measurements" / "cpu_memory.json").read_text(encoding="utf-8"))
MEASURED = json.loads((ROOT / "docs" / "measurements" / "h200_memory.json").read_text(encoding="utf-8"))["cases"]
MIB = 2**20
FP32 = {"train": {"steps": 1, "global_batch_size": 16, "precision": "fp32"}}
# Tables of rotary positions and cuBLAS's memory: one process measured all cases, so the first one alone paid for them.
OF_THE_FIRST = GPU.library_bytes + 2 * MIB


def config_of(**sections: dict[str, Any]) -> Config:
    model = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 1024, "backend": "torch"}
    base = {
        "data": {"mock": True, "seq_length": 32},
        "train": {"steps": 1, "global_batch_size": 16},
        **sections,
        "model": {**model, **sections.get("model", {})},
    }
    return Config.model_validate(base)


@pytest.mark.parametrize("case", [row["case"] for row in MEASURED])
def test_a_gpu_allocates_what_the_plan_says(case: str) -> None:
    number, row = next((number, row) for number, row in enumerate(MEASURED) if row["case"] == case)
    (planned,) = stage_memory(Config(**settings(case)), 1)
    assert planned.held == pytest.approx(row["built_bytes"], rel=0.005)
    allocated = planned.allocated - (OF_THE_FIRST if number else 0)
    assert allocated == pytest.approx(row["peak_bytes"], rel=0.003)
    assert allocated - row["held_bytes"] == pytest.approx(row["step_bytes"], rel=0.01)


def test_layouts_twice_as_wide_and_long_allocate_what_the_plan_says() -> None:
    """Traced on CPU ranks; tests/distributed/test_planned_memory.py traces them anew in small."""
    assert list(dict.fromkeys(row["layout"] for row in TRACED["layouts"])) == list(LAYOUTS) and TRACED["scale"] == 2
    errors = {}
    for row in TRACED["layouts"]:
        world, changed = layout_settings(row["layout"], TRACED["scale"])
        planned = stage_memory(Config(**changed), world, device=CPU)[row["stage"] - 1]
        assert planned.held == pytest.approx(row["held_bytes"], rel=0.001)
        errors[row["layout"], row["stage"]] = abs(planned.step / row["step_bytes"] - 1)
    assert max(errors.values()) < 0.02 and sum(errors.values()) / len(errors) < 0.004, errors


def test_the_allowance_is_the_mean_of_what_the_allocator_took_above_its_peak() -> None:
    # Of a case before, 1 MiB of angles stays: megatron-core caches them with the model that made them.
    before = [0, *(OF_THE_FIRST + number * MIB for number in range(1, len(MEASURED)))]
    shares = [(row["reserved_bytes"] - row["peak_bytes"] - old) / row["step_bytes"] for row, old in zip(MEASURED, before, strict=True)]
    assert sum(shares) / len(shares) == pytest.approx(FRAGMENTATION, abs=0.005)
    (planned,) = stage_memory(Config(**settings("dropless")), 1)
    assert planned.fragmentation == round(FRAGMENTATION * planned.step) and planned.total == planned.allocated + planned.fragmentation


def test_constants_are_those_of_the_modules() -> None:
    from megatron_skywork.model.output_loss import _COLUMN_MULTIPLE, BLOCK_BYTES
    from megatron_skywork.moe.permutation import UNUSED_PER_BAG
    from megatron_skywork.moe.swiglu import BLOCK_NUMBERS
    from megatron_skywork.optim.adamw import PIECE_NUMEL

    assert {"gpu": GPU.loss_block_bytes, "cpu": CPU.loss_block_bytes} == BLOCK_BYTES
    assert (COLUMN_MULTIPLE, activations.ROWS_PER_BAG, CPU.swiglu_numbers) == (_COLUMN_MULTIPLE, UNUSED_PER_BAG, BLOCK_NUMBERS)
    assert PIECE_NUMEL in (CPU.optimizer_numbers, GPU.optimizer_numbers)


def test_activations_of_a_dense_layer_by_hand() -> None:
    """32 tokens in bf16: two norms of two rows of 64 and one fp32; qkv, rotated q and k, output, 4 heads' fp32; 3 x 128 numbers of SwiGLU."""
    kept = layer_activations(config_of(), 0, False)
    assert kept == {
        "input norm": 32 * (2 * 128 + 4), "qkv": 32 * 3 * 128, "rotary positions": 32 * 2 * 128, "core attention": 32 * (128 + 16),
        "feed-forward norm": 32 * (2 * 128 + 4), "feed-forward": 32 * 3 * 256,
    }  # fmt: skip
    assert layer_activations(config_of(), 0, True) == {"layer input": 32 * 128}
    assert layer_activations(config_of(), 0, False, device=CPU)["feed-forward"] == 32 * 5 * 256
    halves = layer_activations(config_of(parallel={"tp": 2}), 0, False)
    assert {name: 2 * count for name, count in halves.items()} == kept, "sequence parallelism leaves nothing whole"
    # fp32 sums stay what they are
    assert sum(layer_activations(config_of(**FP32), 0, False).values()) == 2 * sum(kept.values()) - 32 * 24


def test_activations_of_an_moe_layer_by_hand() -> None:
    """32 tokens in bf16, top-2 of 8 experts. Router: 8 normalized logits and 1 / std, 2 indices and weights, 8 of the gate. Plan: 9 bytes for each of 8
    experts, two maps of 64 rows, 32 + 1 beginnings of bags; then rows of 64 numbers and their weights."""
    router, plan = 32 * ((8 + 1) * 4 + 2 * (8 + 4) + 8 * 4), 32 * 8 * 9 + (2 * 64 + 32 + 1) * 8
    moe = {"num_experts": 8, "topk": 2, "aux_loss": "report"}
    kept = layer_activations(config_of(moe=moe), 0, False)
    assert {name: kept[name] for name in ("router", "permutation", "experts")} == {
        "router": router, "permutation": plan + 64 * (128 + 4), "experts": 64 * 2 * 128 * 2,
    }  # fmt: skip
    silent = layer_activations(config_of(moe={**moe, "aux_loss": "none", "gate_norm": False}), 0, False)
    assert silent["router"] == 32 * 2 * (8 + 4)
    alone = layer_activations(config_of(moe={**moe, "topk": 1, "z_loss_coefficient": 0.1}), 0, False)
    assert alone["router"] == 32 * ((8 + 1) * 4 + 8 + 8 * 4 + 8 * 4 + (8 + 1) * 4), "the softmax over all is kept, and raw logits"
    # With experts of other ranks, rows are sorted once more: two maps of 64.
    assert layer_activations(config_of(moe=moe, parallel={"ep": 2}), 0, False)["permutation"] == plan + 64 * (128 + 4) + 2 * 64 * 8
    # Recomputed, layers keep their inputs; dispatchers keep plans all the same, once, however many micro-batches there are. 28 bytes a token came with it.
    (recomputed,) = stage_memory(config_of(moe=moe, parallel={"recompute": "full"}), 1)
    assert recomputed.activations == 32 * 28 + 4 * (32 * 128 + plan)


@pytest.mark.parametrize(("moe", "parallel", "balanced", "worst"), [
    ({}, {}, 64, 64),
    ({"capacity_factor": 0.5}, {}, 64, 64),  # dropped assignments have rows too
    ({"capacity_factor": 0.5, "pad_to_capacity": True}, {}, 32, 32),
    ({}, {"ep": 4}, 64, 256),
    ({}, {"ep": 8}, 64, 256),  # one expert a rank: each token comes once
    ({"capacity_factor": 1.0}, {"ep": 4}, 64, 64),
    ({}, {"tp": 2, "ep": 2}, 32, 64),
    ({}, {"tp": 2, "etp": 2}, 64, 64),
])  # fmt: skip
def test_rows_of_experts_by_hand(moe: dict[str, Any], parallel: dict[str, Any], balanced: int, worst: int) -> None:
    """32 tokens, top-2 of 8 experts; fc1's output of one row is 2 x 128 numbers in bf16, or half of them with two ranks to an expert."""
    config = config_of(moe={"num_experts": 8, "topk": 2, **moe}, parallel=parallel)
    for rows, worst_case in ((balanced, False), (worst, True)):
        assert layer_activations(config, 0, False, worst_case=worst_case)["experts"] == rows * 2 * 128 * 2 // config.parallel.etp


def test_held_bytes_by_hand() -> None:
    """bf16: 2 + 4 on every rank, 4 + 8 shared by those that hold the same; experts are shared by fewer."""
    config = config_of(moe={"num_experts": 4}, parallel={"ep": 2})
    experts, routers = 4 * 2 * 3 * 64 * 128, 4 * 4 * 64
    dense = 2 * 1024 * 64 + 4 * (4 * 64 * 64 + 2 * 64) + 64
    (held,) = stage_memory(config, 8)
    padded = -(-dense // 128) * 128  # megatron-core's buffers
    assert (held.weights, held.gradients) == (2 * (padded + experts) + 4 * routers, 4 * (padded + experts + routers))
    assert (held.masters, held.moments) == (4 * (padded // 8 + experts // 4), 8 * ((padded + routers) // 8 + experts // 4))
    (half,) = stage_memory(config_of(moe={"num_experts": 4}, parallel={"ep": 2}, optim={"moments": "bf16"}), 8)
    assert 2 * half.moments == held.moments and half.made_once - held.made_once == 2 * 2 * 4 * GPU.optimizer_numbers
    (fp32,) = stage_memory(config_of(moe={"num_experts": 4}, parallel={"ep": 2}, **FP32), 8)
    assert fp32.masters == 0 and fp32.weights == fp32.gradients


def test_recomputation_and_the_router_move_memory_as_they_must() -> None:
    def step(**sections: dict[str, Any]) -> int:
        return stage_memory(config_of(moe={"num_experts": 8, **sections.pop("moe", {})}, data={"mock": True, "seq_length": 2048}, **sections), 8)[0].step

    none = step(parallel={"pp": 2})
    by_layers = [step(parallel={"pp": 2, "recompute": "full", "recompute_layers": layers}) for layers in (0, 1, 2)]
    assert none == by_layers[0] > by_layers[1] > by_layers[2]
    assert step(parallel={"pp": 2, "recompute": "selective", "recompute_modules": ["layernorm", "moe"]}) < none
    config = config_of(moe={"num_experts": 8}, parallel={"ep": 4}, data={"mock": True, "seq_length": 2048})
    balanced, worst = stage_memory(config, 8)[0], stage_memory(config, 8, worst_case=True)[0]
    assert balanced.held == worst.held and balanced.step < worst.step


def test_tied_embeddings_are_held_by_both_ends() -> None:
    first, last = stage_memory(config_of(model={"tie_embeddings": True}, parallel={"pp": 2}), 2)
    assert first.weights == last.weights - 2 * 128, "the final norm, in a padded buffer"
    one, two = (stage_memory(config_of(model={"tie_embeddings": tied}), 1)[0] for tied in (True, False))
    assert two.weights - one.weights == 2 * 1024 * 64


def test_a_large_run_is_planned_at_once() -> None:
    stages = stage_memory(load_config([str(ROOT / "configs" / "skywork_moe_146b.yaml")], [], 1536), 1536)
    assert len(stages) == 12 and all(stage.total < 80e9 for stage in stages), "it ran on 80 GB"
