"""How tokens travel to their experts and back: megatron-core's all-to-all dispatcher with one kernel for each permutation, and the host out of the way.

    tokens -> rows by expert -> all-to-all over EP -> all-gather over expert TP -> rows by local expert      (and back the same way)

What differs from megatron-core is between the collectives. Rows are copied and summed by `permutation.py`. Without expert parallelism nothing waits for the
device: the number of rows follows from shapes, also where tokens are dropped. With it, what the collectives need to know (who sends how much) comes to the
host in one piece, once a layer; with slots padded to capacity that is known beforehand and there is no wait either. Where rows come from one rank alone
they already lie by expert, and the second permutation is left out.

Shapes: T tokens of this rank, E experts in all, L local experts, S ranks that rows come from (expert TP x EP), H hidden, R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_skywork.moe.permutation import RowPlan, from_rows, plan_rows, reorder_rows, sort_runs, to_rows, weights_of_rows

# With moe_shared_expert_overlap shared experts run beside the all-to-alls. megatron-core 0.19 calls them where it exchanges tokens, which is inherited;
# 0.16 calls them in the steps that are written anew here.
_CALLS_SHARED_EXPERTS = not hasattr(SharedExpertMLP, "wait_current_stream")


class SkyworkTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Dispatches and combines the tokens of one MoE layer, in the six steps that MoELayer calls."""

    plan: RowPlan
    tokens_per_expert: Tensor
    order: tuple[Tensor, Tensor] | None
    input_splits: Any
    output_splits: Any
    tp_splits: list[int] | None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Sort by expert.

        Args:
            hidden_states: [S, B, H] or any other shape ending in H.
            routing_map: bool [T, E].
            probs: [T, E].

        Returns:
            rows [R, H] and their weights [R].
        """
        # Not the weights themselves: they would keep the graph of all layers below alive until the next micro-batch.
        self.hidden_shape, self.probs_dtype = hidden_states.shape, probs.dtype
        tokens_TH = hidden_states.reshape(-1, self.hidden_shape[-1])
        assignments = tokens_TH.shape[0] * self.config.moe_router_topk
        if self.drop_and_pad:
            self.capacity = get_capacity(assignments, self.num_experts, self.moe_expert_capacity_factor)
        self.plan = plan_rows(routing_map, self.num_experts * self.capacity if self.drop_and_pad else assignments)
        if self.shared_experts is not None:  # before the host waits, so that the device has something to do
            self.shared_experts.pre_forward_comm(tokens_TH.view(self.hidden_shape))
        self._plan_exchange()
        return to_rows(tokens_TH, self.plan), weights_of_rows(probs, self.plan)

    def _plan_exchange(self) -> None:
        """Who sends how many rows to whom, and what sorts them afterwards."""
        self.order = self.tp_splits = self.input_splits = self.output_splits = None
        self.tokens_per_expert = self.plan.tokens_per_expert
        sources = self.tp_size * self.ep_size
        if sources == 1:
            return
        if self.drop_and_pad:
            counts_SL = torch.full((sources, self.num_local_experts), self.capacity, device=self.plan.tokens_per_expert.device)
            num_rows = counts_SL.numel() * self.capacity
        else:
            counts_SL = self._exchange_counts()
            assert self.tp_splits is not None
            num_rows = sum(self.tp_splits)
        self.tokens_per_expert = counts_SL.sum(dim=0)
        if self.num_local_experts > 1:
            self.order = sort_runs(counts_SL, num_rows)

    def _exchange_counts(self) -> Tensor:
        """Tell every rank what is coming, and the host the sizes of the collectives; rows of each source and local expert, [S, L]."""
        own_E = self.plan.tokens_per_expert
        all_SE = own_E.new_empty(self.ep_size * self.tp_size * self.num_experts)
        torch.distributed.all_gather_into_tensor(all_SE, own_E, group=self.tp_ep_group)
        # The group counts tensor-parallel ranks first; rows arrive by tensor-parallel rank, and from each by expert-parallel rank.
        counts = all_SE.view(self.ep_size, self.tp_size, self.num_experts).transpose(0, 1)
        counts = counts[:, :, self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        sent = own_E.view(self.ep_size, -1).sum(dim=1)
        received = counts[self.tp_rank].sum(dim=1)
        sizes = torch.cat([sent, received, counts.sum(dim=(1, 2))]).tolist()  # the one wait
        self.input_splits, self.output_splits = sizes[: self.ep_size], sizes[self.ep_size : 2 * self.ep_size]
        self.tp_splits = sizes[2 * self.ep_size :]
        self.plan = self.plan.cut(sum(self.input_splits))
        return counts.reshape(-1, self.num_local_experts)

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather over expert TP, and sort by local expert.

        Returns:
            rows [R, H], tokens per local expert [L] on the device, and weights [R].
        """
        if self.shared_experts is not None and _CALLS_SHARED_EXPERTS:
            self.shared_experts.linear_fc1_forward_and_act(global_input_tokens)
        rows, weights = global_input_tokens, global_probs
        if self.tp_size > 1:
            rows = gather_from_sequence_parallel_region(rows, group=self.tp_group, output_split_sizes=self.tp_splits)
            weights = gather_from_sequence_parallel_region(weights, group=self.tp_group, output_split_sizes=self.tp_splits)
        if self.order is not None:
            rows, weights = reorder_rows(rows, *self.order), reorder_rows(weights, *self.order)
        return rows, self.tokens_per_expert, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Undo `dispatch_postprocess` for the experts' output, summing the parts of expert TP."""
        rows = hidden_states
        if self.order is not None:
            rows = reorder_rows(rows, self.order[1], self.order[0])
        if self.tp_size > 1:
            # Parts are summed in the weights' precision, as megatron-core does.
            rows = reduce_scatter_to_sequence_parallel_region(rows.to(self.probs_dtype), group=self.tp_group, input_split_sizes=self.tp_splits).to(rows.dtype)
        return rows

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Sum each token's rows, in the shape of the layer's input, and add the shared experts where they ran beside."""
        if self.shared_experts is not None and _CALLS_SHARED_EXPERTS:
            self.shared_experts.linear_fc2_forward(permutated_local_input_tokens)
            self.shared_experts.post_forward_comm()
        output = from_rows(permutated_local_input_tokens, self.plan).view(self.hidden_shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        """megatron-core copies sizes to the host here, step by step; `_exchange_counts` has done it."""
        return tokens_per_expert
