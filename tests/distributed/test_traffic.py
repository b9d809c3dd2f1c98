"""Bytes that ranks really hand to torch.distributed against the analytic count, and collectives that must not become more with the world."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, release

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
# Every parameter is a multiple of 64 numbers, to which megatron-core pads it.
SHAPE = {"model": {"hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4}, "moe": {"capacity_factor": 1.0}}
MIXED = {"layers": [0, 1, 3], "shared_expert_ffn_hidden_size": 64}
BF16 = {"train": {"precision": "bf16"}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp": (2, {}),
    "ep": (4, {"parallel": {"ep": 4}, "moe": {"capacity_factor": None}, **BF16}),
    "padded": (4, {"parallel": {"ep": 4, "recompute": "full"}, "moe": {"capacity_factor": 1.0, "pad_to_capacity": True}}),
    "tp-ep": (4, {"parallel": {"tp": 2, "ep": 2}, **BF16}),
    "tp-etp-ep": (4, {"parallel": {"tp": 2, "etp": 2, "ep": 2}, **BF16}),
    "pp-ep-tied": (4, {"parallel": {"pp": 2, "ep": 2}, "model": {"tie_embeddings": True}, "moe": MIXED, **BF16}),
    "vpp-tp": (4, {"parallel": {"pp": 2, "vpp": 2, "tp": 2}, "moe": {"aux_scope": "sequence"}}),
    "allgather": (4, {"parallel": {"tp": 2, "ep": 2, "recompute": "selective", "recompute_modules": ["moe"]}, "moe": {"dispatcher": "allgather"}, **BF16}),
}  # fmt: skip


def count_steps(settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of counted and analytic bytes of this rank; and the collectives and bytes of one record."""
    import torch

    sys.path.insert(0, BENCHMARKS)
    from scaling_traffic import CountTraffic, force_balance, rows

    from megatron_skywork import parallel
    from megatron_skywork.config.load import check_config
    from megatron_skywork.config.schema import Config
    from megatron_skywork.moe.router_state import find_routers
    from megatron_skywork.plan.communication import stage_traffic
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    check_config(config, torch.distributed.get_world_size())
    training = Training(config, parallel.start(config))
    counted = []
    for balance in (False, True):
        if balance:
            force_balance(find_routers(training.chunks))
        with CountTraffic() as step:
            result = training.train_one_step()
        counted.append({kind: sent.num_bytes for kind, sent in step.sent.items()})
    with CountTraffic() as log:
        training.log(result)
    analytic = stage_traffic(config, training.place.world_size, training.place.pp)
    release(training)
    return {"rows": [vars(row) for row in rows(*counted, analytic)], "log_calls": log.calls, "step_calls": step.calls}


@pytest.mark.parametrize("case", CASES)
def test_ranks_send_what_the_plan_says(ranks: RankPool, tmp_path: Path, case: str) -> None:
    world, settings = CASES[case]
    for answer in ranks.run(world, count_steps, merged(BASE, SHAPE, settings, {"run_dir": str(tmp_path)})):
        *kinds, rest = answer["rows"]
        for row in kinds:
            kind = (row["group"], row["operation"])
            assert row["balanced"] == row["expected"] > 0, kind
            assert row["real"] <= row["most"], kind
            # Only what experts exchange may depend on the router.
            assert row["real"] == row["expected"] or (kind[0] in ("ep", "etp") and case != "padded"), kind
        assert rest["real"] < 100, "single numbers: gradient norm, token count"


def test_a_larger_world_needs_no_more_collectives_for_a_step_and_its_record(ranks: RankPool, tmp_path: Path) -> None:
    answers = {}
    for world in (1, 2, 4):
        settings = merged(BASE, SHAPE, {"run_dir": str(tmp_path / str(world))})
        answers[world] = ranks.run(world, count_steps, settings)[0]
    # Names agree, sums, maxima; and nothing at all for a rank alone.
    assert [answers[world]["log_calls"] for world in (1, 2, 4)] == [0, 3, 3]
    assert answers[2]["step_calls"] == answers[4]["step_calls"] > 0 == answers[1]["step_calls"]


def saves(settings: dict[str, Any]) -> tuple[int, float]:
    """Collectives and bytes of this rank while the optimizer's state is gathered for a checkpoint."""
    sys.path.insert(0, BENCHMARKS)
    from scaling_traffic import CountTraffic

    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.save import save
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    with CountTraffic() as traffic:
        save(config, training.state, training.chunks, training.optimizer)
    release(training)
    gathered = [sent for (group, _), sent in traffic.sent.items() if group in ("dp_cp", "expert_dp")]
    return sum(sent.calls for sent in gathered), sum(sent.num_bytes for sent in gathered)


def test_a_larger_world_needs_no_more_collectives_to_gather_the_optimizer_s_state(ranks: RankPool, tmp_path: Path) -> None:
    found = {world: ranks.run(world, saves, merged(BASE, SHAPE, {"run_dir": str(tmp_path / str(world))})) for world in (2, 4)}
    assert {calls for of_ranks in found.values() for calls, _ in of_ranks} == {6}, "three kinds of state of two buffers"
    half, quarter = (found[world][0][1] for world in (2, 4))
    assert quarter == pytest.approx(half / 2, rel=0.01), "a rank sends its own part and no other's"
