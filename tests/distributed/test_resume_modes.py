"""resume.mode, and what stands between a checkpoint and going on from it: settings, data, the place in the data, versions, records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from numbered_data import write_numbered
from ranks import RankPool
from resume_bodies import attempt, differences, live
from training_bodies import BASE, merged, records, reseal

from megatron_skywork.errors import CheckpointError, ConfigError
from megatron_skywork.train.status import Status

TINY = merged(
    BASE, {"model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16}, "train": {"steps": 4, "global_batch_size": 2}},
    {"checkpoint": {"every": 1, "keep": 9, "background": False}})


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def edit_state(folder: Path, **fields: Any) -> None:
    """Change what a checkpoint says of itself, as another version or another run would have written it."""
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**content, **fields}))
    reseal(folder)


@pytest.fixture(scope="module")
def done(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of numbered samples that did its four steps and saved each."""
    folder = tmp_path_factory.mktemp("modes")
    ranks.run(1, live, _settings(folder, folder / "done"))
    return folder


def _settings(folder: Path, run_dir: Path, *more: dict[str, Any]) -> dict[str, Any]:
    prefix = folder / "numbered"
    path = str(prefix) if prefix.with_suffix(".json").exists() else write_numbered(prefix, 10, 16)
    return merged(TINY, {"run_dir": str(run_dir), "data": {"mock": False, "train": [path]}}, *more)


def _copied(done: Path, to: Path, step: int) -> Path:
    """A run folder with the checkpoint of one step."""
    shutil.copytree(step_folder(done / "done", step), step_folder(to, step))
    return to


def test_strict_wants_a_checkpoint_and_none_wants_none(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    def answer(run_dir: Path, mode: str) -> str | None:
        return ranks.run(2, attempt, _settings(done, run_dir, {"resume": {"mode": mode}}))[1]

    assert f"{tmp_path}/new/checkpoints holds no checkpoint and resume.mode is strict" in str(answer(tmp_path / "new", "strict"))
    assert answer(_copied(done, tmp_path / "strict", 3), "strict") is None
    assert [record["step"] for record in records(tmp_path / "strict")] == [4]
    assert "exists and resume.mode is none" in str(answer(_copied(done, tmp_path / "none", 3), "none"))
    assert not (tmp_path / "none" / "metrics.jsonl").exists()
    assert answer(tmp_path / "fresh", "none") is None
    assert [record["step"] for record in records(tmp_path / "fresh")] == [1, 2, 3, 4]


def test_a_path_begins_there_and_the_same_command_goes_on(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    path = step_folder(done / "done", 2)
    settings = _settings(done, tmp_path, {"resume": {"mode": str(path)}})
    assert ranks.run(1, attempt, merged(settings, {"train": {"stop_at_step": 3}})) == [None]
    (resume,) = [event for event in records(tmp_path, "event") if event["event"] == "resume"]
    assert (resume["step"], resume["from_path"], resume["folder"]) == (2, str(path.resolve()), str(path))
    assert resume["changed"]["run_dir"] == [str(done / "done"), str(tmp_path)]
    # Started again with the same command, the run keeps what it has done since.
    assert ranks.run(1, attempt, settings) == [None]
    resume = [event for event in records(tmp_path, "event") if event["event"] == "resume"][-1]
    assert (resume["step"], resume["folder"]) == (3, str(step_folder(tmp_path, 3)))
    assert [name for name in differences(done / "done", tmp_path, step=4, first=3) if name != "state.json continues"] == []
    refusal = ranks.run(1, attempt, merged(settings, {"run_dir": str(tmp_path / "b"), "resume": {"mode": str(tmp_path / "nowhere")}}))[0]
    assert str(refusal).startswith(f"{CheckpointError.__name__}: resume.mode={tmp_path}/nowhere")


def test_a_path_in_the_run_s_own_past_sets_the_later_ones_aside(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "done", tmp_path / "run")
    path = step_folder(tmp_path / "run", 2)
    assert ranks.run(1, attempt, _settings(done, tmp_path / "run", {"resume": {"mode": str(path)}, "train": {"stop_at_step": 3}})) == [None]
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("*step_*"))
    assert names == ["aside-step_00000003", "aside-step_00000004", "step_00000001", "step_00000002", "step_00000003"]
    assert ranks.run(1, attempt, _settings(done, tmp_path / "run")) == [None], "and auto goes on in the new line"
    resumes = [event["step"] for event in records(tmp_path / "run", "event") if event["event"] == "resume"]
    assert resumes == [2, 3]


def test_a_path_of_another_run_sets_all_checkpoints_of_this_one_aside(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    """An earlier one would be what a rewind goes back to, or the next start, if the run dies before its first save."""
    _copied(done, tmp_path / "run", 1)
    path = step_folder(done / "done", 2)
    ranks.run(1, live, _settings(done, tmp_path / "run", {"resume": {"mode": str(path)}, "checkpoint": {"every": 0}}), None, 1)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("*step_*")] == ["aside-step_00000001"]
    assert "holds no checkpoint" in str(ranks.run(1, attempt, _settings(done, tmp_path / "run"))[0])


def test_fresh_weights_never_take_the_place_of_lost_ones(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "done", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "checkpoints")
    refusal = str(ranks.run(1, attempt, _settings(done, tmp_path / "lost"))[0])
    assert "metrics.jsonl says that step 4 was saved" in refusal and "resume.mode=PATH, or choose another run_dir" in refusal
    # The record may be gone as well.
    (tmp_path / "status").mkdir()
    for status, step, refused in (("stopped", 3, True), ("done", 4, True), ("running", 2, True), ("running", 0, False), ("failed", 3, False)):
        (tmp_path / "status" / "run_status.json").write_text(json.dumps({"status": status, "step": step}))
        answer = ranks.run(1, attempt, _settings(done, tmp_path / "status", {"checkpoint": {"save_at_end": False, "every": 0}}))[0]
        assert (answer is not None and f"run_status.json says {status} at step {step}" in answer) == refused, (status, step, answer)
    # Processes that start, and are refused, replace the status; what the one before them came to must still be there.
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "run_status.json").write_text(json.dumps({"status": "stopped", "step": 3}))
    for _ in range(2):
        status = Status(tmp_path / "starts", is_writer=True)
        status.write("starting", step=None)
        assert "run_status.json says stopped at step 3" in str(ranks.run(1, attempt, _settings(done, tmp_path / "starts"))[0])
        status.write("failed", step=None, reason="refused", exit_code=3)


