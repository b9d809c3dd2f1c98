"""Recomputation changes what is kept, never what is computed: losses, gradients and routers' statistics are those of a run without it, to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from ranks import RankPool
from recompute_bodies import gradients, kept_bytes
from training_bodies import BASE, merged

# Every other layer is dense, a layer has a shared expert, and whatever is random or drops tokens is on: all of it has to fall the same way twice.
SETTINGS = merged(BASE, {
    "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "moe": {"layers": [1, 3], "shared_expert_ffn_hidden_size": 16, "capacity_factor": 1.0, "z_loss_coefficient": 0.01, "aux_coefficient": 0.1},
    "train": {"global_batch_size": 4},
})  # fmt: skip
JITTER = {"megatron": {"moe_input_jitter_eps": 0.1}}
MODULES = ["core_attn", "layernorm", "mlp", "moe_act", "router", "shared_experts"]
Gradients = dict[str, np.ndarray]
NONE: dict[str, Any] = {"recompute": "none"}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute": "selective", "recompute_modules": list(modules)}


def differing(found: Gradients, expected: Gradients) -> list[str]:
    """Parameters whose gradients are not equal to the last bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not np.array_equal(found[name], expected[name])]


@pytest.mark.parametrize(("world_size", "parallel", "most"), [(1, {}, 2), (2, {"tp": 2}, 1), (2, {"ep": 2, "overlap": True}, 1)])
def test_modules_and_their_combinations(ranks: RankPool, world_size: int, parallel: dict, most: int) -> None:
    combinations = [names for count in range(1, most + 1) for names in itertools.combinations(MODULES, count)]
    combinations += [tuple(MODULES), ("moe",), ("core_attn", "layernorm", "mlp", "moe")]
    choices = {"full": {"recompute": "full"}, **{" ".join(names): selective(*names) for names in combinations}}
    # Behind a recomputed norm linear maps do not add gradients to their buffers themselves (weight_gradients.py): like is compared with like.
    behind = {name: choice for name, choice in choices.items() if "layernorm" in name}
    alone = {name: choice for name, choice in choices.items() if name not in behind}
    for fused, some in ((True, alone), (False, behind)):
        settings = merged(SETTINGS, JITTER, {"parallel": parallel, "megatron": {"gradient_accumulation_fusion": fused}})
        for answer in ranks.run(world_size, gradients, settings, {"none": NONE, **some}):
            expected = answer.pop("none")
            dropped = [window[2 * BASE["moe"]["num_experts"]] for _, window in expected["statistics"]]
            assert len(dropped) == 2 and all(dropped), "tokens must be dropped"
            for name, found in answer.items():
                assert found["loss"] == expected["loss"], name
                assert found["statistics"] == expected["statistics"], name
                assert differing(found["gradients"], expected["gradients"]) == [], name


def test_half_precision(ranks: RankPool) -> None:
    choices = {"none": NONE, "all": selective(*MODULES)}
    (answer,) = ranks.run(1, gradients, merged(SETTINGS, {"train": {"precision": "bf16"}}), choices)
    assert differing(answer["all"]["gradients"], answer["none"]["gradients"]) == []


STAGES = {
    "pp4": ({"pp": 4, "layers_per_stage": [1, 2, 2, 1]}, {
        "one for all": (1, [1, 1, 1, 1]),
        "a number per stage": ([0, 2, 1, 1], [0, 2, 1, 1]),
        "all": (None, [1, 2, 2, 1]),
        "more than some have": (2, [1, 2, 2, 1]),
    }),
    "pp2 interleaved": ({"pp": 2, "vpp": 2, "layers_per_stage": [1, 2, 2, 1]}, {
        "one for all": (1, [1, 1, 1, 1]),
        "a number per chunk": ([1, 0, 2, 0], [1, 0, 2, 0]),
        "the first chunk of each stage has none": ([0, 0, 1, 1], [0, 0, 1, 1]),
    }),
    "pp2 interleaved, overlapped": ({"pp": 2, "vpp": 2, "layers_per_stage": [1, 2, 2, 1], "overlap": True}, {
        "a number per chunk": ([0, 1, 2, 1], [0, 1, 2, 1]),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_layers_of_each_stage(ranks: RankPool, name: str) -> None:
    parallel, cases = STAGES[name]
    settings = merged(SETTINGS, {"model": {"num_layers": 6}, "parallel": parallel})
    choices = {"none": NONE, **{case: {"recompute": "full", "recompute_layers": asked} for case, (asked, _) in cases.items()}}
    answers = ranks.run(parallel["pp"], gradients, settings, choices)
    for case, (_, again) in cases.items():
        forwards: dict[int, float] = {}
        for rank, answer in enumerate(answers):
            assert differing(answer[case]["gradients"], answer["none"]["gradients"]) == [], (case, rank)
            assert answer[case]["statistics"] == answer["none"]["statistics"], (case, rank)
            assert answer[case]["loss"] == answer["none"]["loss"], (case, rank)
            forwards.update(answer[case]["forwards"])
        starts = itertools.accumulate(parallel["layers_per_stage"], initial=0)
        twice = {start + layer + 1 for start, count in zip(starts, again, strict=False) for layer in range(count)}
        assert forwards == {layer: 2 if layer in twice else 1 for layer in range(1, 7)}, case


def test_every_module_leaves_less_for_backward(ranks: RankPool) -> None:
    """Bytes alive after a forward; what each module saves, a token and layer that has it, is printed."""
    tokens, hidden = 256, 64
    settings = merged(SETTINGS, {
        "model": {"hidden_size": hidden, "ffn_hidden_size": 128, "max_position_embeddings": tokens, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        "moe": {"shared_expert_ffn_hidden_size": 128, "num_experts": 16, "capacity_factor": 2.0},
        "data": {"seq_length": tokens},
        "train": {"precision": "bf16"},
    })  # fmt: skip
    modules = [name for name in MODULES if name != "moe_act"]  # GroupedExperts never keep it
    choices = {"none": NONE, **{name: selective(name) for name in [*modules, "moe"]}, "all of them": selective(*modules), "full": {"recompute": "full"}}
    (kept,) = ranks.run(1, kept_bytes, settings, choices)
    layers = {"core_attn": 4, "layernorm": 4, "all of them": 4, "full": 4}
    saved = {name: (kept["none"] - bytes_) / (layers.get(name, 2) * tokens) for name, bytes_ in kept.items()}
    for name, bytes_ in saved.items():
        print(f"{name:<16} {bytes_:>8.0f} bytes a token and layer")
    assert all(saved[name] > 4 for name in choices if name != "none")
    assert saved["layernorm"] > 2 * 2 * hidden * 0.9, "both norms' outputs, in bf16"
    assert saved["full"] > saved["all of them"] > max(saved["core_attn"], saved["layernorm"])
