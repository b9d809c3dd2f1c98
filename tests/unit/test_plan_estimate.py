"""The cost of a step: its products are the FLOPs that flops.py counts, its parts add up, and what ought to make it longer or shorter does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_collective_time import LAYOUTS, cluster_of, config_of

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.estimate import estimate, model_pieces
from megatron_skywork.plan.flops import forward_flops_per_token, full_attention_flops_per_token, hardware_flops_per_token, train_flops_per_token
from megatron_skywork.plan.hardware import load_cluster
from megatron_skywork.plan.layer_cost import LayerCost, piece
from megatron_skywork.plan.stages import pieces, recomputed_layers


class CountsFlops:
    """A machine of one operation a second, on which passes over memory are free."""

    launch_seconds = 0.0

    def matmul(self, rows: float, inner: int, columns: int) -> float:
        return 2 * rows * inner * columns

    def grouped_matmul(self, experts: int, rows: float, inner: int, columns: int) -> float:
        return 2 * rows * inner * columns

    def attention(self, sequences: float, length: int, heads: int, groups: int, width: int, *, backward: bool) -> float:
        return (2.0 if backward else 1.0) * sequences * 2 * length * length * heads * width

    def memory(self, num_bytes: float) -> float:
        return 0.0


def flops(config: Config, world: int) -> dict[str, float]:
    """Of one micro-batch over all ranks of a model replica."""
    cost = LayerCost(config, CountsFlops(), Network(config, world, cluster_of(1, world)))  # type: ignore[arg-type]
    of_pieces, again = pieces(config), recomputed_layers(config)
    total = {"forward": 0.0, "backward": 0.0, "recomputed": 0.0, "weights": 0.0}
    for number, layers in enumerate(of_pieces):
        each = piece(cost, layers, again[number], first=number == 0, last=number == len(of_pieces) - 1)
        for name in ("forward", "backward", "recomputed"):
            total[name] += sum(getattr(each, name)[kind] for kind in ("products", "attention")) * config.parallel.tp
        total["weights"] += each.weights * config.parallel.tp
    return total


MOES: list[dict[str, Any] | None] = [None, {}, {"shared_expert_ffn_hidden_size": 128}, {"topk": 4, "layers": [1, 3, 5, 7]}]


@pytest.mark.parametrize("moe", MOES, ids=str)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_products_are_the_flops_that_are_counted(moe: dict[str, Any] | None, parallel: dict[str, int]) -> None:
    if moe is None:
        parallel = {name: degree for name, degree in parallel.items() if name not in ("ep", "etp")}
    config = config_of(parallel, moe=moe)
    tokens = config.train.micro_batch_size * config.data.seq_length
    routers = len(config.moe_layers) * 2 * config.model.hidden_size * 8  # counted here among what passes over memory
    padding = 2 * (config.model.padded_vocab_size - config.model.vocab_size) * config.model.hidden_size
    expected = tokens * (forward_flops_per_token(config) - routers + padding)
    found = flops(config, 64)
    assert found["forward"] == pytest.approx(expected, rel=1e-9)
    assert found["backward"] == pytest.approx(2 * expected, rel=1e-9)
    attention = tokens * 2 * config.model.num_layers * config.model.hidden_size * config.data.seq_length
    assert found["weights"] == pytest.approx(expected - attention, rel=1e-9), "every product has one for weights, attention has none"


def test_what_is_recomputed_is_that_forward() -> None:
    parallel = {"tp": 2, "pp": 2, "ep": 2}
    plain = flops(config_of(parallel, moe={}), 8)
    whole = flops(config_of({**parallel, "recompute": "full"}, moe={}), 8)
    config = config_of(parallel)
    output = 2 * config.data.seq_length * config.model.padded_vocab_size * config.model.hidden_size
    assert whole["recomputed"] == pytest.approx(plain["forward"] - output) and whole["backward"] == plain["backward"]
    half = flops(config_of({**parallel, "recompute": "full", "recompute_layers": [3, 1]}, moe={}), 8)
    assert half["recomputed"] == pytest.approx(whole["recomputed"] / 2)
    core = flops(config_of({**parallel, "recompute": "selective", "recompute_modules": ["core_attn"]}, moe={}), 8)
    assert core["recomputed"] == pytest.approx(2 * config.model.num_layers * config.model.hidden_size * config.data.seq_length**2)
    moe = flops(config_of({**parallel, "recompute": "selective", "recompute_modules": ["moe"]}, moe={}), 8)
    assert moe["recomputed"] == pytest.approx(config.data.seq_length * 2 * 2 * 3 * 512 * 256 * 8)
    # Logits that are not kept are one product more in backward.
    again = flops(config_of(parallel, moe={}, keep_logits=False), 8)
    assert again["backward"] - plain["backward"] == pytest.approx(output)


def test_parts_add_up_and_speed_follows_from_the_step() -> None:
    cluster = load_cluster("dgx_h100:2")
    config = config_of({"tp": 2, "pp": 4, "ep": 2}, moe={})
    found = estimate(config, cluster)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    assert found.parts["waiting"] > 0 and 0 < found.bubble < 1
    assert found.tokens_per_gpu_second == pytest.approx(64 * 512 / 16 / found.step_seconds)
    assert found.mfu == pytest.approx(found.tokens_per_gpu_second * 3 * forward_flops_per_token(config) / 989.4e12)
    assert len(found.pieces) == 4 and len(found.memory) == 4
    assert found.timeline.seconds < found.step_seconds


def test_recomputation_and_slower_links_take_longer_and_overlap_less() -> None:
    cluster = load_cluster("dgx_a100:2")
    parallel = {"tp": 2, "pp": 2, "ep": 4}
    plain = estimate(config_of(parallel, moe={}), cluster).step_seconds
    assert estimate(config_of({**parallel, "recompute": "full"}, moe={}), cluster).step_seconds > plain
    assert estimate(config_of({**parallel, "overlap": True}, moe={}), cluster).step_seconds < plain
    # The same experts in nodes of half the size: the all-to-all leaves the node.
    experts = config_of({"tp": 2, "pp": 1, "ep": 8}, moe={})
    small_nodes = replace(cluster, nodes=4, gpus_per_node=4)
    assert estimate(experts, small_nodes).parts["ep"] > 2 * estimate(experts, cluster).parts["ep"]
    assert estimate(config_of(parallel, moe={"capacity_factor": 0.5}), cluster).step_seconds < plain


def test_pieces_carry_embedding_and_loss() -> None:
    first, middle, _, last = (each.forward.total() for each in model_pieces(config_of({"pp": 4}), load_cluster("dgx_h100:1"), 8))
    assert middle < first < last


AGAIN: list[dict[str, Any]] = [
    {}, {"recompute": "full"}, {"recompute": "full", "recompute_layers": [3, 1]}, {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]},
]  # fmt: skip


PADDED: dict[str, Any] = {"capacity_factor": 1.5, "pad_to_capacity": True, "capacity_scope": "rank"}


@pytest.mark.parametrize("moe", [None, {}, PADDED, {"shared_expert_ffn_hidden_size": 128, "layers": [1, 3]}], ids=str)
@pytest.mark.parametrize("recompute", AGAIN, ids=str)
@pytest.mark.parametrize("keep_logits", [True, False])
def test_what_the_hardware_does_is_what_a_step_s_products_are(moe: dict[str, Any] | None, recompute: dict[str, Any], keep_logits: bool) -> None:
    parallel = {"tp": 2, "pp": 2, **({"ep": 2} if moe is not None else {}), **recompute}
    config = config_of(parallel, moe=moe, keep_logits=keep_logits)
    found, tokens = flops(config, 8), config.data.seq_length
    # The gate is a pass over memory in a step's cost, and runs again with the experts.
    sparse = set(config.moe_layers)
    again = {0, 1, 2, 4} & sparse if recompute.get("recompute_layers") else sparse if recompute else set()
    gates = 2 * config.model.hidden_size * 8 * (3 * len(sparse) + len(again))
    done = found["forward"] + found["backward"] + found["recomputed"]
    assert hardware_flops_per_token(config) * tokens == pytest.approx(done + tokens * gates, rel=1e-9)


def test_conventions_differ_by_what_they_say() -> None:
    config = config_of({"tp": 2}, moe={})
    half = 3 * 2 * config.model.num_layers * config.model.hidden_size * config.data.seq_length
    assert full_attention_flops_per_token(config) - train_flops_per_token(config) == half
    assert hardware_flops_per_token(config) == train_flops_per_token(config), "nothing recomputed, padded or made again"
