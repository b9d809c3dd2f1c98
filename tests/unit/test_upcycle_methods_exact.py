"""Mixtures put together from the methods' pieces, in fp64 with plain tensor maths, against the dense feed-forward they come from."""

from __future__ import annotations

import pytest
import torch

from megatron_skywork.convert.upcycling.methods import granular, router_init, shared
from megatron_skywork.convert.upcycling.methods.drop import dropped_columns, reinitialize
from megatron_skywork.convert.upcycling.methods.row_chunks import scaled
from megatron_skywork.convert.upcycling.methods.seeds import generator

FFN, HIDDEN, TOKENS, COPIES, CHOSEN = 24, 10, 50, 4, 2
Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def dense(dtype: torch.dtype = torch.bfloat16) -> Expert:
    draw = torch.Generator().manual_seed(1)
    shapes = ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
    gate, up, down = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return gate, up, down


def tokens() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def run(expert: Expert, x_TH: torch.Tensor) -> torch.Tensor:
    gate, up, down = (each.double() for each in expert)
    return (torch.nn.functional.silu(x_TH @ gate.T) * (x_TH @ up.T)) @ down.T


def mixture(experts: list[Expert], router_EH: torch.Tensor, topk: int, x_TH: torch.Tensor, pre_softmax: bool = False) -> torch.Tensor:
    """Top-k of the logits; weights that sum to 1, or with pre_softmax the probabilities over all experts as they are."""
    logits_TE = x_TH @ router_EH.double().T
    top = logits_TE.topk(topk)
    probs = logits_TE.softmax(-1).gather(1, top.indices) if pre_softmax else top.values.softmax(-1)
    weights_TE = torch.zeros_like(logits_TE).scatter(1, top.indices, probs)
    return sum((weights_TE[:, [number]] * run(expert, x_TH) for number, expert in enumerate(experts)), torch.zeros(TOKENS, HIDDEN, dtype=torch.float64))


def pieces_of(expert: Expert, pieces: int, factor: float) -> list[Expert]:
    """Experts of granular upcycling in the order virtual_groups numbers them."""
    gate, up, down = expert
    up_scale, down_scale = granular.scales(factor)
    cut = [
        (
            granular.piece(gate, index, pieces, 0),
            scaled(granular.piece(up, index, pieces, 0), up_scale),
            scaled(granular.piece(down, index, pieces, 1), down_scale),
        )
        for index in range(pieces)
    ]
    return cut * COPIES


def distance(found_TH: torch.Tensor, expected_TH: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found_TH - expected_TH).abs().max() / expected_TH.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_a_granular_mixture_is_the_dense_model(pieces: int, dtype: torch.dtype) -> None:
    router_CH = router_init.normal(COPIES, HIDDEN, 0.5, generator(1, "router"))
    found_TH = mixture(pieces_of(dense(dtype), pieces, pieces), granular.virtual_groups(router_CH, pieces), CHOSEN * pieces, tokens())
    assert granular.exact_scales(pieces)
    assert distance(found_TH, run(dense(dtype), tokens())) < 1e-13


