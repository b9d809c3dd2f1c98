"""What a resume finds in a run's folder: what it takes, what it passes over and what it refuses. That what it takes is exact: test_resume_exact.py."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from ranks import RankPool
from resume_bodies import attempt
from torch.distributed.checkpoint import FileSystemReader
from training_bodies import BASE, merged, records, reseal, train

# Everything that has a state: dropping, adaptive coefficients, a loss over the global batch, accumulation, dropout, half precision.
EVENTFUL = {
    "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "moe": {
        "capacity_factor": 1.0, "adaptive": {"enabled": True, "momentum": 0.5}, "z_loss_coefficient": 1e-3,
        "extra_aux_losses": [{"loss": "switch", "scope": "global_batch", "coefficient": 0.1}],
    },
    "train": {"steps": 6, "precision": "bf16"},
}


@pytest.mark.parametrize("state", ["aux_coefficient", "batch_means"])
def test_routers_without_their_state_are_refused(ranks: RankPool, tmp_path: Path, state: str) -> None:
    """Taken out of a checkpoint that is whole otherwise, the state of one layer's router must be missed, not begun anew."""
    settings = merged(BASE, EVENTFUL, {"run_dir": str(tmp_path), "train": {"stop_at_step": 2}})
    ranks.run(1, train, settings)
    folder = tmp_path / "checkpoints" / "step_00000002"
    metadata = FileSystemReader(folder).read_metadata()
    lost = f"decoder.layers.2.mlp.router.{state}"
    del metadata.state_dict_metadata[lost]
    metadata.storage_data = {index: place for index, place in metadata.storage_data.items() if index.fqn != lost}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder)
    setting = {"aux_coefficient": "moe.adaptive.enabled=true", "batch_means": "global_batch"}[state]
    (refusal,) = ranks.run(1, attempt, merged(settings, {"train": {"stop_at_step": 3}}))
    assert re.fullmatch(f"(?s)CheckpointError.*does not fit this model.*{lost}.*without .*{setting}.*checkpoint.init_from.*", str(refusal))
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_retention_keeps_the_newest_and_a_damaged_one_is_passed_over(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, {"run_dir": str(tmp_path), "train": {"steps": 5}, "checkpoint": {"every": 1, "keep": 2}})
    ranks.run(1, train, settings)
    folders = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert [folder.name for folder in folders] == ["step_00000004", "step_00000005"]
    whole = records(tmp_path)
    shard = next(folders[-1].glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    ranks.run(1, train, settings)
    events = [event["event"] for event in records(tmp_path, "event")]
    assert "resume" in events and records(tmp_path)[-1]["loss"] == whole[-1]["loss"]
    # A save that died leaves a folder without its marker: never loaded, and cleared away by the next save.
    (folders[-1] / "complete.json").unlink()
    (tmp_path / "checkpoints" / "step_00000009").mkdir()
    ranks.run(1, train, settings)
    assert [folder.name for folder in sorted((tmp_path / "checkpoints").glob("step_*"))] == ["step_00000004", "step_00000005"]


def test_a_damaged_later_folder_does_not_push_out_what_is_saved(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, {"run_dir": str(tmp_path), "train": {"steps": 3}, "checkpoint": {"keep": 1}})
    ranks.run(1, train, merged(settings, {"train": {"stop_at_step": 2}}))
    damaged = tmp_path / "checkpoints" / "step_00000009"
    shutil.copytree(tmp_path / "checkpoints" / "step_00000002", damaged)
    next(damaged.glob("*.distcp")).write_bytes(b"")
    ranks.run(1, train, settings)
    assert [folder.name for folder in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_a_resume_uses_the_optimizer_settings_of_its_own_start(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, {"run_dir": str(tmp_path / "same"), "train": {"steps": 4}, "checkpoint": {"save_at_end": False}})
    ranks.run(1, train, merged(settings, {"train": {"stop_at_step": 2}}))
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    ranks.run(1, train, settings)
    ranks.run(1, train, merged(settings, {"run_dir": str(tmp_path / "other"), "optim": {"beta1": 0.0}, "resume": {"allow_change": ["optim.beta1"]}}))
    same, other = ([record["loss"] for record in records(tmp_path / name)] for name in ("same", "other"))
    assert other[:3] == same[:3] and other[3] != same[3]


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_over(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, {"run_dir": str(tmp_path), "train": {"steps": 2}})
    ranks.run(1, train, settings)
    shard = next((tmp_path / "checkpoints").glob("*/*.distcp"))
    shard.write_bytes(b"")
    refusal = str(ranks.run(1, attempt, settings)[0])
    assert refusal.startswith("CheckpointError: every checkpoint of this run is damaged") and shard.name in refusal


def test_weights_that_do_not_fit_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, train, merged(BASE, {"run_dir": str(tmp_path / "a"), "train": {"steps": 1}}))
    begin = {"run_dir": str(tmp_path / "b"), "checkpoint": {"init_from": str(tmp_path / "a" / "checkpoints" / "step_00000001")}}
    assert str(ranks.run(1, attempt, merged(BASE, begin, {"model": {"hidden_size": 64}}))[0]).startswith("CheckpointError")
    # Weights that the model has no place for would otherwise be left out without a word.
    for smaller in ({"model": {"num_layers": 2}}, {"model": {"tie_embeddings": True}}):
        assert "has no place for its" in str(ranks.run(1, attempt, merged(BASE, begin, smaller))[0])


def test_state_says_what_was_done(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train, merged(BASE, {"run_dir": str(tmp_path), "train": {"steps": 2}}))
    state = json.loads((tmp_path / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert (state["step"], state["samples"], state["tokens"]) == (2, 16, 16 * 16)
    assert state["layout"]["world_size"] == 2 and state["versions"]["megatron_core"]
