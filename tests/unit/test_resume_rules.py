"""What may change between a checkpoint and the run that goes on from it: every setting has an answer, and every refusal says what to type."""

from __future__ import annotations

from typing import Any

import pytest
from training_bodies import BASE, merged

from megatron_skywork.config.load import check_config, dump_config, read_file
from megatron_skywork.config.manual import settings
from megatron_skywork.config.resume_rules import CLASSES, FREE, NEVER, ON_REQUEST, WORLD_SIZE, compare, is_allowed, read_saved, require_allowed
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import CheckpointError, ConfigError

MOE: dict[str, Any] = merged(BASE, {"model": {"tie_embeddings": False}})
DENSE = merged(BASE, {"moe": None})


def made(*parts: dict[str, Any]) -> Config:
    return Config(**merged(*parts))


def kinds(old: dict[str, Any], new: dict[str, Any], **more: Any) -> dict[str, str]:
    return {change.key: change.kind for change in compare(Config(**old), Config(**new), **{"world_sizes": (1, 1), **more})}


def test_every_setting_has_its_class():
    """A new setting belongs into one of the lists of resume_rules.py; a removed one leaves them."""
    names = {setting.name for setting in settings()}
    assert names - set(CLASSES) == set(), "classify these in config/resume_rules.py"
    options = {name for name in CLASSES if name.startswith("megatron.")} | {WORLD_SIZE}
    assert set(CLASSES) - names == options, "these are no settings"


def test_no_setting_is_in_two_lists():
    from megatron_skywork.config import resume_rules

    lists = [resume_rules._NEVER, resume_rules._ON_REQUEST, resume_rules._FREE, list(resume_rules._DEPENDS)]
    assert len(CLASSES) == sum(len(names) for names in lists)


def test_nothing_changed():
    assert kinds(MOE, MOE) == {} == kinds(DENSE, DENSE)


@pytest.mark.parametrize(("part", "expected"), [
    ({"model": {"hidden_size": 64}}, {"model.hidden_size": NEVER}),
    ({"moe": {"num_experts": 8}}, {"moe.num_experts": NEVER}),
    ({"moe": None}, {"moe": NEVER}),
    ({"optim": {"lr": 1.0}, "run_dir": "elsewhere"}, {"run_dir": FREE, "optim.lr": ON_REQUEST}),
    ({"moe": {"adaptive": {"enabled": True}, "capacity_factor": 1.0}}, {"moe.capacity_factor": ON_REQUEST, "moe.adaptive.enabled": ON_REQUEST}),
    ({"megatron": {"softmax_scale": 0.5}}, {"megatron.softmax_scale": ON_REQUEST}),
    ({"megatron": {"moe_router_enable_expert_bias": True}}, {"megatron.moe_router_enable_expert_bias": NEVER}),
    ({"parallel": {"tp": 2, "recompute": "full"}}, {"parallel.tp": FREE, "parallel.recompute": FREE}),
    ({"parallel": {"tp": 2}, "model": {"hidden_dropout": 0.1}}, {"parallel.tp": ON_REQUEST, "model.hidden_dropout": ON_REQUEST}),
    ({"train": {"micro_batch_size": 2}}, {"train.micro_batch_size": ON_REQUEST}),
    ({"train": {"micro_batch_size": 2}, "moe": {"aux_loss": "none"}}, {"train.micro_batch_size": FREE, "moe.aux_loss": ON_REQUEST}),
    ({"train": {"steps": 40}}, {"train.steps": FREE}),  # the schedule of BASE is constant
    ({"train": {"steps": 40}, "optim": {"schedule": "cosine"}}, {"train.steps": ON_REQUEST, "optim.schedule": ON_REQUEST}),
    ({"train": {"steps": 40}, "optim": {"schedule": "cosine", "decay_steps": 30}},
     {"train.steps": FREE, "optim.schedule": ON_REQUEST, "optim.decay_steps": ON_REQUEST}),
    ({"resume": {"mode": "strict"}}, {}),
])
def test_kinds(part: dict[str, Any], expected: dict[str, str]):
    assert kinds(MOE, merged(MOE, part)) == expected


def test_capacity_per_rank_and_dropout_tie_a_run_to_its_layout():
    by_rank = merged(MOE, {"moe": {"capacity_factor": 1.0, "capacity_scope": "rank"}})
    assert kinds(by_rank, merged(by_rank, {"parallel": {"tp": 2}})) == {"parallel.tp": ON_REQUEST}
    assert kinds(MOE, MOE, world_sizes=(1, 2)) == {WORLD_SIZE: FREE}
    drawing = merged(DENSE, {"model": {"attention_dropout": 0.1}})
    assert kinds(drawing, drawing, world_sizes=(1, 2)) == {WORLD_SIZE: ON_REQUEST}


