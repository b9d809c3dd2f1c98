"""Which nodes may train: pure decisions on what the nodes have reported, so that every case can be tried without a node.

A node can be at fault by itself (a GPU is missing, the disk is full, another version, no answer), and is then named at once. Or only together with others:
the all-reduce over all nodes hangs, is wrong or is slow, and every node sees the same. Then neighbours on a ring of all healthy nodes, spares among them, try
in pairs: a node all of whose pairs fail is at fault, its neighbours fail with it alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# A report: {"node", "problems": [what the node can only have by itself], "link_problems": [what may be the fault of any node of its group], ...}
Report = dict[str, Any]


NO_ANSWER = "gave no answer"


@dataclass(frozen=True)
class Round:
    """One all-reduce that was run: over `nodes`, with the report of each node that answered.

    Args:
        kind: `all`, the nodes that are to train; `pair`, two neighbours on the ring.
    """

    kind: str
    nodes: tuple[str, ...]
    reports: dict[str, Report]

    def own_problems(self) -> dict[str, list[str]]:
        """Node -> what is its own fault for certain."""
        own = {node: self.reports[node]["problems"] if node in self.reports else [NO_ANSWER] for node in self.nodes}
        return {node: problems for node, problems in own.items() if problems}

    def link_problems(self) -> list[str]:
        """What went wrong between nodes; nothing is said of that where a node has a fault of its own, which explains it."""
        if self.own_problems():
            return []
        return [f"{node}: {problem}" for node in self.nodes for problem in self.reports[node]["link_problems"]]

    @property
    def passed(self) -> bool:
        return not self.own_problems() and not self.link_problems()


@dataclass
class Step:
    """What to do next: `run` an all-reduce over each group at the same time, `use` the nodes of the only group, or `fail`.

    Args:
        bad: node -> what is wrong with it, as far as is known.
    """

    word: str
    kind: str = ""
    groups: list[tuple[str, ...]] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=dict)
    why: str = ""


def odd_versions(reports: dict[str, Report]) -> dict[str, list[str]]:
    """Nodes whose versions are not what most nodes have (with as many on both sides: not what the first node has)."""
    bad: dict[str, list[str]] = {}
    nodes = list(reports)
    for name in sorted({name for report in reports.values() for name in report.get("versions", {})}):
        values = {node: reports[node].get("versions", {}).get(name) for node in nodes}
        counts = Counter(values.values())
        usual = max(counts, key=lambda value: (counts[value], value == values[nodes[0]]))
        for node in nodes:
            if values[node] != usual:
                bad.setdefault(node, []).append(f"{name} is {values[node] or 'missing'}, and {usual or 'missing'} on the other nodes")
    return bad


def ring_pairs(nodes: list[str]) -> list[list[tuple[str, ...]]]:
    """The edges of a ring in rounds of pairs that share no node: two rounds, or three for an odd number of nodes."""
    if len(nodes) < 2:
        return []
    edges = [(nodes[i], nodes[(i + 1) % len(nodes)]) for i in range(len(nodes) if len(nodes) > 2 else 1)]
    last = [edges.pop()] if len(edges) % 2 and len(edges) > 1 else []
    return [list(part) for part in (edges[0::2], edges[1::2], last) if part]


def next_step(nodes: list[str], want: int, checks: dict[str, Report], rounds: list[Round]) -> Step:
    """What follows from the reports so far.

    Args:
        nodes: the job's nodes in order.
        want: how many are needed.
        checks: what each node said of itself; a node that is missing here gave no answer.
        rounds: all-reduces so far, in order.
    """
    bad = {node: list(checks[node]["problems"]) if node in checks else [NO_ANSWER] for node in nodes}
    bad = {node: problems for node, problems in bad.items() if problems}
    sound = {node: checks[node] for node in nodes if node not in bad}
    for found in (odd_versions(sound), *(one.own_problems() for one in rounds)):
        for node, problems in found.items():
            bad.setdefault(node, []).extend(problems)
    candidates = [node for node in nodes if node not in bad]
    if any(one.link_problems() for one in rounds):
        tried = {one.nodes: one for one in rounds if one.kind == "pair"}
        for pairs in ring_pairs(candidates):
            if untried := [pair for pair in pairs if pair not in tried]:
                return Step("run", "pair", untried, bad)
        bad.update(guilty_of_links(candidates, tried))
    healthy = [node for node in candidates if node not in bad]
    if len(healthy) < want:
        hint = ""
        if len(candidates) == 2 and not healthy:
            hint = f"; of the two nodes {' and '.join(candidates)} nobody can tell which is at fault, with a spare node one can"
        return Step("fail", bad=bad, why=f"{want} nodes are needed, and {len(healthy)} passed{hint}")
    chosen = tuple(healthy[:want])
    together = [one for one in rounds if one.kind == "all" and one.nodes == chosen]
    if together and together[-1].passed:
        return Step("use", groups=[chosen], bad=bad)
    if len(together) < 2:  # a second time where no pair is at fault: it may have been a moment's trouble
        return Step("run", "all", [chosen], bad)
    return Step("fail", bad=bad, why=f"the all-reduce over all nodes failed twice, and no single node is at fault: {'; '.join(together[-1].link_problems())}")


def guilty_of_links(candidates: list[str], tried: dict[tuple[str, ...], Round]) -> dict[str, list[str]]:
    """Nodes that failed together with every neighbour on the ring."""
    guilty = {}
    for node in candidates:
        of_node = [tried[pair] for pairs in ring_pairs(candidates) for pair in pairs if node in pair]
        if of_node and not any(one.passed for one in of_node):
            partners = " and with ".join(other for one in of_node for other in one.nodes if other != node)
            guilty[node] = [f"fails with {partners} ({of_node[0].link_problems()[0]})"]
    return guilty
