"""A checkpoint goes on under another layout: the same numbers, the same next loss, and every sample once, whatever dies and however many ranks share a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from numbered_data import write_numbered
from ranks import RankPool
from resume_bodies import live, load_and_save, next_random_numbers, whole_tensors
from training_bodies import BASE, losses, merged

STATEFUL = merged(BASE, {
    "model": {"hidden_size": 16, "ffn_hidden_size": 16},
    "moe": {
        "capacity_factor": 1.0, "gate_norm": False, "adaptive": {"enabled": True, "momentum": 0.5, "maximum": 1.0},
        "extra_aux_losses": [{"loss": "switch", "scope": "global_batch", "coefficient": 0.1}],
    },
    "megatron": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
    "train": {"steps": 3, "global_batch_size": 4}, "checkpoint": {"every": 2, "keep": 9, "save_at_end": False},
})
# Saved under the first, loaded under the second and again under the first.
CHANGES: dict[str, tuple[tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = {
    "dp2 to tp2": ((2, {}), (2, {"tp": 2})),
    "tp2-pp2 to ep2": ((4, {"tp": 2, "pp": 2}), (2, {"ep": 2})),
    "one rank to dp4": ((1, {}), (4, {})),
    "interleaved to etp2-ep2": ((2, {"pp": 2, "vpp": 2}), (4, {"etp": 2, "ep": 2})),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_state_is_the_same_under_another_layout(ranks: RankPool, tmp_path: Path, name: str) -> None:
    (old_size, old), (new_size, new) = CHANGES[name]
    settings = merged(STATEFUL, {"run_dir": str(tmp_path / "run")})
    ranks.run(old_size, live, merged(settings, {"parallel": old}))
    saved, expected = whole_tensors(tmp_path / "run" / "checkpoints" / "step_00000002"), losses(tmp_path / "run")[2]
    ranks.run(new_size, load_and_save, merged(settings, {"parallel": new}), str(tmp_path / "moved"))
    moved = whole_tensors(tmp_path / "moved" / "checkpoints" / "step_00000002")
    kinds = ("state.param.", "exp_avg.", "exp_avg_sq.", "aux_coefficient", "batch_means", "expert_bias", "linear_qkv.weight")
    assert all(any(kind in key for key in saved) for kind in kinds)
    assert saved.keys() == moved.keys()
    assert [key for key in saved if saved[key].numpy().tobytes() != moved[key].numpy().tobytes()] == []
    ranks.run(new_size, live, merged(settings, {"parallel": new}))
    assert losses(tmp_path / "run")[2] == pytest.approx(expected, rel=1e-6)


def test_masters_become_the_weights_of_a_finer_precision(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(STATEFUL, {"run_dir": str(tmp_path / "run"), "train": {"precision": "bf16"}})
    ranks.run(2, live, settings)
    finer = {"train": {"precision": "fp32"}, "resume": {"allow_change": ["train.precision"]}}
    ranks.run(1, load_and_save, merged(settings, finer), str(tmp_path / "finer"))
    before, after = (whole_tensors(tmp_path / run / "checkpoints" / "step_00000002") for run in ("run", "finer"))
    weight = "decoder.layers.0.self_attention.linear_qkv.weight"
    master = f"optimizer.state.param.{weight}"
    assert before[master].equal(after[master]) and after[weight].equal(after[master]) and not before[weight].float().equal(before[master])


def test_random_numbers_under_another_layout_are_not_those_of_the_first_steps(ranks: RankPool, tmp_path: Path) -> None:
    small = {"model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16}, "moe": None, "train": {"steps": 2, "global_batch_size": 2}}
    settings = merged(BASE, small, {"run_dir": str(tmp_path)})
    at_the_start = ranks.run(2, next_random_numbers, settings)
    ranks.run(1, live, merged(settings, {"train": {"stop_at_step": 1}}))
    resumed, again = (ranks.run(2, next_random_numbers, settings) for _ in range(2))
    assert resumed == again and all(not set(now) & set(then) for now, then in zip(resumed, at_the_start, strict=True))


# Ranks of each life of a run, and the step after which it dies (None: it ends when it should).
STOP = {"train": {"stop_at_step": 10}}
LIVES: list[tuple[int, int | None, dict[str, Any]]] = [(1, 4, {}), (4, 8, {}), (2, 7, {}), (4, None, STOP), (2, 13, {}), (1, None, {})]


def test_every_sample_is_read_once_through_deaths_and_changes_of_size(ranks: RankPool, tmp_path: Path) -> None:
    """Two epochs of 30 numbered samples in steps of 4, so that the first ends within step 8, and a checkpoint every third step."""
    sources = [write_numbered(tmp_path / "a", 20, 16), write_numbered(tmp_path / "b", 10, 16, first=40)]
    data = {"mock": False, "train": [{"path": sources[0], "weight": 2.0}, {"path": sources[1], "weight": 1.0}]}
    small = {"model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16}, "moe": None, "train": {"steps": 15, "global_batch_size": 4}}
    settings = merged(BASE, small, {"data": data, "run_dir": str(tmp_path / "run"), "checkpoint": {"every": 3, "background": False}})
    read: dict[int, list[int]] = {}
    redone = []
    for world_size, die_after, more in LIVES:
        by_rank = ranks.run(world_size, live, merged(settings, more), None, die_after)
        for step in by_rank[0]:
            found = sorted(number for of_rank in by_rank for number in of_rank[step])
            assert len(found) == 4 and read.get(step, found) == found, f"step {step} read other samples than in the life before"
            redone += [step] if step in read else []
            read[step] = found
    assert sorted(read) == list(range(1, 16)) and redone == [4, 7, 7, 8, 13]
    counts = Counter(number for step in read.values() for number in step)
    assert len(counts) == 30 and set(counts.values()) == {2}
    for epoch in (range(1, 8), range(9, 16)):
        assert set(Counter(number for step in epoch for number in read[step]).values()) == {1}
