"""The same run under many layouts: the same losses. And a checkpoint of one layout goes on under another as if nothing had happened.

fp32, and all layouts start from the same saved weights. The long runs drop nothing, because a drop that goes the other way in the twentieth step, for a
last digit, is a small jump of the loss; the short ones drop, and must drop the same assignments.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import RankPool
from training_bodies import BASE, losses, merged, records, save_initial, train

LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-ep2 (expert data parallel: the expert group is the tensor group)": (2, {"tp": 2, "ep": 2}),
    "ep2": (2, {"ep": 2}),
    "etp2": (2, {"etp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2 uneven": (2, {"pp": 2, "layers_per_stage": [1, 3]}),
    "pp2 interleaved": (2, {"pp": 2, "vpp": 2}),
    "dp2 overlapped": (2, {"overlap": True}),
    "full recomputation": (1, {"recompute": "full"}),
    "selective recomputation": (2, {"ep": 2, "recompute": "selective", "recompute_modules": ["core_attn", "moe"]}),
    "dp4": (4, {}),
    "ep4": (4, {"ep": 4}),
    "tp4-ep4": (4, {"tp": 4, "ep": 4}),
    "tp2-etp2-ep2": (4, {"tp": 2, "etp": 2, "ep": 2}),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "pp4 uneven": (4, {"pp": 4, "layers_per_stage": [1, 1, 1, 1]}),
    "pp2 interleaved-ep2": (4, {"pp": 2, "vpp": 2, "ep": 2, "layers_per_stage": [1, 1, 1, 1]}),
}


@pytest.fixture(scope="module")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that every layout starts from, and the losses of one rank, in `reference`."""
    folder = tmp_path_factory.mktemp("layouts")
    ranks.run(1, save_initial, merged(BASE, {"run_dir": str(folder / "initial")}))
    ranks.run(1, train, _settings(folder, "reference", {}))
    return folder


def _settings(folder: Path, name: str, parallel: dict, *more: dict) -> dict:
    initial = folder / "initial" / "checkpoints" / "step_00000000"
    return merged(BASE, {"run_dir": str(folder / name), "parallel": parallel, "checkpoint": {"init_from": str(initial), "save_at_end": False}}, *more)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loss_does_not_depend_on_the_layout(ranks: RankPool, start: Path, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    ranks.run(world_size, train, _settings(start, name.split(" (")[0], parallel))
    found, expected = losses(start / name.split(" (")[0]), losses(start / "reference")
    assert len(found) == 20 and expected[-1] < expected[0] - 0.5, "the reference must have learned something"
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-4)


def test_router_metrics_do_not_depend_on_the_layout(ranks: RankPool, start: Path) -> None:
    ranks.run(4, train, _settings(start, "routers", {"tp": 2, "pp": 2, "ep": 2}, {"train": {"stop_at_step": 1}}))
    found, expected = records(start / "routers")[0]["router"], records(start / "reference")[0]["router"]
    assert found["layers"] == expected["layers"] == [1, 2, 3, 4]
    for name in ("entropy", "max1_over_max2", "aux_loss", "drop_rate", "coefficient"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    for mine, theirs in zip(found["load"], expected["load"], strict=True):
        assert sum(mine) == pytest.approx(1.0) and mine == pytest.approx(theirs, abs=0.02)


ADAPTIVE = {"enabled": True, "momentum": 0.5, "sensitivity": 0.02}
DROPPING = {"moe": {"capacity_factor": 1.0, "aux_scope": "global_batch", "adaptive": ADAPTIVE}, "train": {"stop_at_step": 3}}


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_drops_and_coefficients_do_not_depend_on_the_layout(ranks: RankPool, start: Path, policy: str) -> None:
    settings = merged(DROPPING, {"moe": {"drop_policy": policy}})
    ranks.run(1, train, _settings(start, f"dropping-{policy}", {}, settings))
    expected = records(start / f"dropping-{policy}")
    assert all(rate > 0.01 for record in expected for rate in record["router"]["drop_rate"])
    assert len(set(expected[2]["router"]["coefficient"])) == 4, "every layer has its own coefficient"
    names = ["tp4-ep4", "pp2 interleaved-ep2", "tp2-pp2-ep2", "full recomputation", "selective recomputation", "tp2-etp2-ep2"]
    for name in names if policy == "probs" else names[:1]:
        world_size, parallel = LAYOUTS[name]
        ranks.run(world_size, train, _settings(start, f"dropping-{policy}-{name}", parallel, settings))
        for mine, theirs in zip(records(start / f"dropping-{policy}-{name}"), expected, strict=True):
            assert mine["router"]["drop_rate"] == theirs["router"]["drop_rate"], name
            assert mine["router"]["coefficient"] == theirs["router"]["coefficient"], name
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6), name
            assert mine["router"]["aux_loss"] == pytest.approx(theirs["router"]["aux_loss"], rel=1e-3, abs=1e-8), name


CHANGES = {
    "split by everything, then one rank": ((4, {"tp": 2, "pp": 2, "ep": 2}), (1, {})),
    "one rank, then tp2-ep2": ((1, {}), (2, {"tp": 2, "ep": 2})),
    "interleaved, then ep4": ((2, {"pp": 2, "vpp": 2}), (4, {"ep": 4})),
    "dp4, then etp2 and uneven stages": ((4, {}), (4, {"etp": 2, "pp": 2, "layers_per_stage": [3, 1]})),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_under_another_layout(ranks: RankPool, start: Path, name: str) -> None:
    (first_size, first), (second_size, second) = CHANGES[name]
    adaptive = {"moe": {"adaptive": {"enabled": True}, "capacity_factor": 8.0}}
    ranks.run(first_size, train, _settings(start, name, first, adaptive, {"train": {"stop_at_step": 3}}))
    ranks.run(second_size, train, _settings(start, name, second, adaptive, {"train": {"stop_at_step": 6}}))
    expected, found = losses(start / "reference")[:6], losses(start / name)
    # The coefficients fall here, since nothing is dropped, so only the first steps can be held against the reference closely.
    assert found[:3] == pytest.approx(expected[:3], rel=1e-5)
    assert found[3:] == pytest.approx(expected[3:], rel=1e-4)
    coefficients = [record["router"]["coefficient"] for record in records(start / name)]
    assert coefficients[3][0] == pytest.approx(0.01 * 0.99**3, rel=1e-5), "the coefficients were not carried over"
    assert records(start / name, "event")[-1]["event"] == "stop"
