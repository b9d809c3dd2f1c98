"""Process groups against megatron-core's own RankGenerator, and which of them leave a node."""

import itertools

import pytest

from megatron_skywork.config.schema import Parallel
from megatron_skywork.plan.topology import coincidences, process_groups

LAYOUTS = [
    (world, tp, pp, cp, ep, etp)
    for world, tp, pp, cp, ep, etp in itertools.product((1, 2, 4, 8, 12, 16, 24, 48), (1, 2, 4), (1, 2, 3), (1, 2), (1, 2, 4), (1, 2))
    if world % (tp * pp * cp) == 0 and world % (ep * etp * pp) == 0
]


def test_groups_equal_megatron_cores():
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    assert len(LAYOUTS) > 200
    for world, tp, pp, cp, ep, etp in LAYOUTS:
        groups = process_groups(Parallel(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp), world)
        dense = RankGenerator(tp=tp, ep=1, dp=world // (tp * pp * cp), pp=pp, cp=cp, order=order)
        expert = RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order=order)
        expected = {name: dense.get_ranks(name) for name in ("tp", "cp", "dp", "pp")}
        expected |= {"etp": expert.get_ranks("tp"), "ep": expert.get_ranks("ep"), "expert_dp": expert.get_ranks("dp")}
        assert {name: group.ranks for name, group in groups.items()} == expected, (world, tp, pp, cp, ep, etp)
        assert expert.get_ranks("pp") == expected["pp"]


def test_every_rank_is_in_one_group_of_each_kind():
    for world, tp, pp, cp, ep, etp in LAYOUTS:
        for group in process_groups(Parallel(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp), world).values():
            assert sorted(itertools.chain.from_iterable(group.ranks)) == list(range(world))


def test_the_report_s_layout():
    """1536 ranks: PP 12, TP = EP 4, DP 32; experts are exchanged inside a node, gradients over 16 nodes."""
    groups = process_groups(Parallel(tp=4, pp=12, ep=4), 1536)
    assert [(name, len(group.ranks), group.size) for name, group in groups.items() if group.size > 1] == [
        ("tp", 384, 4), ("dp", 48, 32), ("pp", 128, 12), ("ep", 384, 4), ("expert_dp", 48, 32)]
    assert groups["ep"].ranks[1] == [4, 5, 6, 7] and groups["dp"].ranks[1] == list(range(1, 128, 4)) and groups["pp"].ranks[1] == list(range(1, 1536, 128))
    assert coincidences(groups) == [("tp", "ep"), ("dp", "expert_dp")]
    assert {name: group.crossing(8) for name, group in groups.items()} == {"tp": 0, "cp": 0, "dp": 48, "pp": 128, "etp": 0, "ep": 0, "expert_dp": 48}


@pytest.mark.parametrize(("parallel", "world", "per_node", "crossing"), [
    ({"tp": 4}, 8, 8, {"tp": 0, "dp": 0}),
    ({"tp": 4}, 8, 4, {"tp": 0, "dp": 4}),
    ({"tp": 4}, 8, 2, {"tp": 2, "dp": 4}),
    ({"tp": 3}, 6, 4, {"tp": 1, "dp": 2}),
    ({"ep": 8}, 16, 8, {"ep": 0, "expert_dp": 8, "dp": 1}),
    ({"tp": 2, "ep": 8}, 16, 4, {"tp": 0, "ep": 2}),
])
def test_groups_that_cross_nodes(parallel, world, per_node, crossing):
    groups = process_groups(Parallel(**parallel), world)
    assert {name: groups[name].crossing(per_node) for name in crossing} == crossing


def test_a_dense_model_has_no_expert_groups():
    assert list(process_groups(Parallel(), 2, with_experts=False)) == ["tp", "cp", "dp", "pp"]
