"""Bytes sent by a rank against numbers worked out by hand; tests/distributed/test_traffic.py holds the same formulas against real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_skywork.config.load import check_config, load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.plan.communication import ROUTER_SUMS, busiest_stage, ring, stage_traffic

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# 4 layers of attention 4 * 64^2 = 16384 and experts 3 * 64 * 128 = 24576; norms 128 a layer and 64 at the end; embedding and output 128 * 64 = 8192 each.
MODEL = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 128}
MOE = {"num_experts": 8, "topk": 2, "aux_loss": "report"}
DENSE = 4 * (16384 + 128) + 64 + 2 * 8192
ROUTERS = 4 * 8 * 64


def traffic(world: int, stage: int = 0, model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, train: dict[str, Any] | None = None,
            **parallel: Any) -> dict[tuple[str, str], tuple[float, float]]:  # fmt: skip
    config = Config.model_validate(
        {
            "model": {**MODEL, **(model or {})}, "moe": {**MOE, **(moe or {})}, "parallel": parallel, "data": {"mock": True, "seq_length": 16},
            "train": {"steps": 1, "global_batch_size": 8, "precision": "bf16", **(train or {})},
        }
    )  # fmt: skip
    check_config(config, world)
    return {(t.group, t.operation): (t.expected, t.most) for t in stage_traffic(config, world, stage)}


def both(number: float) -> tuple[float, float]:
    return number, number


def test_one_rank_sends_nothing():
    assert traffic(1) == {}


def test_data_parallel_ranks_send_gradients_in_fp32_and_parameters_in_half_precision():
    experts = 4 * 8 * 24576
    padded = 512 * 161  # DENSE = 82496 numbers: 161.125 times 512, and the buffer is padded to 128 numbers a rank
    assert padded + 64 == DENSE
    sent = traffic(4)
    assert sent["dp_cp", "reduce_scatter"] == both(3 / 4 * 4 * (padded + 128 + ROUTERS))
    assert sent["dp_cp", "all_gather"] == both(3 / 4 * (2 * (padded + 128) + 4 * ROUTERS))
    assert sent["expert_dp", "reduce_scatter"] == both(3 / 4 * 4 * experts) and sent["expert_dp", "all_gather"] == both(3 / 4 * 2 * experts)
    assert sent["tp_dp_cp", "all_reduce"] == both(2 * 3 / 4 * 4 * (2 * 8 + 7 + 1) * 8)
    assert len(sent) == 5


def test_tensor_parallel_ranks_send_activations():
    sent = traffic(2, tp=2)
    one = 1 / 2 * 16 * 64 * 2  # half of a micro-batch's activations; 8 micro-batches a step
    loss = 1 / 2 * 2 * 3 * 16 * 4  # the other rank's three numbers of every token
    assert sent["tp", "all_gather"] == both(8 * ((4 * 3 + 1 + 1) * one + loss))
    assert sent["tp", "reduce_scatter"] == both(8 * (4 * 2 + 1 + 1) * one)
    assert sent["tp", "all_reduce"] == both(4 * (4 * (128 + 8 * 64) + 64))
    assert sent["tp_cp", "all_reduce"] == both(8 * 4 * (2 * 8 + 1) * 4)
    assert ("tp_cp", "all_gather") not in sent, "nothing is dropped, so nobody asks for priorities"
    assert traffic(2, tp=2, moe={"capacity_factor": 1.0})["tp_cp", "all_gather"] == both(8 * 4 * 1 / 2 * 16 * 8 * 4)
    assert ("tp_cp", "all_gather") not in traffic(2, tp=2, moe={"capacity_factor": 1.0, "capacity_scope": "rank"})


def test_recomputed_layers_gather_again():
    once, again = traffic(2, tp=2), traffic(2, tp=2, recompute="full", recompute_layers=3)
    one = 8 * 1 / 2 * 16 * 64 * 2
    assert again["tp", "all_gather"][0] - once["tp", "all_gather"][0] == 3 * one == again["tp", "reduce_scatter"][0] - once["tp", "reduce_scatter"][0]
    assert again["tp_cp", "all_reduce"] == once["tp_cp", "all_reduce"], "losses are summed in the run that has gradients"


def test_expert_parallel_ranks_exchange_rows():
    # 2 micro-batches of 16 tokens, 2 rows each; 3 of 4 leave. A row has 64 numbers in two bytes, and a probability in four, which combine does not carry.
    rows, row = 2 * 4 * 16 * 2, 128
    balanced, least_local = 3 / 4 * rows * (4 * row + 2 * 4), rows * (2 * row + 4) + 3 * rows * (2 * row + 4)
    assert traffic(4, ep=4)["ep", "all_to_all"] == (balanced, least_local)
    assert traffic(4, ep=4)["etp_ep", "all_gather"] == both(2 * 4 * 3 * 8 * 8)
    padded = traffic(4, ep=4, moe={"capacity_factor": 1.5, "pad_to_capacity": True})
    assert padded["ep", "all_to_all"] == both(3 / 4 * (2 * 4 * 8 * 6) * (4 * row + 2 * 4)), "6 slots an expert, full or not"
    assert ("etp_ep", "all_gather") not in padded
    # With half the slots of an even share a balanced router keeps half; what comes in is bounded by the slots of the rank's two experts.
    tight = traffic(4, ep=4, moe={"capacity_factor": 0.5})["ep", "all_to_all"]
    assert tight[0] == balanced / 2 and tight[1] == 2 * 4 * (6 * 2 + 3 * 2 * 2) * (2 * row + 4)


def test_split_experts_gather_rows_and_return_fp32():
    # 4 micro-batches; two ranks have 8 tokens of a sequence each, 2 rows a token.
    received, row = 4 * 4 * 8 * 2, 128
    sent = traffic(4, tp=2, etp=2)
    assert sent["etp", "all_gather"][0] == received * (row + 4 + 256) and sent["etp", "reduce_scatter"][0] == received * (256 + row + 4)


def test_the_gathering_dispatcher_sends_every_token_to_all():
    sent = traffic(4, ep=4, moe={"dispatcher": "allgather"})
    tokens, row = 2 * 4 * 16, 128
    assert sent["etp_ep", "all_gather"] == both(3 * tokens * (row + 8 * 4 + 8 + 256))
    assert sent["etp_ep", "reduce_scatter"] == both(3 * tokens * (256 + row + 8 * 4))
    assert ("ep", "all_to_all") not in sent


@pytest.mark.parametrize(("stage", "vpp", "sends"), [(0, 1, 1), (1, 1, 2), (3, 1, 1), (0, 2, 3), (1, 2, 4), (3, 2, 3)])
def test_pipeline_stages_send_to_both_sides(stage: int, vpp: int, sends: int):
    sent = traffic(4, stage, pp=4, vpp=vpp, model={"num_layers": 8, "tie_embeddings": True})
    assert sent["pp", "send"] == both(8 * sends * 16 * 64 * 2)
    assert sent.get(("embedding", "all_reduce")) == (both(8192 * 4) if stage in (0, 3) else None)


def test_the_report_s_layout_sends_its_gradients_once():
    config = load_config([str(CONFIGS / "skywork_moe_146b.yaml")], [], 1536)
    stage, sent = busiest_stage(config, 1536)
    experts = next(t for t in sent if (t.group, t.operation) == ("expert_dp", "reduce_scatter"))
    layers = config.parallel.layers_per_stage[stage] if config.parallel.layers_per_stage else 52 // 12
    assert experts.expected == pytest.approx(31 / 32 * 4 * layers * 4 * 3 * 4608 * 12288)
    assert sum(t.expected for t in sent) == max(sum(t.expected for t in stage_traffic(config, 1536, other)) for other in range(12))


def test_ring_shares():
    assert [ring(operation, 4, 400.0) for operation in ("all_gather", "reduce_scatter", "all_reduce")] == [300.0, 300.0, 600.0]


def test_the_router_s_window_is_as_long_as_the_plan_says():
    from megatron_skywork.moe.router import WINDOW_SUMS

    assert len(WINDOW_SUMS) == ROUTER_SUMS
