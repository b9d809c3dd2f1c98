"""What a step does to parameters, what it says of its time, and that it means the same over stages and in fp16. Wrong numbers: test_wrong_numbers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, records, release, train


def groups_after_a_step(settings: dict[str, Any]) -> list[tuple[float, list[int]]]:
    """Weight decay of each parameter group, and the dimensions of the model parameters it belongs to."""
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    training = Training(Config(**settings), parallel.start(Config(**settings)))
    training.train_one_step()
    answer = []
    for part in training.optimizer.chained_optimizers:
        for group, fp32, half in zip(part.param_groups, part.model_fp32_groups, part.model_float16_groups, strict=True):
            answer.append((group["weight_decay"], sorted({param.dim() for param in [*fp32, *half]})))
    release(training)
    return answer


def test_norms_are_not_decayed(ranks: RankPool, tmp_path: Path) -> None:
    ((*groups,),) = ranks.run(1, groups_after_a_step, merged(BASE, {"run_dir": str(tmp_path), "optim": {"weight_decay": 0.3}}))
    # Dense weights have two dimensions, those of all experts of a rank three.
    assert sorted(group for group in groups if group[1]) == [(0.0, [1]), (0.3, [2]), (0.3, [3])]


def run_by_a_clock_that_ticks(settings: dict[str, Any]) -> None:
    """A run whose clock goes on by a second whenever it is read."""
    from itertools import count

    from megatron_skywork import device

    moment, ticks = device.moment, count()
    device.moment = lambda: next(ticks)
    try:
        train(settings)
    finally:
        device.moment = moment


def test_seconds_of_a_record_are_those_of_one_step(ranks: RankPool, tmp_path: Path) -> None:
    settings = {"run_dir": str(tmp_path), "train": {"steps": 5}, "metrics": {"every": 2}, "checkpoint": {"save_at_end": False}}
    ranks.run(1, run_by_a_clock_that_ticks, merged(BASE, settings))
    found = records(tmp_path)
    assert [record["step"] for record in found] == [2, 4, 5]
    for record in found:
        assert record["seconds"] == {"data": 1, "forward_backward": 1, "optimizer": 1, "step": 7}
        assert record["data_wait_share"] == pytest.approx(1 / 7)
        assert record["tokens_per_second"] == pytest.approx(8 * 16 / 7)


def test_a_dense_model_and_tied_embeddings_over_stages(ranks: RankPool, tmp_path: Path) -> None:
    for name, more in {"dense": {"moe": None}, "tied": {"model": {"tie_embeddings": True}}, "mixed": {"moe": {"layers": [1, 2]}}}.items():
        settings = merged(BASE, more, {"train": {"steps": 4}})
        ranks.run(1, train, merged(settings, {"run_dir": str(tmp_path / name / "one"), "train": {"stop_at_step": 2}}))
        start = {"checkpoint": {"init_from": str(tmp_path / name / "one" / "checkpoints" / "step_00000002")}}
        for layout, (world_size, parallel) in {"1": (1, {}), "pp2": (2, {"pp": 2}), "tp2-pp2": (4, {"tp": 2, "pp": 2})}.items():
            ranks.run(world_size, train, merged(settings, start, {"run_dir": str(tmp_path / name / layout), "parallel": parallel}))
        expected = [record["loss"] for record in records(tmp_path / name / "1")]
        for layout in ("pp2", "tp2-pp2"):
            assert [record["loss"] for record in records(tmp_path / name / layout)] == pytest.approx(expected, rel=1e-5), (name, layout)


def test_the_loss_scale_of_fp16_reaches_the_routers_losses(ranks: RankPool, tmp_path: Path) -> None:
    """With coefficients so large that they make most of the gradient, fp16's first step has fp32's gradient norm."""
    heavy = {"moe": {"aux_coefficient": 5.0, "z_loss_coefficient": 0.5, "aux_loss": "switch"}, "train": {"stop_at_step": 1}}
    norms = {}
    for precision in ("fp32", "fp16"):
        settings = merged(BASE, heavy, {"run_dir": str(tmp_path / precision), "parallel": {"tp": 2, "ep": 2}, "train": {"precision": precision}})
        ranks.run(2, train, settings)
        first = records(tmp_path / precision)[0]
        assert not first["skipped"]
        norms[precision] = first["grad_norm"]
    ranks.run(2, train, merged(BASE, heavy, {"run_dir": str(tmp_path / "light"), "moe": {"aux_coefficient": 0.0, "z_loss_coefficient": 0.0}}))
    assert norms["fp32"] > 3 * records(tmp_path / "light")[0]["grad_norm"], "the routers' losses must make most of it"
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)
