"""Tokens that changed experts, against hand-made routing."""

from __future__ import annotations

import pytest
import torch

from megatron_skywork.moe.routing_probe import RoutingProbe, changed_shares


def _map(*chosen: tuple[int, ...], experts: int = 4) -> torch.Tensor:
    routing_map_TE = torch.zeros(len(chosen), experts, dtype=torch.bool)
    for token, ids in enumerate(chosen):
        routing_map_TE[token, list(ids)] = True
    return routing_map_TE


def _evaluated(probe: RoutingProbe, *maps: torch.Tensor) -> list[float]:
    probe.listen()
    for routing_map_TE in maps:
        probe.see(routing_map_TE)
    return probe.compare().tolist()


def test_the_first_comparison_compares_nothing_and_the_next_ones_count_tokens() -> None:
    probe = RoutingProbe()
    assert _evaluated(probe, _map((0, 1), (1, 2), (2, 3))) == [0, 0]
    assert _evaluated(probe, _map((1, 0), (1, 2), (2, 3))) == [0, 3]
    # One token changed one expert, one both; each is one token.
    assert _evaluated(probe, _map((0, 2), (0, 3), (2, 3))) == [2, 3]
    # Against the evaluation before, not against the first.
    assert _evaluated(probe, _map((0, 2), (0, 3), (2, 3))) == [0, 3]


def test_only_the_first_micro_batch_of_an_evaluation_is_seen() -> None:
    probe = RoutingProbe()
    first, second, third = _map((0, 1), (1, 2)), _map((2, 3), (0, 3)), _map((0, 2), (1, 3))
    probe.see(second)
    _evaluated(probe, first, second, third)
    probe.see(second)
    assert _evaluated(probe, first, third, second) == [0, 2]
    assert _evaluated(probe, second, first) == [2, 2]


def test_what_was_seen_is_a_copy() -> None:
    probe = RoutingProbe()
    routing_map_TE = _map((0, 1), (1, 2))
    _evaluated(probe, routing_map_TE)
    routing_map_TE.zero_()
    assert _evaluated(probe, _map((0, 1), (1, 2))) == [0, 2]


def test_an_evaluation_that_broke_off_leaves_no_trace() -> None:
    probe = RoutingProbe()
    _evaluated(probe, _map((0, 1)))
    probe.listen()
    probe.see(_map((2, 3)))
    assert _evaluated(probe, _map((0, 1))) == [0, 1]
    probe.listen()
    probe.see(_map((2, 3)))
    probe.listen()
    with pytest.raises(RuntimeError, match="saw nothing"):
        probe.compare()


def test_a_router_that_did_not_run_or_another_probe_is_an_error() -> None:
    probe = RoutingProbe()
    probe.listen()
    with pytest.raises(RuntimeError, match="saw nothing"):
        probe.compare()
    _evaluated(probe, _map((0, 1)))
    with pytest.raises(RuntimeError, match=r"is \[2, 4\] and was \[1, 4\]"):
        _evaluated(probe, _map((0, 1), (0, 1)))


def test_shares_of_several_layers() -> None:
    probes = [RoutingProbe(), RoutingProbe()]
    before = [_map((0, 1), (1, 2), (2, 3), (0, 3))] * 2
    after = [_map((0, 1), (1, 2), (2, 3), (0, 2)), before[1]]
    for maps, expected in ((before, [None, None]), (after, [0.25, 0.0])):
        for probe, routing_map_TE in zip(probes, maps, strict=True):
            probe.listen()
            probe.see(routing_map_TE)
        assert changed_shares(probes, None) == expected
    assert changed_shares([], None) == []
