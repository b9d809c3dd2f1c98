"""The planner's order of execution is the one in which megatron-core really runs a pipeline: recorded on ranks, pass by pass."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, release

from megatron_skywork.plan.pipeline import Op, order


def executed(settings: dict[str, Any], micro_batches: int) -> list[tuple[str, int, int]]:
    """What this rank runs in one step, as (kind, micro-batch, chunk). Every token of micro-batch n is n, so a pass says itself which one it is."""
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.step import run_schedule
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    found: list[tuple[str, int, int]] = []

    def watched(chunk: Any, index: int) -> Any:
        forward = chunk.forward

        def recording(tokens_BS: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            micro_batch = int(tokens_BS[0, 0])
            found.append(("F", micro_batch, index))
            output: torch.Tensor = forward(tokens_BS, *args, **kwargs)
            output.register_hook(lambda gradient: found.append(("B", micro_batch, index)))
            return output

        return recording

    for index, chunk in enumerate(training.chunks):
        chunk.forward = watched(chunk, index)
    shape = (config.train.micro_batch_size, config.data.seq_length)
    positions_BS = torch.arange(shape[1]).expand(shape)
    batches = [
        {"tokens": torch.full(shape, number), "labels": torch.full(shape, number), "position_ids": positions_BS, "loss_mask": torch.ones(shape)}
        for number in range(micro_batches)
    ]
    run_schedule(config, training.chunks, batches, forward_only=False)
    release(training)
    return found


@pytest.mark.parametrize(
    ("pp", "vpp", "counts"),
    [(2, 1, (1, 2, 5)), (4, 1, (2, 4, 7)), (2, 2, (2, 4, 10)), (3, 2, (3, 9)), (4, 2, (4, 8))],
    ids=["pp2", "pp4", "pp2-vpp2", "pp3-vpp2", "pp4-vpp2"],
)
def test_megatron_core_runs_the_planned_order(ranks: RankPool, pp: int, vpp: int, counts: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    schedule = "interleaved" if vpp > 1 else "1f1b"
    for count in counts:
        more = {"model": {"num_layers": pp * vpp}, "parallel": {"pp": pp, "vpp": vpp}, "train": {"global_batch_size": count}}
        settings = merged(BASE, more, {"run_dir": str(tmp_path_factory.mktemp("run"))})
        recorded = ranks.run(pp, executed, settings, count)
        for stage, ops in enumerate(recorded):
            assert [Op(*op) for op in ops] == order(schedule, pp, vpp, count, stage), (count, stage)