def test_a_factor_that_is_no_power_of_two_rounds_the_weights_once() -> None:
    router_EH = granular.virtual_groups(router_init.normal(COPIES, HIDDEN, 0.5, generator(1, "router")), 3)
    errors = [
        distance(mixture(pieces_of(dense(dtype), 3, 3), router_EH, 3 * CHOSEN, tokens()), run(dense(dtype), tokens()))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert not granular.exact_scales(3)
    assert 1e-4 < errors[0] < 2e-2 and 1e-9 < errors[1] < 1e-6


def test_without_virtual_groups_pieces_are_missing() -> None:
    router_EH = router_init.normal(COPIES * 4, HIDDEN, 0.5, generator(1, "router"))
    assert distance(mixture(pieces_of(dense(), 4, 4), router_EH, CHOSEN * 4, tokens()), run(dense(), tokens())) > 0.1


def test_the_papers_cube_root_on_all_three_matrices_only_comes_near() -> None:
    """What the module says of it: silu is not homogeneous."""
    root = 4 ** (1 / 3)
    cube = [
        (gate.float() * root, up.float() / granular.scales(4)[0] * root, down.float() / granular.scales(4)[1] * root)
        for gate, up, down in pieces_of(dense(), 4, 4)
    ]
    router_EH = granular.virtual_groups(router_init.normal(COPIES, HIDDEN, 0.5, generator(1, "router")), 4)
    assert 5e-3 < distance(mixture(cube, router_EH, CHOSEN * 4, tokens()), run(dense(), tokens())) < 1.0


def test_pre_softmax_is_exact_where_all_probabilities_are_equal_and_near_for_small_routers() -> None:
    expected_TH = run(dense(), tokens())
    factor = granular.uniform_factor(COPIES, CHOSEN, 1)
    assert factor == COPIES / CHOSEN and granular.exact_scales(factor)
    assert distance(mixture(pieces_of(dense(), 1, factor), router_init.zero(COPIES, HIDDEN), CHOSEN, tokens(), pre_softmax=True), expected_TH) < 1e-13
    errors = []
    for std in (1e-4, 1e-2):
        router_EH = granular.virtual_groups(router_init.normal(COPIES, HIDDEN, std, generator(1, "router")), 4)
        experts = pieces_of(dense(), 4, granular.uniform_factor(COPIES * 4, CHOSEN * 4, 4))
        errors.append(distance(mixture(experts, router_EH, CHOSEN * 4, tokens(), pre_softmax=True), expected_TH))
    assert 1e-7 < errors[0] < 1e-3 < errors[1] < 0.1


@pytest.mark.parametrize("shared_ffn", [1, 8, 23, 24])
@pytest.mark.parametrize("gated", [False, True])
def test_shared_and_routed_experts_together_are_the_dense_model(shared_ffn: int, gated: bool) -> None:
    gate, up, down = dense()
    common = (shared.shared_part(gate, shared_ffn, 0), shared.shared_part(up, shared_ffn, 0), shared.shared_part(down, shared_ffn, 1))
    opening_T1 = torch.ones(TOKENS, 1, dtype=torch.float64)
    if gated:
        common = (common[0], common[1], shared.behind_gate(common[2]))
        opening_T1 = torch.sigmoid(tokens() @ shared.gate_row(HIDDEN, torch.bfloat16).double().T)
    routed = (shared.routed_part(gate, shared_ffn, 0), shared.routed_part(up, shared_ffn, 0), shared.routed_part(down, shared_ffn, 1))
    router_EH = router_init.normal(COPIES, HIDDEN, 0.5, generator(1, "router"))
    found_TH = opening_T1 * run(common, tokens()) + mixture([routed] * COPIES, router_EH, CHOSEN, tokens())
    assert distance(found_TH, run(dense(), tokens())) < 1e-13


def test_a_shared_expert_and_granular_experts_together_are_the_dense_model() -> None:
    gate, up, down = dense()
    common = (shared.shared_part(gate, 8, 0), shared.shared_part(up, 8, 0), shared.shared_part(down, 8, 1))
    routed = (shared.routed_part(gate, 8, 0), shared.routed_part(up, 8, 0), shared.routed_part(down, 8, 1))
    router_EH = granular.virtual_groups(router_init.normal(COPIES, HIDDEN, 0.5, generator(1, "router")), 4)
    found_TH = run(common, tokens()) + mixture(pieces_of(routed, 4, 4), router_EH, CHOSEN * 4, tokens())
    assert distance(found_TH, run(dense(), tokens())) < 1e-13


def test_dropped_experts_keep_the_columns_they_do_not_drop() -> None:
    """One index set for the three matrices: what is left of the dense feed-forward is its kept columns, whole."""
    columns = dropped_columns(FFN, 0.5, generator(1, 0, "columns"))
    gate, up, down = (reinitialize(each, columns, axis, generator(1, 0, name)) for each, axis, name in zip(dense(), (0, 0, 1), "gud", strict=True))
    kept = torch.tensor(sorted(set(range(FFN)) - set(columns.tolist())))
    left = (gate[kept], up[kept], down[:, kept])
    source = dense()
    assert torch.equal(run(left, tokens()), run((source[0][kept], source[1][kept], source[2][:, kept]), tokens()))
    assert distance(run((gate, up, down), tokens()), run(source, tokens())) > 0.1
