"""Load-balancing losses: the Skywork-MoE report's (equation 4) and the Switch Transformer's, which megatron-core has.

With g the full gate (softmax over all n experts), P_j = (1/T) sum_i g_ij and f_j the share of routed assignments that go to expert j:

    report   sum_j (1/n - P_j)^2          smallest, 0, for an even mean gate; looks at probabilities only
    switch   n * sum_j f_j P_j            smallest, 1, for an even load; its gradient follows f

They differ in size: near balance the report's loss is about n times smaller, and its gradient vanishes there. A coefficient does not carry over.

Scope: what P and f are means over.

    sequence      the tokens of one sequence; the loss is the mean over sequences, weighted by their tokens
    micro_batch   the tokens of one micro-batch, over the whole TP (sequence parallel) x CP group, as in megatron-core
    global_batch  all tokens of the optimizer step

The first two are exact. A mean over the global batch is known only after its last micro-batch, when the first has long been through backward. But the
gradient of L(P) is sum_j s_j dP_j, with the slopes s_j = dL/dP_j, and dP_j is a plain sum over tokens. So every micro-batch takes the slopes at the
means of the step before (`balance_slope`; even means before the first step, where both losses have no gradient), which are two numbers per
expert and part of the checkpoint. What is lost is one step's change of a mean over millions of tokens; what is gained is a gradient that does not
depend on how the global batch is split, and no communication in forward. The value that is logged is the exact loss of the step.

Scaling. Let L be the loss of one micro-batch with T tokens over TP x CP, a function of group-wide sums; the step's loss is the mean over
micro-batches and data-parallel ranks.

* Every rank of the group computes the same L from reduced sums. `sum_over_group` passes the gradient of the sum on to each rank's own addend, so
  rank r holds dL/d(its own logits), and its router gradient is G_r with sum_r G_r = dL/dW. With global_batch nothing is reduced, and
  sum_j s_j (this rank's sum of g_j) / T gives the same G_r.
* Through TP the gradients of sequence-parallel weights are summed (finalize_model_grads), as wanted.
* Through DP x CP they are averaged, dividing by dp * cp, and megatron-core's schedule calls `MoEAuxLossAutoScaler.set_loss_scale` with
  loss_scale * cp / num_microbatches: what remains is the mean over num_microbatches * dp, as wanted. loss_scale is fp16's and is divided out later.
* With `calculate_per_token_loss` the schedule's scale is loss_scale alone, gradients are summed over DP x CP, and divided at the end by the tokens of
  the global batch, num_microbatches * dp * (T_local * tp * cp). Multiplying L by `per_token_factor` = T_local * tp * cp leaves the same mean.
  (megatron-core 0.16.1 omits tp * cp, 0.19 has it. Where labels are masked the divisor is the unmasked tokens: auxiliary and z-losses then weigh
  all tokens / unmasked tokens times as much beside the language loss, under every layout alike.)
  This is how training runs, and it makes the mean one over tokens: micro-batches of different sizes weigh as much as they hold.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# The tensor of a checkpoint with the last step's means, for losses over the global batch: `decoder.layers.I.mlp.router.batch_means`.
MEANS_NAME = "batch_means"


def report_aux_loss(probs_TE: Tensor) -> Tensor:
    """Equation 4 of the report for one batch: a scalar, 0 for an even mean gate, at most 1 - 1/E.

    Args:
        probs_TE: the full gate, rows sum to 1.
    """
    return report_from_means(probs_TE.mean(dim=0))


def switch_aux_loss(probs_TE: Tensor, routing_map_TE: Tensor, topk: int) -> Tensor:
    """The Switch loss for one batch: a scalar, 1 for an even load. The gradient flows through the probabilities alone.

    Args:
        probs_TE: the full gate, rows sum to 1.
        routing_map_TE: true where a token goes to an expert, before anything is dropped.
        topk: experts per token.
    """
    return switch_from_means(probs_TE.mean(dim=0), routing_map_TE.to(probs_TE.dtype).sum(dim=0) / (topk * probs_TE.shape[0]))


def report_from_means(mean_probs_E: Tensor) -> Tensor:
    """`report_aux_loss` from the mean gate; leading axes are kept."""
    return (1.0 / mean_probs_E.shape[-1] - mean_probs_E).square().sum(dim=-1)


def switch_from_means(mean_probs_E: Tensor, load_E: Tensor) -> Tensor:
    """`switch_aux_loss` from the mean gate and each expert's share of the routed assignments (sums to 1); leading axes are kept."""
    return mean_probs_E.shape[-1] * (load_E * mean_probs_E).sum(dim=-1)


def balance_loss(kind: str, mean_probs_E: Tensor, load_E: Tensor) -> Tensor:
    """The loss `kind`, `report` or `switch`, from means; leading axes are kept."""
    return report_from_means(mean_probs_E) if kind == "report" else switch_from_means(mean_probs_E, load_E)


def balance_slope(kind: str, mean_probs_E: Tensor, load_E: Tensor) -> Tensor:
    """dL/dP_j of `balance_loss`: -2 (1/n - P_j) for `report`, n f_j for `switch`."""
    experts = mean_probs_E.shape[-1]
    return 2.0 * (mean_probs_E - 1.0 / experts) if kind == "report" else experts * load_E


def sum_over_group(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of `group`; the gradient goes unchanged to every rank's own addend, and the ranks' gradients add up later."""
    if group is None or group.size() == 1:
        return local
    return _SumOverGroup.apply(local, group)


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        total = local.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
