"""All experts of a rank as two grouped matrix products: y = W2 swiglu(W1 x, p), with another W1, W2 for every expert's run of rows.

megatron-core without Transformer Engine runs experts one by one, which needs the number of rows of each on the host and leaves a GPU idle between small
products. A grouped product takes all runs in one launch and reads where they end on the device. The six products of forward and backward read the weights
as they are stored, [E, out, in], and write contiguous results: nothing is transposed, padded or copied.

torch's kernel for that is for bf16 on Hopper and Blackwell, and for CPUs. Elsewhere (A100, A800, fp16 and fp32 on a GPU, widths of odd bytes) it would go over
the experts one by one itself and wait for the device in each of the six products; there the runs are brought to the host once, in forward.

    h = x W1^T       a = swiglu(h) p       y = a W2^T
    da = dy W2       dW2 = dy^T a          dh from swiglu         dx = dh W1        dW1 = dh^T x

Kept for backward: x, h and p. The activation `a` is made again by swiglu's backward. The number of rows of a run is free: rows are never the inner axis in
memory, which alone has to be a multiple of 16 bytes.

Shapes: R rows sorted by expert, E experts of this rank, H hidden, F inner width. Rows behind the last run are not computed, in either direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_skywork import device
from megatron_skywork.moe.swiglu import weighted_swiglu, weighted_swiglu_backward
from megatron_skywork.weight_gradients import accumulate, accumulated, is_accumulated


def grouped_mlp(rows_RH: Tensor, probs_R: Tensor, weight1_E2FH: Tensor, weight2_EHF: Tensor, ends_E: Tensor, accumulates: bool = False) -> Tensor:
    """Output of every row's expert, weighted, [R, H].

    Args:
        rows_RH: rows sorted by expert.
        probs_R: their routing weights, fp32.
        weight1_E2FH, weight2_EHF: gate and up projection (the gate's rows first), and down projection.
        ends_E: int32, index after the last row of each expert, on the device of the rows.
        accumulates: add the gradients of the weights to their buffers, if they have some.
    """
    accumulates = accumulates and is_accumulated(weight1_E2FH) and is_accumulated(weight2_EHF)
    return _GroupedMLP.apply(rows_RH, probs_R, weight1_E2FH, weight2_EHF, ends_E, accumulates)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RH: Tensor, probs_R: Tensor, weight1_E2FH: Tensor, weight2_EHF: Tensor, ends_E: Tensor, accumulates: bool
    ) -> Tensor:
        runs = ends_E if _kernel_fits(rows_RH, weight2_EHF) else _runs(ends_E)
        hidden_R2F = rows_by_weights(rows_RH, weight1_E2FH.mT, runs)
        output_RH = rows_by_weights(weighted_swiglu(hidden_R2F, probs_R), weight2_EHF.mT, runs)
        ctx.save_for_backward(rows_RH, hidden_R2F, probs_R, weight1_E2FH, weight2_EHF, ends_E)
        ctx.runs = None if isinstance(runs, Tensor) else runs
        # The parameters themselves: what autograd gives back may be another object, without the buffers.
        ctx.buffered = (weight1_E2FH, weight2_EHF) if accumulates else None
        ctx.ends_on_host = LateRead(ends_E) if accumulates and ctx.runs is None else None
        return output_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor | None, ...]:
        rows_RH, hidden_R2F, probs_R, weight1_E2FH, weight2_EHF, ends_E = ctx.saved_tensors
        runs = ends_E if ctx.runs is None else ctx.runs
        grad_RH = grad_RH.contiguous()
        grad_activation_RF = rows_by_weights(grad_RH, weight2_EHF, runs)
        grad_hidden_R2F, grad_probs_R, activation_RF = weighted_swiglu_backward(hidden_R2F, probs_R, grad_activation_RF)
        grad_rows = rows_by_weights(grad_hidden_R2F, weight1_E2FH, runs) if ctx.needs_input_grad[0] else None
        grad_probs = grad_probs_R if ctx.needs_input_grad[1] else None
        if ctx.buffered is not None:
            slices = ctx.runs or _slices(ctx.ends_on_host.read())
            added1 = _accumulate_runs(ctx.buffered[0], grad_hidden_R2F, rows_RH, slices)
            added2 = _accumulate_runs(ctx.buffered[1], grad_RH, activation_RF, slices)
            return grad_rows, grad_probs, added1, added2, None, None
        grad_weight1 = rows_by_rows(grad_hidden_R2F, rows_RH, runs) if ctx.needs_input_grad[2] else None
        grad_weight2 = rows_by_rows(grad_RH, activation_RF, runs) if ctx.needs_input_grad[3] else None
        return grad_rows, grad_probs, grad_weight1, grad_weight2, None, None


class LateRead:
    """A small tensor on its way to the host, read when the device has long got past it: the host then waits for nothing that it could have queued meanwhile.

    Between a layer's forward and its backward lie the rest of the forward pass and the first part of the backward; when the host comes to read, the device
    still has most of that before it.
    """

    def __init__(self, tensor: Tensor):
        self._copy = tensor.to("cpu", non_blocking=True)
        self._arrived = device.moment()

    def read(self) -> list[int]:
        device.wait_for(self._arrived)
        return self._copy.tolist()


def _accumulate_runs(weight_EOI: Tensor, left_RO: Tensor, right_RI: Tensor, runs: list[slice]) -> Tensor:
    """left^T right of each run, added to its expert's part of the buffer: a product for each expert, since torch's grouped one cannot add."""
    for expert, run in enumerate(runs):
        if run.stop > run.start:
            accumulate(weight_EOI.main_grad[expert], left_RO[run], right_RI[run])  # type: ignore[attr-defined]
    return accumulated(weight_EOI)


# torch offers the grouped product from 2.10 on.
_grouped_mm: Callable[..., Tensor] | None = getattr(torch.nn.functional, "grouped_mm", None)
Runs = Tensor | list[slice]
"""Where the rows of each expert lie: their ends on the device for the grouped product, or slices on the host for one product after the other."""


def rows_by_weights(rows_RI: Tensor, weight_EIO: Tensor, runs: Runs) -> Tensor:
    """Each run of rows times its own matrix: [R, O]. Rows behind the last run are left as they come."""
    if isinstance(runs, Tensor):
        assert _grouped_mm is not None
        return _grouped_mm(rows_RI, weight_EIO, offs=runs)
    output_RO = rows_RI.new_empty(rows_RI.shape[0], weight_EIO.shape[2])
    for expert, run in enumerate(runs):
        torch.mm(rows_RI[run], weight_EIO[expert], out=output_RO[run])
    return output_RO


def rows_by_rows(left_RO: Tensor, right_RI: Tensor, runs: Runs) -> Tensor:
    """left^T right over each run: a weight's gradient, [E, O, I], zero for an expert without rows."""
    if isinstance(runs, Tensor):
        assert _grouped_mm is not None
        product_EOI = _grouped_mm(left_RO.t(), right_RI, offs=runs)
        if device.leaves_empty_groups_unwritten():
            is_empty_E = runs.diff(prepend=runs.new_zeros(1)) == 0
            product_EOI.masked_fill_(is_empty_E[:, None, None], 0)
        return product_EOI
    output_EOI = left_RO.new_empty(len(runs), left_RO.shape[1], right_RI.shape[1])
    for expert, run in enumerate(runs):
        torch.mm(left_RO[run].t(), right_RI[run], out=output_EOI[expert])
    return output_EOI


def _kernel_fits(rows_RH: Tensor, weight2_EHF: Tensor) -> bool:
    """Whether torch's grouped kernel can do all six products without going over the experts by itself. It is given no empty operands."""
    aligned = all(width * rows_RH.element_size() % 16 == 0 for width in weight2_EHF.shape[1:])
    return _grouped_mm is not None and aligned and rows_RH.shape[0] > 0 and device.has_grouped_product(rows_RH.dtype)


def _runs(ends_E: Tensor) -> list[slice]:
    return _slices(ends_E.tolist())


def _slices(ends: list[int]) -> list[slice]:
    return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
