"""Which node is named and which nodes train, on simulated nodes: faults of a node, of a link, of nothing."""

from __future__ import annotations

import pytest

from preflight_verdict import NO_ANSWER, Round, Step, next_step, odd_versions, ring_pairs

NODES = ["n1", "n2", "n3", "n4", "n5", "n6"]


def check(*problems: str, **versions: str) -> dict:
    return {"problems": list(problems), "versions": versions}


def decide(nodes: list[str], want: int, fails, checks: dict | None = None) -> tuple[Step, list[Round]]:
    """Follows the steps to the end; `fails(group)` says what the nodes of a group see of each other, or nothing."""
    checks = {node: check() for node in nodes} if checks is None else checks
    rounds: list[Round] = []
    for _ in range(20):
        step = next_step(nodes, want, checks, rounds)
        if step.word != "run":
            return step, rounds
        flat = [node for group in step.groups for node in group]
        assert len(flat) == len(set(flat)), "groups that run at the same time share no node"
        for group in step.groups:
            rounds.append(Round(step.kind, group, {node: {"problems": [], "link_problems": fails(group)} for node in group}))
    raise AssertionError("no end")


def test_healthy_nodes_are_taken_in_order_after_one_all_reduce():
    step, rounds = decide(NODES, 4, lambda group: [])
    assert (step.word, step.groups, step.bad, len(rounds)) == ("use", [("n1", "n2", "n3", "n4")], {}, 1)


@pytest.mark.parametrize("checks", [
    {"n1": check(), "n2": check("disk is full"), "n3": check()},
    {"n1": check(), "n3": check()},
    {"n1": check(torch="2.13"), "n2": check(torch="2.12"), "n3": check(torch="2.13")},
])
def test_a_node_at_fault_is_named_and_the_spare_takes_its_place(checks: dict):
    step, _ = decide(["n1", "n2", "n3"], 2, lambda group: [], checks)
    assert (step.word, step.groups, list(step.bad)) == ("use", [("n1", "n3")], ["n2"])
    step, rounds = decide(["n1", "n2", "n3"], 3, lambda group: [], checks)
    assert (step.word, list(step.bad), rounds) == ("fail", ["n2"], [])
    assert "3 nodes are needed, and 2 passed" in step.why


@pytest.mark.parametrize("num_nodes", [3, 4, 5, 6])
def test_every_node_behind_a_dead_link_is_found_by_pairs(num_nodes: int):
    nodes = NODES[:num_nodes]
    for guilty in nodes:
        step, rounds = decide(nodes, num_nodes - 1, lambda group, guilty=guilty: ["no answer in 9 s"] if guilty in group and len(group) > 1 else [])
        if guilty == nodes[-1]:  # the spare is not asked where nobody needs it
            assert (step.word, step.bad, len(rounds)) == ("use", {}, 1)
            continue
        assert (step.word, list(step.bad)) == ("use", [guilty])
        assert step.groups == [tuple(node for node in nodes if node != guilty)]


def test_two_nodes_without_a_spare_are_not_told_apart():
    step, _ = decide(["n1", "n2"], 2, lambda group: ["no answer"])
    assert (step.word, list(step.bad)) == ("fail", ["n1", "n2"])
    assert "spare" in step.why


def test_a_moment_s_trouble_is_tried_again_and_lasting_trouble_ends_it():
    seen = []
    step, _ = decide(NODES, 6, lambda group: seen.append(group) or (["slow"] if len(group) == 6 and len(seen) == 1 else []))
    assert (step.word, step.bad) == ("use", {})
    step, rounds = decide(NODES, 6, lambda group: ["slow"] if len(group) == 6 else [])
    assert (step.word, step.bad, sum(one.kind == "all" for one in rounds)) == ("fail", {}, 2)
    assert "slow" in step.why


def test_a_node_that_dies_in_an_all_reduce_is_at_fault_and_not_those_that_waited_for_it():
    reports = {"n1": {"problems": [], "link_problems": ["no answer"]}, "n3": {"problems": ["a rank died"], "link_problems": []}}
    step = next_step(["n1", "n2", "n3", "n4"], 1, {node: check() for node in NODES}, [Round("all", ("n1", "n2", "n3"), reports)])
    assert step.bad == {"n2": [NO_ANSWER], "n3": ["a rank died"]}
    assert (step.word, step.groups) == ("run", [("n1",)])


def test_versions_are_held_against_the_majority_and_the_first_node():
    assert odd_versions({"a": check(x="1"), "b": check(x="2"), "c": check(x="2")}) == {"a": ["x is 1, and 2 on the other nodes"]}
    assert odd_versions({"a": check(x="1"), "b": check(x="2")}) == {"b": ["x is 2, and 1 on the other nodes"]}
    assert odd_versions({"a": check(x="1"), "b": check()}) == {"b": ["x is missing, and 1 on the other nodes"]}


@pytest.mark.parametrize("count", range(2, 8))
def test_the_ring_is_whole(count: int):
    nodes = [f"n{number}" for number in range(count)]
    pairs = [pair for pair_round in ring_pairs(nodes) for pair in pair_round]
    assert sorted(map(sorted, pairs)) == sorted(sorted((nodes[i], nodes[(i + 1) % count])) for i in range(count if count > 2 else 1))
