"""Tokens to rows and back: against brute force and megatron-core's permute, with assignments dropped, experts without tokens and tokens without experts.

On a machine with a GPU everything here runs on it."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_skywork.moe.permutation import from_rows, plan_rows, reorder_rows, sort_runs, to_rows, weights_of_rows

pytestmark = pytest.mark.usefixtures("on_the_device")
HIDDEN = 6


def routing(tokens: int, experts: int, topk: int, dropped: float, seed: int = 0) -> Tensor:
    """A map with top-k experts for each token, some assignments dropped."""
    torch.manual_seed(seed)
    chosen = torch.rand(tokens, experts).topk(topk, dim=1).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
    return routing_map & (torch.rand(tokens, experts) >= dropped)


CASES = [(17, 5, 2, 0.0), (17, 5, 2, 0.3), (9, 4, 1, 0.5), (6, 8, 3, 1.0), (1, 2, 2, 0.0), (40, 3, 3, 0.1)]


@pytest.mark.parametrize(("tokens", "experts", "topk", "dropped"), CASES)
def test_rows_lie_by_expert_then_by_token(tokens: int, experts: int, topk: int, dropped: float) -> None:
    routing_map = routing(tokens, experts, topk, dropped)
    plan = plan_rows(routing_map, tokens * topk)
    wanted = [(token, expert) for expert in range(experts) for token in range(tokens) if routing_map[token, expert]]
    assert plan.tokens_per_expert.tolist() == routing_map.sum(0).tolist()
    assert plan.assignment_of_row[: len(wanted)].tolist() == [token * experts + expert for token, expert in wanted]
    assert plan.token_of_row.shape == (tokens * topk,), "the number of rows follows from shapes"
    for row, (token, expert) in enumerate(wanted):
        assert plan.row_of_assignment_TE[token, expert] == row
    for token in range(tokens):
        own = plan.rows_of_tokens[plan.first_of_token[token] : plan.first_of_token[token + 1]].tolist()
        assert own == [row for row, (other, _) in enumerate(wanted) if other == token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [False, True], ids=["all rows", "rows in use"])
@pytest.mark.parametrize(("tokens", "experts", "topk", "dropped"), CASES)
def test_equals_megatron_core_and_its_gradients(tokens: int, experts: int, topk: int, dropped: float, cut: bool, dtype: torch.dtype) -> None:
    routing_map = routing(tokens, experts, topk, dropped)
    used = int(routing_map.sum())
    plan = plan_rows(routing_map, tokens * topk)
    plan = plan.cut(used) if cut else plan
    hidden, probs = torch.randn(tokens, HIDDEN).to(dtype), torch.rand(tokens, experts) * routing_map
    ours = [hidden.clone().requires_grad_(), probs.clone().requires_grad_()]
    theirs = [hidden.double().requires_grad_(), probs.double().requires_grad_()]
    scale = torch.randn(tokens * topk, 1).double()

    rows, weights = to_rows(ours[0], plan), weights_of_rows(ours[1], plan)
    output = from_rows((rows.double() * weights.unsqueeze(-1) * scale[: rows.shape[0]]).to(dtype), plan)
    their_rows, their_weights, order = permute(theirs[0], routing_map, probs=theirs[1], num_out_tokens=used)[:3]
    their_output = unpermute(their_rows * their_weights.unsqueeze(-1) * scale[:used], order, restore_shape=hidden.shape)

    assert torch.equal(rows[:used].double(), their_rows) and torch.equal(weights[:used].double(), their_weights)
    upstream = torch.randn(tokens, HIDDEN).to(dtype)
    output.backward(upstream)
    their_output.backward(upstream.double())
    exact = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output.double(), their_output, **exact)
    for one, two in zip(ours, theirs, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), two.grad, **exact)


def test_what_lies_in_unused_rows_reaches_nobody() -> None:
    routing_map = routing(12, 4, 2, 0.4)
    plan, used = plan_rows(routing_map, 24), int(routing_map.sum())
    probs = torch.rand(12, 4, requires_grad=True)
    hidden = torch.randn(12, HIDDEN, requires_grad=True)
    rows, weights = to_rows(hidden, plan), weights_of_rows(probs, plan)
    spoiled = torch.where(torch.arange(24).unsqueeze(-1) < used, rows.detach(), float("nan"))
    assert not from_rows(spoiled, plan).isnan().any()
    torch.autograd.backward([rows, weights], [torch.where(torch.isnan(spoiled), spoiled, 1.0), torch.where(torch.arange(24) < used, 1.0, float("nan"))])
    assert torch.equal(hidden.grad, routing_map.sum(1, keepdim=True).expand(-1, HIDDEN).float())
    assert torch.equal(probs.grad, routing_map.float())


def test_a_token_in_more_experts_than_top_k_is_summed_over_all() -> None:
    """Slots padded to capacity put a token, with weight 0, where it was not routed."""
    routing_map = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    plan = plan_rows(routing_map, 6)
    assert torch.equal(from_rows(torch.ones(6, HIDDEN), plan), routing_map.sum(1, keepdim=True).expand(-1, HIDDEN).float())


class HostReads(TorchDispatchMode):
    """Operations that would make the host wait for a GPU, or whose shapes only the device knows."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        if any(forbidden in name for forbidden in self.NAMES) and not (kwargs or {}).get("output_size"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    routing_map, hidden, probs = routing(16, 4, 2, 0.2), torch.randn(16, HIDDEN, requires_grad=True), torch.rand(16, 4, requires_grad=True)
    with HostReads() as reads:
        plan = plan_rows(routing_map, 32)
        (from_rows(to_rows(hidden, plan), plan).sum() + weights_of_rows(probs, plan).sum()).backward()
        sort_runs(torch.tensor([[1, 2], [3, 4]]), 10)
    assert reads.found == []
    with HostReads() as reads:
        hidden.masked_select(routing_map[:, :1])
    assert reads.found, "a selection by a mask does, so this test can see it"


@pytest.mark.parametrize(("sources", "experts"), [(1, 3), (4, 1), (3, 5), (2, 2)])
def test_runs_are_sorted_by_expert_then_source(sources: int, experts: int) -> None:
    torch.manual_seed(2)
    counts = torch.randint(0, 5, (sources, experts))
    marks = torch.tensor([100 * source + expert for source in range(sources) for expert in range(experts) for _ in range(int(counts[source, expert]))])
    order, inverse = sort_runs(counts, len(marks))
    rows = marks.double().unsqueeze(-1).requires_grad_()
    result = reorder_rows(rows, order, inverse)
    wanted = [100 * source + expert for expert in range(experts) for source in range(sources) for _ in range(int(counts[source, expert]))]
    assert result.squeeze(-1).tolist() == wanted
    assert reorder_rows(result, inverse, order).squeeze(-1).tolist() == marks.tolist()
    upstream = torch.rand_like(result)
    result.backward(upstream)
    assert torch.equal(rows.grad, upstream[inverse])
