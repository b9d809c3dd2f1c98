"""Weight gradients added where they are kept: G += dY^T X in one matrix product.

megatron-core keeps gradients in fp32 and adds those of every micro-batch to them. A product in half precision is written and read again, and the fp32 buffer
read and written: 12 bytes a parameter and micro-batch. cuBLAS adds to an fp32 matrix while it multiplies bf16 ones: 8 bytes, and no kernel more.
megatron-core has that with apex's extension (`gradient_accumulation_fusion`); torch offers it too, `addmm` with `out_dtype`, from 2.8 on. A CPU's product
adds to matrices of the operands' own type, so it does this in fp32.

Shapes: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor

from megatron_skywork import device

_HAS_WIDE_SUM = "out_dtype" in str(torch._C._jit_get_schemas_for_operator("aten::addmm"))


def can_accumulate(dtype: torch.dtype) -> bool:
    """Whether a product of matrices in `dtype` can be added to an fp32 one here."""
    return dtype == torch.float32 or (device.has_gpu() and _HAS_WIDE_SUM)


def is_accumulated(weight: Tensor) -> bool:
    """Whether the gradient of `weight` may be added to its buffer by whoever computes it.

    Not where there is no buffer (outside training), and not for an embedding that is the output layer too, whose two gradients autograd sums.
    """
    return hasattr(weight, "main_grad") and weight.main_grad.dtype == torch.float32 and not getattr(weight, "zero_out_wgrad", False)


def accumulate(buffer_OI: Tensor, grad_TO: Tensor, input_TI: Tensor) -> None:
    """buffer += grad^T input."""
    if buffer_OI.dtype == grad_TO.dtype:
        buffer_OI.addmm_(grad_TO.t(), input_TI)
    else:
        torch.addmm(buffer_OI, grad_TO.t(), input_TI, out_dtype=buffer_OI.dtype, out=buffer_OI)  # type: ignore[call-overload]


def accumulated(weight: Tensor) -> Tensor:
    """What a backward returns for a weight whose gradient is in its buffer: autograd's hooks want some tensor, and nobody reads it."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def accumulate_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have every module that knows `gradient_accumulation_fusion` add its weights' gradients to their buffers, if a product in `dtype` can be added here.

    megatron-core's linear layers look for apex's extension, and are given `accumulate` in its place where it is missing. They find the buffer at the weight
    that autograd gives back to them, which is another object where hooks take part in saving (`saves_through_hooks`): such layers go on as before.
    """
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=_as_apex_does)
    hooked = {part for layer in model.modules() if getattr(layer, "saves_through_hooks", False) for part in layer.modules()}
    for module in model.modules():
        is_linear = isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear))
        if hasattr(module, "gradient_accumulation_fusion") and not (is_linear and module in hooked):
            module.gradient_accumulation_fusion = can_accumulate(dtype)  # type: ignore[assignment]


def _as_apex_does(input_TI: Tensor, grad_TO: Tensor, buffer_OI: Tensor) -> None:
    """apex's order of arguments."""
    accumulate(buffer_OI, grad_TO.flatten(0, -2), input_TI.flatten(0, -2))
