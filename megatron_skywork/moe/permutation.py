"""Tokens to rows sorted by expert and back, both ways as a gather, without the host knowing how many rows there are.

An assignment (token, expert) is a row; rows lie sorted by expert, then by token. Two maps describe that:

    token_of_row [R]            row r holds a copy of token token_of_row[r]
    rows_of_tokens [R]          the rows of token 0, then those of token 1, ...; those of token t begin at first_of_token[t]

Dispatch copies rows, r <- token_of_row[r], and its backward sums the rows of each token. Combine sums the rows of each token, and its backward copies
rows. So there are two kernels, `index_select` and the sum of `embedding_bag`, each the other's gradient. Neither adds into memory that another thread
adds into: both are deterministic, and sums are formed in fp32. megatron-core scatters with atomic adds instead.

R is fixed by shapes alone (tokens times top-k, or experts times capacity). Where a capacity limit dropped assignments fewer rows are in use; the rest stand
behind the last expert's run, and bags of their own behind the last token take them, so that nothing waits for their number.

Shapes: T tokens, E experts, R rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

UNUSED_PER_BAG = 64
"""Rows not in use that are summed in one bag: a GPU sums a bag in turn, and one for all of them would be what everything waits for."""


@dataclass(frozen=True)
class RowPlan:
    """Where each assignment lies.

    Attributes:
        routing_map_TE: the assignments.
        tokens_per_expert: int64 [E].
        row_of_assignment_TE: int64; means something where the map is true.
        assignment_of_row: int64 [R], token * E + expert; 0 for a row not in use.
        rows_of_tokens: int64 [R].
        first_of_token: int64, [T] and then one entry for every UNUSED_PER_BAG rows that may not be in use.
    """

    routing_map_TE: Tensor
    tokens_per_expert: Tensor
    row_of_assignment_TE: Tensor
    assignment_of_row: Tensor
    rows_of_tokens: Tensor
    first_of_token: Tensor

    @property
    def token_of_row(self) -> Tensor:
        """int64 [R]."""
        return self.assignment_of_row // self.routing_map_TE.shape[1]

    def cut(self, num_rows: int) -> RowPlan:
        """The same with the rows in use alone, once the host knows their number."""
        return replace(
            self,
            assignment_of_row=self.assignment_of_row[:num_rows],
            rows_of_tokens=self.rows_of_tokens[:num_rows],
            first_of_token=self.first_of_token[: self.routing_map_TE.shape[0]],
        )


def plan_rows(routing_map_TE: Tensor, num_rows: int) -> RowPlan:
    """Sort the assignments of a map by expert.

    Args:
        routing_map_TE: bool.
        num_rows: R, at least the number of assignments.
    """
    tokens, experts = routing_map_TE.shape
    tokens_per_expert, in_token_T = routing_map_TE.sum(dim=0), routing_map_TE.sum(dim=1)
    # Rows lie by expert, so counting through the map by expert numbers them; a scan along the other axis would be one thread per expert on a GPU.
    row_TE = (routing_map_TE.t().flatten().cumsum(0) - 1).view(experts, tokens).t()
    # Scattering the assignments that are none to one place behind the end is what a selection by the map would do, but its size is known.
    chosen, behind = routing_map_TE.flatten(), num_rows
    row, order = row_TE.flatten(), routing_map_TE.flatten().cumsum(0) - 1
    empty = torch.zeros(num_rows + 1, dtype=torch.int64, device=row.device)
    assignment_of_row = empty.scatter(0, torch.where(chosen, row, behind), torch.arange(row.shape[0], device=row.device))[:num_rows]
    rows_of_tokens = empty.scatter(0, torch.where(chosen, order, behind), row)[:num_rows]
    ends_T = in_token_T.cumsum(0)
    unused = ends_T[-1] + UNUSED_PER_BAG * torch.arange(-(-num_rows // UNUSED_PER_BAG), device=row.device)
    first_of_token = torch.cat([ends_T - in_token_T, unused.clamp(max=num_rows)])
    return RowPlan(routing_map_TE, tokens_per_expert, row_TE, assignment_of_row, rows_of_tokens, first_of_token)


def to_rows(tokens_TH: Tensor, plan: RowPlan) -> Tensor:
    """Copy each token to its rows, [R, H]."""
    return _LinearMap.apply(tokens_TH, partial(_copied, plan), partial(_summed, plan))


def from_rows(rows_RH: Tensor, plan: RowPlan) -> Tensor:
    """Sum each token's rows, [T, H]; a token without rows gets zeros."""
    return _LinearMap.apply(rows_RH, partial(_summed, plan), partial(_copied, plan))


def weights_of_rows(probs_TE: Tensor, plan: RowPlan) -> Tensor:
    """Each row's routing weight, [R]."""
    return _LinearMap.apply(probs_TE, partial(_weights, plan), partial(_probs, plan))


def reorder_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`rows[order]`, whose gradient is taken from its own place instead of being added up."""
    return _LinearMap.apply(rows, lambda rows: rows.index_select(0, order), lambda grad: grad.index_select(0, inverse))


def _copied(plan: RowPlan, tokens_TH: Tensor) -> Tensor:
    return tokens_TH.index_select(0, plan.token_of_row)


def _summed(plan: RowPlan, rows_RH: Tensor) -> Tensor:
    tokens = plan.routing_map_TE.shape[0]
    if rows_RH.shape[0] == 0:  # everything was dropped
        return rows_RH.new_zeros(tokens, rows_RH.shape[1])
    return torch.nn.functional.embedding_bag(plan.rows_of_tokens, rows_RH.contiguous(), plan.first_of_token, mode="sum")[:tokens]


def _weights(plan: RowPlan, probs_TE: Tensor) -> Tensor:
    return probs_TE.flatten().index_select(0, plan.assignment_of_row)


def _probs(plan: RowPlan, weights_R: Tensor) -> Tensor:
    if weights_R.shape[0] == 0:
        return weights_R.new_zeros(plan.routing_map_TE.shape)
    return torch.where(plan.routing_map_TE, weights_R[plan.row_of_assignment_TE.clamp(0, weights_R.shape[0] - 1)], 0.0)


class _LinearMap(torch.autograd.Function):
    """A linear map that is given with its transpose, so that both ways are a gather."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def sort_runs(counts_SE: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows that lie by source, then expert, put in order of expert, then source.

    Args:
        counts_SE: rows of each source and expert.
        num_rows: their sum.

    Returns:
        `order`, int64 [R], for each row of the result the row it is taken from, and its inverse.
    """
    first_SE = (counts_SE.flatten().cumsum(0) - counts_SE.flatten()).view_as(counts_SE)
    counts_ES = counts_SE.t().flatten()
    shift_ES = first_SE.t().flatten() - (counts_ES.cumsum(0) - counts_ES)
    here = torch.arange(num_rows, device=counts_SE.device)
    order = here + shift_ES.repeat_interleave(counts_ES, output_size=num_rows)
    return order, torch.empty_like(order).scatter_(0, order, here)
