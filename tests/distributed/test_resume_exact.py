"""Nothing is lost in a resume: every item of the state of every rank is there, bit for bit, and would be missed if it were not.

A run that goes on from the checkpoint of a step must leave the same records and the same last checkpoint, item by item, as the run that saved it and went on.
"""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from numbered_data import write_numbered
from ranks import RankPool
from resume_bodies import ITEMS, differences, live, live_forgetting_each, state_of
from training_bodies import BASE, merged, records

SMALL = merged(
    BASE,
    {"model": {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 16}, "checkpoint": {"every": 2, "keep": 9}},
    {"train": {"steps": 4, "global_batch_size": 8, "eval_every": 2, "eval_samples": 2}, "optim": {"schedule": "cosine", "warmup_steps": 1}},
)
DROPOUT = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
DENSE = merged(DROPOUT, {"moe": None})
# Dropping, adaptive coefficients, a loss over the global batch, a bias on experts; with 8 samples in micro-batches of one, accumulation.
ROUTED = merged(DROPOUT, {
    "moe": {
        "gate_norm": False, "capacity_factor": 1.0, "adaptive": {"enabled": True, "momentum": 0.5, "maximum": 1.0}, "z_loss_coefficient": 1e-3,
        "extra_aux_losses": [{"loss": "switch", "scope": "global_batch", "coefficient": 0.1}],
    },
    "megatron": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
})
MODELS: dict[str, dict[str, Any]] = {"dense": DENSE, "routed": ROUTED}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"parallel": {"tp": 2}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "interleaved": (2, {"parallel": {"pp": 2, "vpp": 2}, "model": {"num_layers": 4}}),
    "ep2": (2, {"parallel": {"ep": 2}}),
    "tp2-pp2-ep2": (4, {"parallel": {"tp": 2, "pp": 2, "ep": 2}}),
    "ep2-etp2": (4, {"parallel": {"ep": 2, "etp": 2}}),
}
# Where the run goes on: samples in an epoch of its data, of which a step takes 8 and the checkpoint of step 2 stands after 16; and its warm-up.
PLACES = {"mid-epoch": (10, 1), "epoch end": (16, 1), "warm-up end": (11, 2), "within the warm-up": (12, 3)}

# Every model, layout, precision and place at least once; all their combinations run with the marker `faults`.
CASES = [
    ("dense", "dp2", "bf16", "mid-epoch"),
    ("dense", "tp2", "fp16", "warm-up end"),
    ("dense", "pp2", "fp32", "epoch end"),
    ("routed", "one rank", "bf16", "epoch end"),
    ("routed", "interleaved", "bf16", "within the warm-up"),
    ("routed", "ep2", "fp16", "mid-epoch"),
    ("routed", "tp2-pp2-ep2", "bf16", "mid-epoch"),
    ("routed", "ep2-etp2", "fp32", "warm-up end"),
]


def impossible(model: str, layout: str) -> bool:
    return model == "dense" and "ep2" in layout


ALL_CASES = [case for case in itertools.product(MODELS, LAYOUTS, ("bf16", "fp16", "fp32"), PLACES) if not impossible(*case[:2])]


def begun(folder: Path, name: str, step: int) -> Path:
    """A run folder that has what the run in `folder / whole` saved at a step, and nothing else."""
    source = folder / "whole" / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(source, folder / name / "checkpoints" / source.name)
    return folder / name


def check(ranks: RankPool, folder: Path, model: str, layout: str, precision: str, place: str) -> None:
    world_size, more = LAYOUTS[layout]
    epoch, warmup_steps = PLACES[place]
    numbered = write_numbered(folder / "data" / "numbered", epoch, BASE["data"]["seq_length"])
    data = {"mock": False, "train": [numbered], "valid": {"held_out": numbered}}
    settings = merged(SMALL, MODELS[model], more, {"data": data, "train": {"precision": precision}, "optim": {"warmup_steps": warmup_steps}})
    ranks.run(world_size, live, merged(settings, {"run_dir": str(folder / "whole")}))
    ranks.run(world_size, live, merged(settings, {"run_dir": str(begun(folder, "resumed", 2))}))
    assert [record["step"] for record in records(folder / "resumed")] == [3, 4]
    assert differences(folder / "whole", folder / "resumed", step=4, first=3) == []


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_going_on_equals_not_stopping(ranks: RankPool, tmp_path: Path, case: tuple[str, str, str, str]) -> None:
    check(ranks, tmp_path, *case)


@pytest.mark.faults
@pytest.mark.parametrize("case", [case for case in ALL_CASES if case not in CASES], ids=" ".join)
def test_going_on_equals_not_stopping_everywhere(ranks: RankPool, tmp_path: Path, case: tuple[str, str, str, str]) -> None:
    check(ranks, tmp_path, *case)


def test_every_item_of_the_state_is_missed_when_it_is_lost(ranks: RankPool, tmp_path: Path) -> None:
    """The power check of the tests above: a resume that lost one item must not pass for equal."""
    settings = merged(SMALL, ROUTED, {"train": {"precision": "fp16", "global_batch_size": 4}})
    ranks.run(1, live, merged(settings, {"run_dir": str(tmp_path / "whole")}))
    names = ["nothing", *ITEMS]
    ranks.run(1, live_forgetting_each, settings, {name: str(begun(tmp_path, name, 2)) for name in names})
    found = {name: differences(tmp_path / "whole", tmp_path / name, step=4, first=3) for name in names}
    assert found.pop("nothing") == []
    assert [name for name, differing in found.items() if not differing] == [], "these can be lost unnoticed"
    # And there is nothing else in a checkpoint: what no item stands for has not been looked at.
    entries = [name for name in state_of(tmp_path / "whole", 4) if not name.startswith("state.json")]
    assert [entry for entry in entries if not any(pattern and re.match(pattern, entry) for pattern in ITEMS.values())] == []


def test_saving_and_stopping_change_nothing(ranks: RankPool, tmp_path: Path) -> None:
    """The run that the others are held against saves on its way; one that does not is the same, and so is one whose process ended at a step."""
    settings = merged(SMALL, ROUTED, {"train": {"precision": "bf16"}})
    for name, more in (("whole", {}), ("unsaved", {"checkpoint": {"every": 0}})):
        ranks.run(1, live, merged(settings, more, {"run_dir": str(tmp_path / name)}))
    for stop in (3, 4):
        ranks.run(1, live, merged(settings, {"run_dir": str(tmp_path / "stopped"), "train": {"stop_at_step": stop}}))
    assert differences(tmp_path / "whole", tmp_path / "unsaved", step=4) == []
    assert differences(tmp_path / "whole", tmp_path / "stopped", step=4) == []