def test_a_value_written_out_is_no_change():
    written = {"model": {"head_dim": 8, "num_query_groups": 4}, "moe": {"ffn_hidden_size": 48, "layers": [0, 1, 2, 3]}}
    assert kinds(MOE, merged(MOE, written)) == {}


def test_data_are_known_by_content():
    old = merged(MOE, {"data": {"mock": False, "train": [{"path": "/a"}], "tokenizer": "/t"}})
    moved = merged(old, {"data": {"train": [{"path": "/b"}], "tokenizer": "/u"}})
    same = {"tokenizer": "f" * 64, "train": [{"sha256": "1" * 64, "weight": 1.0}]}
    other = {"tokenizer": "f" * 64, "train": [{"sha256": "2" * 64, "weight": 1.0}]}
    assert kinds(old, moved, old_data=same, new_data=same) == {"data.train": FREE, "data.tokenizer": FREE}
    assert kinds(old, old, old_data=same, new_data=other) == {"data.train": ON_REQUEST}
    assert kinds(old, moved, old_data=same, new_data=other) == {"data.train": ON_REQUEST, "data.tokenizer": FREE}
    assert kinds(old, moved) == {"data.train": ON_REQUEST, "data.tokenizer": FREE}
    assert kinds(old, old, old_data=same, new_data={**same, "tokenizer": "e" * 64}) == {"data.tokenizer": NEVER}


def refusals(old: Config, new: Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        require_allowed(compare(old, new, world_sizes=(1, 1)), new, "runs/x/step")
    return caught.value.problems


def test_all_refusals_come_at_once_with_both_values_and_what_to_type():
    new = made(MOE, {"model": {"hidden_size": 64}, "optim": {"lr": 1.0, "beta1": 0.5}, "train": {"seed": 7}, "resume": {"allow_change": ["optim.beta1"]}})
    found = refusals(Config(**MOE), new)
    assert found == [
        "model.hidden_size=64, and runs/x/step was saved with 32; what was saved has no meaning under another value: set it back, or choose another run_dir",
        "optim.lr=1.0, and runs/x/step was saved with 0.003; results would differ: set it back, or allow it with "
        "resume.allow_change='[optim.beta1, optim.lr]'",
        "train.seed=7, and runs/x/step was saved with 1234; results would differ: set it back, or allow it with "
        "resume.allow_change='[optim.beta1, train.seed]'",
        "resume.allow_change='[optim.beta1, optim.lr, train.seed]' allows all 2 of these changes",
    ]


@pytest.mark.parametrize("allowed", ["[optim.lr, train.seed]", "['optim.*', train.seed]", "[optim, train]", "['*']"])
def test_what_is_allowed_may_change(allowed: str):
    import yaml

    new = made(MOE, {"optim": {"lr": 1.0}, "train": {"seed": 7}, "resume": {"allow_change": yaml.safe_load(allowed)}})
    check_config(new)
    require_allowed(compare(Config(**MOE), new, world_sizes=(1, 1)), new, "x")
    with pytest.raises(ConfigError, match="model.norm_epsilon" if "*" not in yaml.safe_load(allowed) else "model.hidden_size"):
        worse = merged(new.model_dump(), {"model": {"norm_epsilon": 1e-3, "hidden_size": 64}})
        require_allowed(compare(Config(**MOE), Config(**worse), world_sizes=(1, 1)), Config(**worse), "x")


def test_a_lone_name_is_a_list_of_one():
    assert made(MOE, {"resume": {"allow_change": "optim.lr"}}).resume.allow_change == ["optim.lr"]
    assert is_allowed("optim.lr", ["optim.lr"]) and not is_allowed("optim.lr_decay", ["optim.lr"])


@pytest.mark.parametrize(("allow", "answer"), [
    ("optim.lrr", "did you mean optim.lr"), ("moe.num_experts", "can never change"), ("optim.x*", "there is no such setting")])
def test_names_that_allow_nothing_are_refused(allow: str, answer: str):
    with pytest.raises(ConfigError, match=f"resume.allow_change names .*{answer}"):
        check_config(made(MOE, {"resume": {"allow_change": [allow]}}))


def test_a_mistyped_mode_is_no_path():
    with pytest.raises(ValueError, match="mode=atuo is neither auto, strict, none nor the path"):
        made(MOE, {"resume": {"mode": "atuo"}})
    assert made(MOE, {"resume": {"mode": "./atuo"}}).resume.mode == "./atuo"


def test_settings_of_other_versions_can_be_read(tmp_path):
    config = made(MOE, {"data": {"valid": {"held_out": [{"path": "x"}]}}})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert read_saved(read_file(path).values, str(path)) == config
    values = config.model_dump(mode="python")
    values["checkpoint"]["resume"], values["gone"] = "auto", {"a": 1}
    del values["resume"], values["optim"]["eps"]
    assert read_saved(values, "x") == config
    with pytest.raises(CheckpointError, match="x: these are no settings of a run"):
        read_saved({**values, "train": {"steps": "many"}}, "x")
