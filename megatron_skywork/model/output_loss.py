"""Cross-entropy straight from the hidden states: the output layer and the loss together, one block of the vocabulary at a time.

megatron-core multiplies hidden states with the whole output weight, casts the result to fp32 and keeps its softmax until backward: 4 bytes for every token
and vocabulary entry, more than any layer. Here only a block of the vocabulary is ever in fp32. With logits z_v = h . w_v of a token, label y and gradient g
that reaches its loss,

    loss = log sum_v exp(z_v) - z_y            d loss / d z_v = g (softmax(z)_v - [v = y])

A block says its maximum m, sum_v exp(z_v - m) and the label's logit, and that is all the others must know of it (the running softmax of Milakov and
Gimelshein, arXiv 1805.02867). Blocks of one rank and shards of several are merged by the same function, so tensor parallelism costs one all-gather of three
numbers per token. Backward walks over the same blocks. It takes blocks of the vocabulary and not of tokens, because then every row of the weight's gradient
is one matrix product over all tokens: nothing is summed up in 16 bits, and what has to be kept in fp32 is the hidden states' gradient, not the weight's.

In backward a block's logits are either those of forward, kept in the 16 bits that the matrix product gave, or computed again, which costs one more product
beside three. fp32 logits are never kept.

Shapes: T tokens, H hidden, V vocabulary of this rank (in a block: of the block), N blocks or ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_skywork import device
from megatron_skywork.weight_gradients import accumulate, accumulated, is_accumulated

# fp32 bytes of one block. A GPU wants few and large kernels. On a CPU glibc takes blocks from 32 MiB on as fresh pages from the kernel, which cost more than
# the arithmetic.
BLOCK_BYTES = {"gpu": 256 * 2**20, "cpu": 8 * 2**20}
_COLUMN_MULTIPLE = 64  # keeps rows of 16-bit blocks aligned for matrix units


def output_losses(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    first_entry: int = 0,
    tp_group: ProcessGroup | None = None,
    keep_logits: bool = True,
    accumulates: bool = False,
    block_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of every token in fp32, [T].

    The gradient of `hidden_TH` is this rank's share: the caller sums it over `tp_group`.

    Args:
        hidden_TH: all tokens, the same on every rank of the group.
        weight_VH: this rank's rows of the output weight, in the hidden states' dtype.
        labels_T: in the whole vocabulary. One that no rank has gives a finite loss that means nothing, to be masked.
        first_entry: vocabulary entry of the weight's first row.
        tp_group: ranks that share the vocabulary; None is this rank alone.
        keep_logits: keep 16-bit logits for backward rather than computing them again.
        accumulates: add the weight's gradient to its buffer (see weight_gradients.py).
        block_bytes: bound of a block's fp32 logits; unset means BLOCK_BYTES of this device.
    """
    if block_bytes is None:
        block_bytes = BLOCK_BYTES["gpu" if device.has_gpu() else "cpu"]
    keep = keep_logits and hidden_TH.dtype != torch.float32 and torch.is_grad_enabled()
    columns = block_columns(len(hidden_TH), block_bytes)
    return _OutputLosses.apply(hidden_TH, weight_VH, labels_T - first_entry, tp_group, keep, columns, accumulates and is_accumulated(weight_VH))


