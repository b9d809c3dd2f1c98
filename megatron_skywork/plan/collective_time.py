"""Seconds of a collective on the links that its group really crosses: latency per step, bytes over bandwidth (the alpha-beta model of Hockney, 1994).

A ring of n ranks passes (n - 1)/n of a buffer (communication.py) from rank to rank. Where a group lies inside a node, all hops are the node's link. Where it
spans nodes, what a ring passes leaves every node once, and NCCL lays as many rings as the node has network ports for the group's ranks:

    ring          steps * latency + sent / bandwidth; steps = n - 1, those that leave a node with the network's latency; bandwidth is the node's link inside,
                  and across nodes min(node's link, ranks of the group in a node * one GPU's share of the network)
    all-to-all    the part for ranks of the same node over its link, beside it the rest over the GPU's own share of the network; the slower one counts
    send          latency + bytes / link

Ranks that wait for each other and groups that share links take longer; by how much is what `Cluster.sustained` says, if somebody found out. Groups that
lie askew on nodes (3 ranks in nodes of 8) are taken as crossing.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.communication import ring
from megatron_skywork.plan.hardware import Cluster

# A collective made of two rings, one after the other.
_STEPS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a group lie.

    Args:
        size: ranks.
        per_node: of them on one node; `size` where the group does not leave it.
    """

    size: int
    per_node: int

    @property
    def crosses(self) -> bool:
        return self.per_node < self.size


def placement(config: Config, world_size: int, group: str, gpus_per_node: int) -> Placement:
    """Of a kind of group, by the names of communication.py: tp, cp, tp_cp, dp_cp, tp_dp_cp, pp, embedding, etp, ep, etp_ep, expert_dp.

    Ranks are numbered as in topology.py, the first grid axis fastest, so a group is `size` ranks at a distance of `stride`.
    """
    p, of_stage = config.parallel, world_size // config.parallel.pp
    stride, size = {
        "tp": (1, p.tp), "cp": (p.tp, p.cp), "tp_cp": (1, p.tp * p.cp), "dp_cp": (p.tp, of_stage // p.tp), "tp_dp_cp": (1, of_stage),
        "pp": (of_stage, p.pp), "embedding": (of_stage * max(p.pp - 1, 1), min(p.pp, 2)),
        "etp": (1, p.etp), "ep": (p.etp, p.ep), "etp_ep": (1, p.etp * p.ep), "expert_dp": (p.etp * p.ep, of_stage // (p.etp * p.ep)),
    }[group]  # fmt: skip
    # The ends of a pipeline lie as far apart as all of its stages.
    span = of_stage * p.pp if group == "embedding" else stride * size
    if span <= gpus_per_node and gpus_per_node % span == 0:
        return Placement(size, size)
    return Placement(size, min(max(gpus_per_node // stride, 1), max(size - 1, 1)))


class Network:
    """A cluster's links, as the groups of one layout see them.

    Args:
        config: checked for this world size.
    """

    def __init__(self, config: Config, world_size: int, cluster: Cluster):
        self._cluster = cluster
        self._where = {name: placement(config, world_size, name, cluster.gpus_per_node) for name in GROUPS}

    def where(self, group: str) -> Placement:
        return self._where[group]

    def collective(self, group: str, operation: str, num_bytes: float) -> float:
        """Seconds of an all_gather, reduce_scatter or all_reduce over a whole buffer of `num_bytes`."""
        size = self._where[group].size
        return self.sent(group, operation, ring(operation, size, num_bytes)) if size > 1 else 0.0

    def all_to_all(self, group: str, num_bytes: float) -> float:
        """Seconds until a rank has sent `num_bytes` to the others of its group, to each as much, while they do the same."""
        return self.sent(group, "all_to_all", num_bytes)

    def send(self, num_bytes: float) -> float:
        """Seconds of handing `num_bytes` to the next pipeline stage."""
        return self.sent("pp", "send", num_bytes)

    def sent(self, group: str, operation: str, num_bytes: float, calls: int = 1) -> float:
        """Seconds of `calls` collectives in which a rank sends `num_bytes` altogether, as communication.py counts them."""
        where = self._where[group]
        if where.size == 1 or not num_bytes:
            return 0.0
        return self._undisturbed(where, operation, num_bytes, calls) / self._cluster.sustained.collectives

    def _undisturbed(self, where: Placement, operation: str, num_bytes: float, calls: int) -> float:
        inside, between = self._cluster.inside, self._cluster.between
        link = between if where.crosses else inside
        if operation == "send":
            return calls * link.latency_seconds + num_bytes / link.bytes_per_second
        if operation == "all_to_all":
            near = num_bytes * (where.per_node - 1) / (where.size - 1)
            far = calls * between.latency_seconds + (num_bytes - near) / between.bytes_per_second if where.crosses else 0.0
            return max(calls * inside.latency_seconds + near / inside.bytes_per_second, far)
        steps = calls * _STEPS[operation]
        if not where.crosses:
            return steps * (where.size - 1) * inside.latency_seconds + num_bytes / inside.bytes_per_second
        nodes = -(-where.size // where.per_node)
        bandwidth = where.per_node * between.bytes_per_second
        if where.per_node > 1:
            bandwidth = min(bandwidth, inside.bytes_per_second)
        latency = nodes * between.latency_seconds + max(where.size - 1 - nodes, 0) * inside.latency_seconds
        return steps * latency + num_bytes / bandwidth


GROUPS = ("tp", "cp", "tp_cp", "dp_cp", "tp_dp_cp", "pp", "embedding", "etp", "ep", "etp_ep", "expert_dp")
