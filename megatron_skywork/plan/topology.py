"""The process groups of any world size, without torch: which ranks work together in which way, and which groups leave a node.

Ranks are numbered as megatron-core's RankGenerator does with the order "tp-cp-ep-dp-pp": the first name varies fastest. There are two grids over the
same ranks, one for attention (tp, cp, dp, pp) and one for the experts (etp, ep, expert_dp, pp); with ep = tp and etp = 1 the expert-parallel
groups are the tensor-parallel groups (the Skywork-MoE report's "expert data parallel").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from megatron_skywork.config.schema import Config, Parallel

NAMES = {
    "tp": "tensor parallel", "cp": "context parallel", "dp": "data parallel", "pp": "pipeline parallel",
    "etp": "expert tensor parallel", "ep": "expert parallel", "expert_dp": "expert data parallel",
}


@dataclass(frozen=True)
class Groups:
    """All groups of one kind.

    Args:
        name: tp, cp, dp, pp, etp, ep or expert_dp.
        ranks: every group's ranks, in megatron-core's order; together they are all ranks.
    """

    name: str
    ranks: list[list[int]]

    @property
    def size(self) -> int:
        """Ranks in each group."""
        return len(self.ranks[0])

    def crossing(self, gpus_per_node: int) -> int:
        """How many of the groups have ranks on more than one node."""
        return sum(len({rank // gpus_per_node for rank in group}) > 1 for group in self.ranks)


def grid_groups(sizes: dict[str, int], name: str) -> list[list[int]]:
    """Groups along one axis of a grid of ranks.

    Args:
        sizes: axis lengths, the fastest varying axis first.
        name: the axis along which a group's ranks lie.

    Returns:
        groups, ordered by the other axes (the fastest first), each ordered along its axis.
    """
    strides, stride = {}, 1
    for axis, size in sizes.items():
        strides[axis] = stride
        stride *= size
    others = [axis for axis in sizes if axis != name]
    starts = [sum(index * strides[axis] for axis, index in zip(reversed(others), indices, strict=True))
              for indices in product(*(range(sizes[axis]) for axis in reversed(others)))]
    return [[start + index * strides[name] for index in range(sizes[name])] for start in starts]


def process_groups(parallel: Parallel, world_size: int, with_experts: bool = True) -> dict[str, Groups]:
    """Every kind of group for a split whose products divide the world size.

    Args:
        parallel: the degrees.
        world_size: number of ranks.
        with_experts: also the groups of the expert grid.
    """
    p = parallel
    grid = {"tp": p.tp, "cp": p.cp, "dp": world_size // (p.tp * p.cp * p.pp), "pp": p.pp}
    groups = {name: Groups(name, grid_groups(grid, name)) for name in grid}
    if with_experts:
        expert_grid = {"etp": p.etp, "ep": p.ep, "expert_dp": world_size // (p.etp * p.ep * p.pp), "pp": p.pp}
        groups |= {name: Groups(name, grid_groups(expert_grid, name)) for name in ("etp", "ep", "expert_dp")}
    return groups


def coincidences(groups: dict[str, Groups]) -> list[tuple[str, str]]:
    """Kinds of more than one rank whose groups are the same ranks, such as ep and tp."""
    names = [name for name in groups if groups[name].size > 1]
    pairs = [(first, second) for index, first in enumerate(names) for second in names[index + 1 :]]
    return [(first, second) for first, second in pairs if sorted(groups[first].ranks) == sorted(groups[second].ranks)]


def config_groups(config: Config, world_size: int) -> dict[str, Groups]:
    """The groups of a configuration; those of the expert grid only if it has experts."""
    return process_groups(config.parallel, world_size, with_experts=config.moe is not None)
