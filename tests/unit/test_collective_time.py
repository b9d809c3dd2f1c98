"""Times of collectives: where groups really lie, known answers of the alpha-beta model, and the same bytes as communication.py counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.collective_time import GROUPS, Network, placement
from megatron_skywork.plan.communication import stage_traffic
from megatron_skywork.plan.hardware import Cluster, Gpu, Link
from megatron_skywork.plan.layer_cost import LayerCost, piece
from megatron_skywork.plan.rates import Rates
from megatron_skywork.plan.stages import batch, pieces, recomputed_layers
from megatron_skywork.plan.topology import config_groups


def config_of(parallel: dict[str, Any], moe: dict[str, Any] | None = None, **train: Any) -> Config:
    return Config(
        model={"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 4096, "max_position_embeddings": 512},
        moe=None if moe is None else {"num_experts": 8, "topk": 2, "ffn_hidden_size": 256, **moe},
        parallel=parallel,
        data={"mock": True, "seq_length": 512},
        optim={"lr": 1e-4},
        train={"steps": 10, "global_batch_size": 64, **train},
    )  # fmt: skip


def cluster_of(nodes: int, gpus_per_node: int, inside: tuple[float, float] = (100.0, 0.0), between: tuple[float, float] = (10.0, 0.0)) -> Cluster:
    """A cluster with round numbers: (bytes per second, latency) of its links."""
    gpu = Gpu(name="test", memory_bytes=10**9, peak_flops={"bf16": 1e12, "fp32": 1e12}, memory_bytes_per_second=1e12, sources={})
    links = {
        name: Link(name=name, bytes_per_second=speed, latency_seconds=latency, source="made up", peak_bytes_per_second=speed)
        for name, (speed, latency) in {"inside": inside, "between": between}.items()
    }
    return Cluster(name="test", gpu=gpu, nodes=nodes, gpus_per_node=gpus_per_node, rates=Rates(source="made up"), **links)


LAYOUTS = [
    {"tp": 2, "pp": 2, "ep": 2}, {"tp": 4, "pp": 1, "ep": 4}, {"tp": 1, "pp": 4, "ep": 8}, {"tp": 4, "pp": 2, "ep": 2, "etp": 2},
    {"tp": 8, "pp": 1, "ep": 1, "etp": 8},
    {"tp": 1, "pp": 2, "ep": 4, "etp": 2},
]  # fmt: skip


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("gpus_per_node", [1, 2, 4, 8, 16])
def test_groups_lie_where_the_ranks_are(parallel: dict[str, int], gpus_per_node: int) -> None:
    config = config_of(parallel, moe={})
    for name, groups in config_groups(config, 64).items():
        if name in ("cp", "dp"):
            continue
        where = placement(config, 64, name, gpus_per_node)
        most = max(max(sum(rank // gpus_per_node == node for rank in group) for node in {rank // gpus_per_node for rank in group}) for group in groups.ranks)
        assert (where.size, where.crosses) == (groups.size, groups.crossing(gpus_per_node) > 0), name
        assert where.per_node == most, name


def test_rings_and_exchanges_of_known_time() -> None:
    inside = Network(config_of({"tp": 4}), 4, cluster_of(1, 4, inside=(100.0, 0.5)))
    assert inside.collective("tp", "all_gather", 400.0) == pytest.approx(3 * 0.5 + 300 / 100)
    assert inside.collective("tp", "all_reduce", 400.0) == pytest.approx(2 * (3 * 0.5 + 300 / 100))
    assert inside.collective("pp", "all_gather", 400.0) == 0.0
    # 8 ranks, 2 a node: two rings leave the node, over two shares of the network; 4 hops of the ring leave a node.
    across = Network(config_of({"tp": 2}), 16, cluster_of(4, 4, inside=(100.0, 0.5), between=(10.0, 2.0)))
    assert across.where("dp_cp").per_node == 2
    assert across.collective("dp_cp", "reduce_scatter", 800.0) == pytest.approx(4 * 2.0 + 3 * 0.5 + 700 / 20)
    # A network faster than the node's own link does not make the ring faster than that.
    fast = Network(config_of({"tp": 2}), 16, cluster_of(4, 4, between=(1000.0, 0.0)))
    assert fast.collective("dp_cp", "reduce_scatter", 800.0) == pytest.approx(7.0)
    # 8 experts' ranks on 2 nodes: 3 of 7 parts stay in the node, 4 of 7 leave it over the rank's own share.
    experts = Network(config_of({"ep": 8}, moe={}), 8, cluster_of(2, 4))
    assert experts.all_to_all("ep", 70.0) == pytest.approx(4.0)
    slow_inside = Network(config_of({"ep": 8}, moe={}), 8, cluster_of(2, 4, inside=(5.0, 0.0), between=(10.0, 0.0)))
    assert slow_inside.all_to_all("ep", 70.0) == pytest.approx(6.0)


class Free:
    """Kernels that take no time."""

    launch_seconds = 0.0

    def matmul(self, *sizes: float) -> float:
        return 0.0

    def grouped_matmul(self, *sizes: float) -> float:
        return 0.0

    def attention(self, *sizes: float, backward: bool) -> float:
        return 0.0

    def memory(self, num_bytes: float) -> float:
        return 0.0


MOES: list[dict[str, Any] | None] = [
    None, {}, {"capacity_factor": 1.0}, {"capacity_factor": 1.0, "pad_to_capacity": True},
    {"shared_expert_ffn_hidden_size": 128},
]  # fmt: skip
RECOMPUTED: list[dict[str, Any]] = [
    {}, {"recompute": "full", "recompute_layers": 1},
    {"recompute": "selective", "recompute_modules": ["moe", "mlp", "core_attn"]},
]  # fmt: skip


@pytest.mark.parametrize("moe", [*MOES, {"dispatcher": "allgather"}], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTED, ids=str)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_layers_send_what_is_counted(moe: dict[str, Any] | None, recompute: dict[str, Any], parallel: dict[str, int]) -> None:
    """With a link of one byte a second and no latency, seconds are bytes; with an endless link and a latency of one, they are steps."""
    if moe is None:
        parallel = {name: degree for name, degree in parallel.items() if name not in ("ep", "etp")}
    config = config_of({**parallel, **recompute}, moe=None if moe is None else {"aux_loss": "none", "capacity_scope": "rank", **moe})
    world = 64
    for inside, per_call in (((1.0, 0.0), False), ((math.inf, 1.0), True)):
        network = Network(config, world, cluster_of(1, world, inside=inside))
        cost = LayerCost(config, Free(), network)  # type: ignore[arg-type]
        of_pieces, again = pieces(config), recomputed_layers(config)
        for stage in range(config.parallel.pp):
            told = 0.0
            for number in range(stage, len(of_pieces), config.parallel.pp):
                each = piece(cost, of_pieces[number], again[number], first=number == 0, last=number == len(of_pieces) - 1)
                told += sum(part[kind] for part in (each.forward, each.backward, each.recomputed) for kind in ("tp", "ep"))
            told *= batch(config, world).micro_batches
            counted = 0.0
            for traffic in stage_traffic(config, world, stage):
                if traffic.group in ("tp", "ep", "etp", "etp_ep") and traffic.operation != "all_reduce":
                    steps = 1 if traffic.operation == "all_to_all" else network.where(traffic.group).size - 1
                    counted += traffic.calls * steps if per_call else traffic.expected
            assert told == pytest.approx(counted, rel=1e-9), (stage, per_call)


def test_every_group_has_a_place() -> None:
    config = config_of({"tp": 2, "pp": 2, "ep": 2}, moe={})
    for name in GROUPS:
        assert placement(config, 16, name, 8).size >= 1
