"""Merging files, overrides, and the way back to YAML."""

from pathlib import Path

import pytest

from megatron_skywork.config.load import check_config, dump_config, load_config
from megatron_skywork.config.manual import manual_text, settings
from megatron_skywork.config.schema import Config, Source
from megatron_skywork.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE = """\
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, vocab_size: 500}
moe: {num_experts: 4, layers: [0, 2]}
data: {mock: true, seq_length: 64}
train: {steps: 10, global_batch_size: 8}
megatron: {no_rope_freq: [0, 1]}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def test_a_dense_model_needs_little(base):
    config = load_config([base], ["moe=null", "megatron={}"])
    assert config.moe is None and config.moe_layers == [] and config.model.backend == "auto" and config.parallel.etp == 1


def test_later_files_win_field_by_field(base, tmp_path):
    second, third = tmp_path / "second.yaml", tmp_path / "third.yaml"
    moe = "moe: {topk: 1, layers: [1], adaptive: {enabled: true, momentum: 0.5}, capacity_factor: 1.5}\n"
    second.write_text(moe + "train: {seed: 5}\nmegatron: {softmax_scale: 0.5}\n")
    third.write_text("moe: {adaptive: {momentum: 0.9}}\ntrain: {seed: 6}\n")
    config = load_config([base, str(second), str(third)])
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.topk, config.moe.layers) == (4, 1, [1])
    assert (config.moe.adaptive.enabled, config.moe.adaptive.momentum) == (True, 0.9)
    assert (config.train.seed, config.train.steps) == (6, 10)
    assert config.megatron == {"no_rope_freq": [0, 1], "softmax_scale": 0.5}


def test_a_section_can_be_removed_and_added(base, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("moe: null\n")
    assert load_config([base, str(second)]).moe is None
    moe = load_config([base, str(second)], ["moe.num_experts=3"]).moe
    assert moe is not None and moe.num_experts == 3 and moe.layers is None


@pytest.mark.parametrize(("override", "path", "value"), [
    ("optim.lr=3e-4", "optim.lr", 3e-4),
    ("optim.lr=1", "optim.lr", 1.0),
    ("run_dir=runs/a b", "run_dir", "runs/a b"),
    ("run_dir=a=b", "run_dir", "a=b"),
    ("run_dir='010'", "run_dir", "010"),
    ("moe.adaptive.momentum=0.5", "moe.adaptive.momentum", 0.5),
    ("moe.layers=[1, 3]", "moe.layers", [1, 3]),
    ("moe.layers=null", "moe.layers", None),
    ("moe.adaptive={momentum: 0.1}", "moe.adaptive.momentum", 0.1),
    ("data.valid.held_out=x", "data.valid", {"held_out": [Source(path="x")]}),
    ("data.valid={a: [x, {path: y, weight: 2}]}", "data.valid", {"a": [Source(path="x"), Source(path="y", weight=2.0)]}),
    ("megatron.softmax_scale=0.5", "megatron", {"no_rope_freq": [0, 1], "softmax_scale": 0.5}),
    ("megatron={}", "megatron", {}),
    ("metrics.wandb=off", "metrics.wandb", "off"),
])
def test_overrides(base, override, path, value):
    found = load_config([base], [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_later_overrides_win_and_a_given_list_replaces(base):
    config = load_config([base], ["data.mock=false", "data.train=[a, b]", "data.train=c", "train.seed=1", "train.seed=2"])
    assert config.data.train == [Source(path="c")] and config.train.seed == 2


@pytest.mark.parametrize("overrides", [
    [],
    ["moe=null", "megatron={}"],
    ["run_dir='12:30:00'", "data.tokenizer='010'", "data.cache_dir='yes'", "metrics.wandb_project='# 1: a\u4e2d'"],
    ["data.mock=false", "data.train=[{path: a, weight: 0.1}, '3e-4']", "data.valid={'no': [x], b: [{path: y}]}", "optim.eps=1e-20", "optim.lr=0.1"],
    ["parallel.pp=2", "parallel.layers_per_stage=[1, 3]", "parallel.recompute=selective", "parallel.recompute_modules=[moe, core_attn]"],
    ["megatron={softmax_scale: null, softmax_type: vanilla, cp_comm_type: [p2p, a2a]}", "moe.capacity_factor=1.1", "moe.adaptive.enabled=true"],
])
def test_dump_and_load_is_the_same(base, tmp_path, overrides):
    config = load_config([base], overrides)
    text = dump_config(config)
    path = tmp_path / "dumped.yaml"
    path.write_text(text)
    again = load_config([str(path)])
    assert again == config and dump_config(again) == text and again.model_dump() == config.model_dump()
    assert isinstance(again.optim.lr, float)


@pytest.mark.parametrize(("name", "world_size"), [("tiny.yaml", 1), ("tiny.yaml", 2), ("skywork_13b.yaml", 512), ("skywork_moe_146b.yaml", 1536)])
def test_the_shipped_configurations_are_right(name, world_size):
    assert load_config([str(CONFIGS / name)], [], world_size).train.steps > 0


def test_every_shipped_file_lacks_at_most_what_a_second_file_brings():
    """Some files are the run's half of a configuration: the model's shape comes from an upcycled folder's model.yaml, the data from the command line."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        try:
            load_config([str(path)])
        except ConfigError as error:
            assert [problem for problem in error.problems if "and it is required" not in problem and "data.train is empty" not in problem] == [], path


def test_a_model_file_before_a_run_file(tmp_path, base):
    """An upcycled folder brings `model.yaml` with its sections; the run's file adds the rest."""
    model, run = tmp_path / "model.yaml", tmp_path / "run.yaml"
    model.write_text("model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, vocab_size: 100}\nmoe: {num_experts: 8}\n")
    run.write_text("moe: {capacity_factor: 1.5}\ndata: {mock: true}\ntrain: {steps: 1, global_batch_size: 1}\n")
    config = load_config([str(model), str(run)], [], 1)
    assert config.moe is not None and (config.moe.num_experts, config.moe.capacity_factor) == (8, 1.5)


def test_a_configuration_made_in_python_is_checked_too(base):
    config = load_config([base])
    check_config(config, 1)
    broken = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep": 3})})
    with pytest.raises(ConfigError, match="parallel.ep=3"):
        check_config(broken)


def test_the_manual_has_every_setting_with_a_type_a_default_and_a_sentence():
    found = {setting.name: setting for setting in settings()}
    assert len(found) > 90 and [setting for setting in found.values() if not setting.sentence.endswith(".")] == []
    assert (found["optim.lr"].type, found["optim.lr"].default) == ("a number above 0", "0.0003")
    assert (found["moe.num_experts"].type, found["moe.num_experts"].default) == ("a whole number from 2 up and up to 65536", "required")
    assert found["model.backend"].type == "one of auto, torch, te" and found["parallel.recompute_modules"].default == "[core_attn]"
    assert found["moe.adaptive.momentum"].type == "a number from 0 up and below 1"
    text = manual_text()
    assert all(f"  {name}  (" in text for name in found) and all(section in text for section in ("model:", "moe:", "checkpoint:"))
    assert "Annotated" not in text and "FieldInfo" not in text and "<class" not in text


def test_settings_cannot_be_changed_after_loading(base):
    config: Config = load_config([base])
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3  # type: ignore[misc]