def test_a_run_that_never_saved_starts_again_and_says_so(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    settings = _settings(done, tmp_path, {"checkpoint": {"every": 0}})
    ranks.run(1, live, settings, None, 2)
    assert [record["step"] for record in records(tmp_path)] == [1, 2] and not list(tmp_path.glob("checkpoints/*"))
    ranks.run(1, live, settings)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    (restart,) = [event for event in records(tmp_path, "event") if event["event"] == "restart"]
    assert "had done 2 steps and saved none of them" in restart["reason"]


def test_settings_are_compared_with_the_saved_ones(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    run_dir = _copied(done, tmp_path / "run", 3)
    changed = {"optim": {"lr": 0.5}, "train": {"seed": 7}, "moe": {"num_experts": 8}, "metrics": {"router": False}}
    refusal = str(ranks.run(2, attempt, _settings(done, run_dir, changed))[1])
    assert refusal.startswith(ConfigError.__name__)
    assert "moe.num_experts=8, and " in refusal and "optim.lr=0.5, and " in refusal and "train.seed=7, and " in refusal
    assert "resume.allow_change='[optim.lr, train.seed]' allows all 2" in refusal and not (run_dir / "metrics.jsonl").exists()
    allowed = {**changed, "moe": {}, "resume": {"allow_change": ["optim.*", "train.seed"]}}
    assert ranks.run(2, attempt, _settings(done, run_dir, allowed)) == [None, None]
    (resume,) = [event for event in records(run_dir, "event") if event["event"] == "resume"]
    assert resume["changed"] == {
        "run_dir": [str(done / "done"), str(run_dir)], "optim.lr": [0.003, 0.5], "train.seed": [1234, 7], "metrics.router": [True, False], "world_size": [1, 2]}
    assert records(run_dir)[0]["learning_rate"] == 0.5


def test_routers_begin_a_state_that_was_asked_for_and_leave_one_that_was_not(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    run_dir = _copied(done, tmp_path / "run", 2)
    adaptive = {"moe": {"capacity_factor": 8.0, "aux_scope": "global_batch", "adaptive": {"enabled": True, "momentum": 0.5}}}
    refusal = str(ranks.run(1, attempt, _settings(done, run_dir, adaptive))[0])
    assert all(name in refusal for name in ("moe.adaptive.enabled", "moe.capacity_factor", "moe.aux_scope"))
    on = merged(adaptive, {"resume": {"allow_change": ["moe"]}, "train": {"stop_at_step": 3}})
    assert ranks.run(1, attempt, _settings(done, run_dir, on)) == [None]
    # Nothing is dropped, so each step halves the coefficient. It begins with the setting, and turned off it is the setting again.
    assert ranks.run(1, attempt, _settings(done, run_dir, {"resume": {"allow_change": ["moe"]}})) == [None]
    assert [record["router"]["coefficient"] for record in records(run_dir)] == [[pytest.approx(0.01)], [pytest.approx(0.01)]]


@pytest.mark.parametrize(("old", "new"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "bf16")])
def test_precision_may_change_on_request(ranks: RankPool, tmp_path: Path, old: str, new: str) -> None:
    settings = merged(TINY, {"run_dir": str(tmp_path), "train": {"precision": old}, "optim": {"lr": 1e-5}, "checkpoint": {"every": 2}})
    ranks.run(1, live, merged(settings, {"train": {"stop_at_step": 2}}))
    changed = merged(settings, {"train": {"precision": new}})
    assert "train.precision" in str(ranks.run(1, attempt, changed)[0])
    assert ranks.run(1, attempt, merged(changed, {"resume": {"allow_change": "train.precision"}})) == [None]
    before, after = records(tmp_path)[1]["loss"], records(tmp_path)[2]["loss"]
    assert after == pytest.approx(before, rel=0.02) and after != before


def test_other_data_and_another_tokenizer_are_noticed_by_content(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    run_dir = _copied(done, tmp_path / "run", 3)

    def answer(name: str, *more: dict[str, Any]) -> str | None:
        return ranks.run(1, attempt, _settings(done, run_dir, {"data": {"train": [str(tmp_path / name)]}}, *more))[0]

    write_numbered(tmp_path / "moved" / "x", 10, 16)
    write_numbered(tmp_path / "other", 10, 16, first=3)
    write_numbered(tmp_path / "tokenized", 10, 16, tokenizer="u")
    assert "ConfigError: data.train=" in str(answer("other")) and "resume.allow_change='[data.train]'" in str(answer("other"))
    assert 'data.tokenizer="content uuuuuuuuuuuu", and ' in str(answer("tokenized", {"resume": {"allow_change": ["data"]}}))
    assert answer("moved/x", {"train": {"stop_at_step": 4}}) is None, "the same content elsewhere is the same data"
    shutil.rmtree(step_folder(run_dir, 4))
    assert answer("other", {"resume": {"allow_change": ["data.train"]}}) is None


def test_the_place_in_the_data_is_held_against_the_number_of_samples(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    run_dir = _copied(done, tmp_path / "run", 3)
    assert json.loads((step_folder(run_dir, 3) / "state.json").read_text())["position"] == [{"epochs": 0, "samples": 6}]
    edit_state(step_folder(run_dir, 3), position=[{"epochs": 0, "samples": 5}])
    assert "would repeat samples" in str(ranks.run(1, attempt, _settings(done, run_dir))[0])


def test_other_versions_are_a_warning(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    run_dir = _copied(done, tmp_path / "run", 3)
    versions = json.loads((step_folder(run_dir, 3) / "state.json").read_text())["versions"]
    edit_state(step_folder(run_dir, 3), versions={**versions, "torch": "1.0"}, wandb_id="abcd1234")
    assert ranks.run(1, attempt, _settings(done, run_dir)) == [None]
    (resume,) = [event for event in records(run_dir, "event") if event["event"] == "resume"]
    assert any("was saved by other versions" in warning and "torch 1.0 -> " in warning for warning in resume["warnings"])
    # The run goes on as the same one in W&B, also where only its checkpoints were brought here.
    assert (run_dir / "wandb_id.txt").read_text().strip() == "abcd1234"
    assert json.loads((step_folder(run_dir, 4) / "state.json").read_text())["wandb_id"] == "abcd1234"


def test_a_damaged_state_is_refused(ranks: RankPool, done: Path, tmp_path: Path) -> None:
    run_dir = _copied(done, tmp_path / "run", 3)
    edit_state(step_folder(run_dir, 3), samples=-1)
    assert "state.json: cannot be read" in str(ranks.run(1, attempt, _settings(done, run_dir))[0])