def block_columns(num_tokens: int, block_bytes: int) -> int:
    """Vocabulary entries of a block whose fp32 logits fit into `block_bytes`."""
    return max(1, block_bytes // (4 * num_tokens * _COLUMN_MULTIPLE)) * _COLUMN_MULTIPLE


@device.fused
def block_statistics(logits_TV: Tensor, column_T: Tensor) -> Tensor:
    """A block's maximum, sum of exponentials below it, and label's logit (0 where the label is in another block), [3, T]."""
    logits_TV = logits_TV.float()
    is_here_T, index_T1 = _place(column_T, logits_TV.shape[1])
    max_T = logits_TV.amax(-1)
    sum_T = (logits_TV - max_T[:, None]).exp_().sum(-1)
    return torch.stack([max_T, sum_T, torch.where(is_here_T, logits_TV.gather(1, index_T1)[:, 0], 0.0)])


@device.fused
def merge_statistics(statistics_N3T: Tensor) -> Tensor:
    """Statistics of several blocks as those of their union, [3, T]."""
    max_NT, sum_NT, target_NT = statistics_N3T.unbind(1)
    max_T = max_NT.amax(0)
    return torch.stack([max_T, (sum_NT * (max_NT - max_T).exp()).sum(0), target_NT.sum(0)])


@device.fused
def losses_from(statistics_3T: Tensor) -> Tensor:
    """log sum_v exp(z_v) - z_y, [T]. The maximum is taken off the label's logit first: both are large where logits are, the loss is not."""
    max_T, sum_T, target_T = statistics_3T
    return sum_T.log() - (target_T - max_T)


@device.fused
def block_gradient(logits_TV: Tensor, column_T: Tensor, statistics_3T: Tensor, loss_T: Tensor, gradient_T: Tensor) -> Tensor:
    """A block's gradient in the dtype of its logits, [T, V].

    Rounding comes last. softmax(z)_y - 1 is exp(-loss) - 1, which stays exact where the label's probability is close to 1.
    """
    max_T, sum_T, _ = statistics_3T
    gradient_TV = (logits_TV.float() - max_T[:, None]).exp_().mul_((gradient_T / sum_T)[:, None]).to(logits_TV.dtype)
    is_here_T, index_T1 = _place(column_T, logits_TV.shape[1])
    at_label_T = (torch.expm1(-loss_T) * gradient_T).to(logits_TV.dtype)
    return gradient_TV.scatter_(1, index_T1, torch.where(is_here_T[:, None], at_label_T[:, None], gradient_TV.gather(1, index_T1)))


def _place(column_T: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether the label's column is one of the block's, and a column of the block in any case, [T, 1]."""
    return (column_T >= 0) & (column_T < num_columns), column_T.clamp(0, num_columns - 1)[:, None]


class _OutputLosses(torch.autograd.Function):
    """The walk over blocks, forward and backward; see `output_losses`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, column_T: Tensor, tp_group: ProcessGroup | None, keep: bool, columns: int, accumulates: bool
    ) -> Tensor:
        statistics, kept = [], []
        for first, block_VH in _blocks(weight_VH, columns):
            logits_TV = hidden_TH @ block_VH.t()
            statistics.append(block_statistics(logits_TV, column_T - first))
            if keep:
                kept.append(logits_TV)
        statistics_3T = _over_ranks(merge_statistics(torch.stack(statistics)), tp_group)
        loss_T = losses_from(statistics_3T)
        ctx.columns, ctx.buffered = columns, weight_VH if accumulates else None  # what autograd gives back may be another object, without the buffer
        ctx.save_for_backward(hidden_TH, weight_VH, column_T, statistics_3T, loss_T, *kept)
        return loss_T

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, column_T, statistics_3T, loss_T, *kept = ctx.saved_tensors
        hidden_gradient_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        weight_gradient_VH = torch.empty_like(weight_VH) if ctx.buffered is None else accumulated(ctx.buffered)
        for index, (first, block_VH) in enumerate(_blocks(weight_VH, ctx.columns)):
            logits_TV = kept[index] if kept else hidden_TH @ block_VH.t()
            gradient_TV = block_gradient(logits_TV, column_T - first, statistics_3T, loss_T, gradient_T)
            rows = slice(first, first + len(block_VH))
            if ctx.buffered is not None:
                accumulate(ctx.buffered.main_grad[rows], gradient_TV, hidden_TH)
            else:
                torch.mm(gradient_TV.t(), hidden_TH, out=weight_gradient_VH[rows])
            hidden_gradient_TH += gradient_TV @ block_VH
        return hidden_gradient_TH.to(hidden_TH.dtype), weight_gradient_VH, None, None, None, None, None


def _blocks(weight_VH: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    """First row and rows of each block of the weight."""
    return [(first, weight_VH[first : first + columns]) for first in range(0, len(weight_VH), columns)]


def _over_ranks(statistics_3T: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is None or tp_group.size() == 1:
        return statistics_3T
    gathered_N3T = statistics_3T.new_empty(tp_group.size(), *statistics_3T.shape)
    torch.distributed.all_gather_into_tensor(gathered_N3T.flatten(0, 1), statistics_3T, group=tp_group)
    return merge_statistics(gathered_N3T)
