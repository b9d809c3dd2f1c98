"""Impossible settings are answered with the nearest that work, checked by the trainer's own rules and the memory count."""

from pathlib import Path

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.config.validate import find_problems
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.hardware import load_cluster
from megatron_skywork.plan.layout_costs import changed
from megatron_skywork.plan.memory import RESERVE_BYTES, stage_memory
from megatron_skywork.plan.nearest import nearest, overrides_between

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = str(CONFIGS / "skywork_13b.yaml")
# 8 GPUs of 80 GB for 13.9 B parameters.
NODE = load_cluster("dgx_h100:1")


def small(**parallel) -> Config:
    """A model of 4 layers and 4 experts, not checked."""
    values = {
        "model": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 100},
        "moe": {"num_experts": 4}, "data": {"mock": True, "seq_length": 64}, "train": {"steps": 2, "global_batch_size": 16},
    }  # fmt: skip
    return changed(Config.model_validate(values), parallel=parallel)


def works(config: Config, cluster=NODE) -> bool:
    room = cluster.gpu.memory_bytes - RESERVE_BYTES
    again = Config.model_validate(config.model_dump())
    return not find_problems(again, cluster.world_size, set()) and max(memory.total for memory in stage_memory(again, cluster.world_size)) <= room


def test_what_works_needs_no_answer():
    assert nearest(small(tp=2, pp=2, ep=2), NODE) is None


@pytest.mark.parametrize(("parallel", "train", "overrides"), [
    ({"tp": 3}, {}, ["parallel.tp=4"]),                                          # 3 divides neither 8 GPUs nor 4 heads
    ({"ep": 3}, {}, ["parallel.ep=4"]),
    ({"pp": 3, "layers_per_stage": [1, 1, 2]}, {}, ["parallel.pp=4", "parallel.layers_per_stage=[1,1,1,1]"]),
    ({"pp": 8}, {}, ["parallel.pp=4"]),                                          # 4 layers
    ({"layers_per_stage": [2, 3], "pp": 2}, {}, ["parallel.layers_per_stage=[2,2]"]),
    ({}, {"global_batch_size": 17}, ["train.global_batch_size=16"]),
    ({}, {"global_batch_size": 23}, ["train.global_batch_size=24"]),
    ({"pp": 2, "vpp": 2}, {"global_batch_size": 12}, None),                      # 3 micro-batches do not go round 2 stages; one change of several kinds does
])  # fmt: skip
def test_the_nearest_is_one_change(parallel, train, overrides):
    config = changed(small(**parallel), train=train)
    found = nearest(config, NODE)
    assert works(found.config) and not works_as_given(config)
    assert found.reasons == find_problems(config, NODE.world_size, set())
    assert overrides is None or found.overrides == overrides
    assert len([one for one in found.overrides if "layers_per_stage" not in one]) <= 1


def works_as_given(config: Config) -> bool:
    return not find_problems(config, NODE.world_size, set())


def test_overrides_are_what_the_command_line_takes(tmp_path):
    """Typed after the wrong setting, they make a configuration that loads."""
    found = nearest(changed(load_config([SMALL], [], 512), parallel={"pp": 3}), load_cluster(str(CONFIGS / "clusters" / "a800_64x8.yaml")))
    loaded = load_config([SMALL], ["parallel.pp=3", *found.overrides], 512)
    assert loaded == found.config and overrides_between(loaded, found.config) == []


def test_two_wrong_settings_are_two_changes():
    found = nearest(changed(small(tp=3), train={"global_batch_size": 17}), NODE)
    assert sorted(one.split("=")[0] for one in found.overrides) == ["parallel.tp", "train.global_batch_size"] and works(found.config)


def test_too_little_memory_names_bytes_and_stage_and_the_fastest_change():
    config = load_config([SMALL], ["parallel.tp=1", "parallel.pp=4", "train.global_batch_size=64", "train.micro_batch_size=8"], 8)
    room = NODE.gpu.memory_bytes - RESERVE_BYTES
    totals = [memory.total for memory in stage_memory(config, 8)]
    assert max(totals) > room
    found = nearest(config, NODE)
    assert f"stage {totals.index(max(totals)) + 1} of 4" in found.reasons[0] and f"{max(totals) - room:,.0f} more" in found.reasons[0]
    assert works(found.config) and found.overrides
    assert all(found.step_seconds <= seconds for _, seconds in found.alternatives)


def test_what_fits_nowhere_is_said_with_what_it_would_take():
    config = load_config([str(CONFIGS / "skywork_moe_146b.yaml")], ["parallel.pp=1", "parallel.layers_per_stage=null", "train.global_batch_size=16"], 8)
    with pytest.raises(ConfigError, match="more GPUs"):
        nearest(config, NODE)


def test_rules_that_no_layout_mends_are_left_to_the_user():
    config = changed(small(), optim={"warmup_steps": 5})
    with pytest.raises(ConfigError, match="optim.warmup_steps=5"):
        nearest(config, NODE)
