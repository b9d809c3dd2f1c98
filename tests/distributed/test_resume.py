"""A run that is stopped and started again is the run that was never stopped, bit for bit: losses, norms, and every byte of its last checkpoint."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from ranks import RankPool
from torch.distributed.checkpoint import FileSystemReader
from training_bodies import BASE, merged, records, reseal, train

from megatron_skywork.convert.check.item_digests import item_digests
from megatron_skywork.errors import CheckpointError

# Everything that has a state: dropping, adaptive coefficients, a loss over the global batch, accumulation, dropout, half precision.
EVENTFUL = {
    "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "moe": {
        "capacity_factor": 1.0, "adaptive": {"enabled": True, "momentum": 0.5}, "z_loss_coefficient": 1e-3,
        "extra_aux_losses": [{"loss": "switch", "scope": "global_batch", "coefficient": 0.1}],
    },
    "train": {"steps": 6, "precision": "bf16"},
}
RUNS = {
    "one rank": (1, {}, {}),
    "ep2": (2, {"ep": 2}, {}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2, "ep": 2}, {}),
    "interleaved": (2, {"pp": 2, "vpp": 2}, {}),
    "fp16": (2, {"ep": 2}, {"train": {"precision": "fp16"}}),
    "dense, fp16": (2, {}, {"moe": None, "train": {"precision": "fp16"}}),
}


def _items(run_dir: Path, step: int) -> dict[str, str]:
    found = item_digests(run_dir / "checkpoints" / f"step_{step:08d}")
    assert any("exp_avg_sq" in name for name in found) and any(name.startswith("rng") for name in found)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_resume_equals_not_stopping(ranks: RankPool, tmp_path: Path, name: str) -> None:
    world_size, parallel, more = RUNS[name]
    settings = merged(BASE, EVENTFUL, {"parallel": parallel}, more)
    ranks.run(world_size, train, merged(settings, {"run_dir": str(tmp_path / "whole")}))
    halves = merged(settings, {"run_dir": str(tmp_path / "halves")})
    ranks.run(world_size, train, merged(halves, {"train": {"stop_at_step": 3}}))
    ranks.run(world_size, train, halves)
    for expected, found in zip(records(tmp_path / "whole"), records(tmp_path / "halves"), strict=True):
        for field in ("step", "loss", "grad_norm", "learning_rate", "tokens", "samples", "router"):
            assert found.get(field) == expected.get(field), (expected["step"], field)
    assert _items(tmp_path / "halves", 6) == _items(tmp_path / "whole", 6)


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
    with pytest.raises(AssertionError, match=f"(?s)CheckpointError.*does not fit this model.*{lost}.*without .*{setting}.*checkpoint.init_from"):
        ranks.run(1, train, merged(settings, {"train": {"stop_at_step": 3}}))
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
    ranks.run(1, train, merged(settings, {"run_dir": str(tmp_path / "other"), "optim": {"beta1": 0.0}}))
    same, other = ([record["loss"] for record in records(tmp_path / name)] for name in ("same", "other"))
    assert other[:3] == same[:3] and other[3] != same[3]


def test_a_run_never_starts_over_silently(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, {"run_dir": str(tmp_path), "train": {"steps": 2}})
    ranks.run(1, train, settings)
    with pytest.raises(AssertionError, match="checkpoint.resume is none"):
        ranks.run(1, train, merged(settings, {"checkpoint": {"resume": "none"}}))
    shard = next((tmp_path / "checkpoints").glob("*/*.distcp"))
    shard.write_bytes(b"")
    with pytest.raises(AssertionError, match="every checkpoint of this run is damaged"):
        ranks.run(1, train, settings)


def test_weights_that_do_not_fit_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, train, merged(BASE, {"run_dir": str(tmp_path / "a"), "train": {"steps": 1}}))
    folder = tmp_path / "a" / "checkpoints" / "step_00000001"
    wider = {"run_dir": str(tmp_path / "b"), "model": {"hidden_size": 64}, "checkpoint": {"init_from": str(folder)}}
    with pytest.raises(AssertionError, match=CheckpointError.__name__):
        ranks.run(1, train, merged(BASE, wider))
    # Weights that the model has no place for would otherwise be left out without a word.
    for smaller in ({"model": {"num_layers": 2}}, {"model": {"tie_embeddings": True}}):
        with pytest.raises(AssertionError, match="has no place for its"):
            ranks.run(1, train, merged(BASE, smaller, {"run_dir": str(tmp_path / "b"), "checkpoint": {"init_from": str(folder)}}))
    # The router's coefficient is part of the state: a checkpoint without it must not be resumed as if it had one.
    adaptive = {"moe": {"adaptive": {"enabled": True}, "capacity_factor": 2.0}}
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with pytest.raises(AssertionError, match=CheckpointError.__name__):
        ranks.run(1, train, merged(BASE, adaptive, {"run_dir": str(tmp_path / "c"), "train": {"steps": 2}}))


def test_state_says_what_was_done(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train, merged(BASE, {"run_dir": str(tmp_path), "train": {"steps": 2}}))
    state = json.loads((tmp_path / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert (state["step"], state["samples"], state["tokens"]) == (2, 16, 16 * 16)
    assert state["layout"]["world_size"] == 2 and state["versions"]["megatron_core"]
