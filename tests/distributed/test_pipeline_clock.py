"""What the record says of a pipeline: busy and idle time as the planner's simulation counts them, memory by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, records, train

from megatron_skywork.plan.simulation import PieceCost, simulate

SECONDS = 0.05


def run_by_sleeping(settings: dict[str, Any]) -> None:
    """A run whose layers take no time to speak of, and whose forward and backward of a micro-batch sleep: twice as long on the way back."""
    import time

    import torch
    from megatron.core.models.gpt import GPTModel

    class Sleeps(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, output: torch.Tensor) -> torch.Tensor:
            time.sleep(SECONDS)
            return output.view_as(output)

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(2 * SECONDS)
            return gradient

    forward = GPTModel.forward
    GPTModel.forward = lambda self, *args, **kwargs: Sleeps.apply(forward(self, *args, **kwargs))
    try:
        train(settings)
    finally:
        GPTModel.forward = forward


@pytest.mark.parametrize(("world_size", "parallel", "micro_batches"), [(2, {"pp": 2}, 4), (2, {"pp": 2, "vpp": 2}, 4), (4, {"pp": 2, "tp": 2, "ep": 2}, 2)])
def test_the_bubble_of_equal_stages(ranks: RankPool, tmp_path: Path, world_size: int, parallel: dict[str, int], micro_batches: int) -> None:
    """As the planner simulates it: where sends cost nothing (p - 1) / (v M + p - 1) for p equal stages of v chunks and M micro-batches."""
    settings = {"run_dir": str(tmp_path), "parallel": parallel, "train": {"steps": 4, "global_batch_size": micro_batches, "micro_batch_size": 1}}
    ranks.run(world_size, run_by_sleeping, merged(BASE, settings, {"checkpoint": {"save_at_end": False}, "model": {"hidden_size": 8, "ffn_hidden_size": 8}}))
    assert "bubble = 1 - mean" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["formulas"]["pipeline"]
    chunks = parallel.get("vpp", 1)
    found = min(records(tmp_path)[1:], key=lambda record: record["pipeline"]["seconds"])["pipeline"]
    assert len(found["busy_seconds"]) == len(found["memory_bytes"]) == 2 and min(found["memory_bytes"]) > 10**7
    slept = chunks * micro_batches * 3 * SECONDS
    assert min(found["busy_seconds"]) >= slept
    assert found["bubble"] == pytest.approx(1 - sum(found["busy_seconds"]) / 2 / found["seconds"])
    schedule = "interleaved" if chunks > 1 else "1f1b"
    foreseen = simulate([PieceCost(SECONDS, 2 * SECONDS)] * (2 * chunks), stages=2, micro_batches=micro_batches, schedule=schedule)
    assert foreseen.bubble >= 1 / (chunks * micro_batches + 1) - 1e-9
    # Messages and the work beside the sleep are real, on ranks that may share a core with others: how near it comes is no test's to say.
    assert foreseen.bubble / 2 < found["bubble"] < 0.9


def test_a_record_of_one_stage_has_no_pipeline(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, train, merged(BASE, {"run_dir": str(tmp_path), "train": {"steps": 1}, "checkpoint": {"save_at_end": False}}))
    header = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert "pipeline" not in records(tmp_path)[0] and "pipeline" not in header["formulas"]
