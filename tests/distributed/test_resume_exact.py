"""Nothing is lost in a resume: every item of the state is there, bit for bit, and would be missed if it were not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from numbered_data import write_numbered
from ranks import RankPool
from resume_bodies import ITEMS, differences, live, live_forgetting_each, state_of
from training_bodies import BASE, merged

SMALL = merged(BASE, {"model": {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 16}, "train": {"steps": 4, "global_batch_size": 4}, "checkpoint": {"every": 2, "keep": 9}})
DROPOUT = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
# Dropping, adaptive coefficients, a loss over the global batch, a bias on experts.
ROUTED = {
    "moe": {
        "gate_norm": False, "capacity_factor": 1.0, "adaptive": {"enabled": True, "momentum": 0.5, "maximum": 1.0}, "z_loss_coefficient": 1e-3,
        "extra_aux_losses": [{"loss": "switch", "scope": "global_batch", "coefficient": 0.1}],
    },
    "megatron": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
}
EVERYTHING = merged(SMALL, DROPOUT, ROUTED, {"train": {"precision": "fp16"}})


def begun(folder: Path, name: str, step: int) -> Path:
    """A run folder that has what the run in `folder / whole` saved at a step, and nothing else."""
    source = folder / "whole" / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(source, folder / name / "checkpoints" / source.name)
    return folder / name


def test_every_item_of_the_state_is_missed_when_it_is_lost(ranks: RankPool, tmp_path: Path) -> None:
    """The power check of what follows: a resume that lost one item must not pass for equal."""
    ranks.run(1, live, merged(EVERYTHING, {"run_dir": str(tmp_path / "whole")}))
    names = ["nothing", *ITEMS]
    ranks.run(1, live_forgetting_each, EVERYTHING, {name: str(begun(tmp_path, name, 2)) for name in names})
    found = {name: differences(tmp_path / "whole", tmp_path / name, step=4, first=3) for name in names}
    assert found.pop("nothing") == []
    assert [name for name, differing in found.items() if not differing] == [], "these can be lost unnoticed"
    # And there is nothing else in a checkpoint: what no item stands for has not been looked at.
    entries = [name for name in state_of(tmp_path / "whole", 4) if not name.startswith("state.json")]
    assert [entry for entry in entries if not any(pattern and re.match(pattern, entry) for pattern in ITEMS.values())] == []
