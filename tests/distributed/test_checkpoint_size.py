"""The planner's size of a checkpoint, and who writes how much of it, against what ranks write."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, train

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.checkpoint_interval import checkpoint_size


@pytest.mark.parametrize(("world_size", "more"), [
    (4, {"parallel": {"tp": 2, "ep": 2}, "train": {"precision": "bf16"}}), (4, {"parallel": {"pp": 2}}), (2, {"moe": None}),
])  # fmt: skip
def test_what_ranks_write(ranks: RankPool, tmp_path: Path, world_size: int, more: dict) -> None:
    """Beside tensors a file holds their names and the ranks' random states: less than 3 % of this small model's, 64 KB of a rank that writes nothing else."""
    model = {"hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 2000}
    settings = merged(BASE, {"run_dir": str(tmp_path), "model": model, "train": {"steps": 1}}, more)
    ranks.run(world_size, train, settings)
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints" / "step_00000001").glob("*.distcp")]
    told = checkpoint_size(Config(**settings))
    assert sum(sizes) == pytest.approx(told.total, rel=0.03) and sum(sizes) > told.total
    assert max(sizes) == pytest.approx(told.largest_writer, rel=0.03)
    assert sum(size > 2**16 for size in sizes) == told.writers
