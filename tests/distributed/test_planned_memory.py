"""The planner's memory against every allocation that real models make on CPU ranks: what is held, what each layer keeps, and the peak of a step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.activations import CPU, given_rows, layer_activations, plan_bytes, tokens_of
from megatron_skywork.plan.communication import COMPUTE_BYTES
from megatron_skywork.plan.memory import stage_memory
from megatron_skywork.plan.stages import pieces, recomputed_layers

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)

from memory_cases import LAYOUTS, layout_settings  # noqa: E402


def trace(settings: dict[str, Any]) -> dict[str, Any]:
    """One step of this rank."""
    sys.path.insert(0, BENCHMARKS)
    from memory_trace import traced_step

    from megatron_skywork.model.build import unwrap

    def watched(chunk: Any) -> dict[str, Any]:
        found = {}
        for layer in unwrap(chunk).decoder.layers:
            attention, name = layer.self_attention, f"{layer.layer_number - 1}"
            found |= {name: layer, f"{name} norm": layer.input_layernorm, f"{name} qkv": attention.linear_qkv, f"{name} core": attention.core_attention}
            found[f"{name} feed-forward"] = layer.mlp
        return found

    return traced_step(settings, watched)


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_step_allocates_what_the_plan_says(ranks: RankPool, tmp_path: Path, case: str) -> None:
    world, settings = layout_settings(case)
    settings = {**settings, "run_dir": str(tmp_path)}
    config = Config(**settings)
    planned = stage_memory(config, world, device=CPU)
    for answer in ranks.run(world, trace, settings):
        stage = planned[answer["stage"]]
        assert stage.held == pytest.approx(answer["built_bytes"], rel=0.002)
        assert stage.step == pytest.approx(answer["peak_bytes"], rel=0.01), vars(stage)
        growth = {name.partition(" ")[2]: num_bytes for name, num_bytes in answer["growth"].items()}
        for layer in range(config.model.num_layers):
            if str(layer) in growth:
                check_layer(config, layer, growth[str(layer)])
                if config.parallel.recompute == "none":
                    check_modules(config, layer, growth)


def check_layer(config: Config, layer: int, growth: int) -> None:
    """What a layer keeps against what its forward left, within 1.5 % of what it would keep without recomputation."""
    piece = next(number for number, layers in enumerate(pieces(config)) if layer in layers)
    recomputed = pieces(config)[piece].index(layer) < recomputed_layers(config)[piece]
    kept = sum(layer_activations(config, layer, recomputed, device=CPU).values())
    if layer in config.moe_layers and (recomputed or (config.parallel.recompute == "selective" and "moe" in config.parallel.recompute_modules)):
        kept += plan_bytes(config, given_rows(config))  # the dispatcher has it, one for all micro-batches
    without = config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": "none"})})
    assert kept == pytest.approx(growth, abs=0.015 * sum(layer_activations(without, layer, False, device=CPU).values())), layer


def check_modules(config: Config, layer: int, growth: dict[str, int]) -> None:
    """Module by module. Its own output is there when a module returns, whether anybody keeps it or not."""
    kept = layer_activations(config, layer, False, device=CPU)
    output = tokens_of(config).rank * config.model.hidden_size * COMPUTE_BYTES[config.train.precision]
    assert growth[f"{layer} norm"] == kept["input norm"] - output
    assert growth[f"{layer} qkv"] == kept["qkv"]
    assert growth[f"{layer} core"] == kept["core attention"]
    modules = [name for name in ("feed-forward", "router", "permutation", "experts", "shared expert") if name in kept]
    # What a dispatcher knew of the micro-batch before may be let go of at any time.
    plan = plan_bytes(config, given_rows(config)) if layer in config.moe_layers else 0
    assert growth[f"{layer} feed-forward"] == pytest.approx(sum(kept[name] for name in modules) + output, abs=plan + 1000)
