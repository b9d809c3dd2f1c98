"""RMSNorm computed again in backward (`layernorm` in parallel.recompute_modules) for the `torch` backend.

Of each norm a layer keeps the input, the output for the linear maps behind it, and what the norm's own backward wants: all of it one cheap pass over the input
away. megatron-core drops the output by emptying its storage and refilling it in backward, by a class that needs Transformer Engine (it asks for fp8's state
even without fp8) and, since 0.19, a C++ extension compiled at run time. Here autograd itself is told to save less: whatever a consumer saves of the output
becomes a note of where to find it, and the first who needs it in backward runs the norm again, with the graph that the norm's own backward then goes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from megatron_skywork.model.norm import RMSNorm


class NormRecomputingLayer(TransformerLayer):
    """megatron-core's layer with norms that are `RecomputedRMSNorm`; of them it keeps the inputs only."""

    saves_through_hooks = True  # see weight_gradients.py

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recompute_input_layernorm = self.recompute_pre_mlp_layernorm = False

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        with self.input_layernorm.output_recomputed():
            return super()._forward_attention(*args, **kwargs)

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Any:
        with self.pre_mlp_layernorm.output_recomputed():
            return super()._forward_mlp(*args, **kwargs)


class RecomputedRMSNorm(RMSNorm):
    """RMSNorm that keeps its input and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._call: _Call | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(hidden)
        call = self._call = _Call(super().forward, hidden)
        output: Tensor = _ComputedAgain.apply(call, hidden, self.weight)
        call.storage = output.untyped_storage()
        return output

    @contextlib.contextmanager
    def output_recomputed(self) -> Iterator[None]:
        """Around one forward and everything that reads its output: what these save of the output for backward is computed again there."""

        def pack(tensor: Tensor) -> Any:
            # Detached: a node that saves its own output would hold itself, in a cycle that Python's collector cannot see.
            return self._call.note(tensor) if self._call is not None and self._call.holds(tensor) else tensor.detach()

        def unpack(saved: Any) -> Tensor:
            return saved.read() if isinstance(saved, _Note) else saved

        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            if self._call is not None:
                self._call.storage = None  # another tensor may get the address
            self._call = None


class _Call:
    """One forward of a norm: what it takes to run it again.

    Attributes:
        storage: of the output, as long as others may save it.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], hidden: Tensor):
        self.storage: torch.UntypedStorage | None = None
        self._compute, self._hidden = compute, hidden.detach()
        self._again: tuple[Tensor, Tensor] | None = None

    def first(self) -> Tensor:
        """The output, in forward, with no graph behind it."""
        with torch.no_grad():
            return self._compute(self._hidden)

    def again(self) -> tuple[Tensor, Tensor]:
        """Input and output in backward, with the graph between them; run once for all readers."""
        if self._again is None:
            hidden = self._hidden.detach().requires_grad_()
            with torch.enable_grad():
                self._again = hidden, self._compute(hidden)
        return self._again

    def forget(self) -> None:
        """The last reader has been served."""
        self._again = None

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the output, or a view of it."""
        return self.storage is not None and tensor.dtype == self._hidden.dtype and tensor.untyped_storage().data_ptr() == self.storage.data_ptr()

    def note(self, tensor: Tensor) -> _Note:
        """What stands for a tensor that holds the output."""
        return _Note(self, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


@dataclass(frozen=True)
class _Note:
    call: _Call
    size: torch.Size
    stride: Sequence[int]
    offset: int

    def read(self) -> Tensor:
        _, output = self.call.again()
        return output.detach().as_strided(self.size, self.stride, self.offset)


class _ComputedAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.call, ctx.weight = call, weight
        return call.first()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, Tensor]:
        hidden, output = ctx.call.again()
        grad_hidden, grad_weight = torch.autograd.grad(output, (hidden, ctx.weight), grad_output)
        ctx.call.forget()
        return None, grad_hidden, grad_weight
