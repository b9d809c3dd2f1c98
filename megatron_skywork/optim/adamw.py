"""AdamW over lists of tensors that are made once, with moments in fp32 or bf16.

AdamW (Loshchilov and Hutter, arXiv 1711.05101): m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr (m^ / (sqrt(v^) + eps) + wd w).

megatron-core uses the Adam of Transformer Engine or apex where they are installed. Without them it falls back to torch's AdamW, whose state holds a step
per parameter that its distributed optimizer cannot save in a reshardable way, and which looks every tensor up again at every step. `FusedAdamW` is torch's
own fused kernel behind the shape of state that megatron-core expects: moments per parameter, the step per parameter group.

Moments in bf16 take 4 bytes a parameter instead of 8. They are widened to fp32 in a scratch space, a bounded piece at a time, updated there by the same
kernel, and rounded to the nearest bf16. bf16 keeps 8 significant bits: a value in [2^e, 2^(e+1)) has neighbours 2^(e-7) away, and a change below half of
that is rounded away. Where gradients have become small, a moment changes by (1 - b) of itself, and to come down from everywhere it needs

    (1 - b) 2^e >= 2^(e-8),  that is  b <= 1 - 2^-8 = 0.99609375 .

Above that a moment that should decay stays where it is for ever; `config/schema.py` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_skywork import device

# Elements that are widened at a time. Both moments of a piece should stay in a cache between the launches, which are few on a GPU and cheap on a CPU:
# 32 MiB for the second-level cache of an H100, 4 MiB for a CPU's.
PIECE_NUMEL = 2**22 if device.has_gpu() else 2**19


@dataclass(frozen=True)
class Piece:
    """Tensors of one launch, in the same order; all flat. `steps` is one tensor, as often as the kernel asks for it."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


class FusedAdamW(torch.optim.Optimizer):
    """AdamW in few launches per group, on CPU and GPU, with state that megatron-core can shard. Call `allocate` before the first step.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: the usual.
        adam_w_mode: megatron-core says whether decay is decoupled; only that is built here.
        capturable: megatron-core 0.19 says whether the step is captured in a CUDA graph; the kernel does not mind.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not adam_w_mode:
            raise ValueError("FusedAdamW decays weights apart from the gradient; adam_w_mode=False is another optimizer")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._moments = torch.float32
        self._gradients: Mapping[Tensor, Tensor] = {}
        self._pieces: list[list[Piece]] | None = None
        self._scratch: Tensor | None = None

    def allocate(self, gradients: Mapping[Tensor, Tensor], moments: torch.dtype = torch.float32) -> None:
        """Make the moments now: a run that has refused all its steps so far (fp16 looking for its scale) must be able to save, too.

        Args:
            gradients: of every parameter, the tensor that holds its gradient whenever `step` is called; `param.grad` is not looked at.
            moments: what moments are kept in.
        """
        self._gradients, self._moments, self._pieces = gradients, moments, None
        for group in self.param_groups:
            group.setdefault("step", 0)
            for param in group["params"]:
                self.state[param] = {name: torch.zeros_like(param, dtype=moments) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        if self._pieces is None:
            self._pieces = [list(self._cut(group["params"])) for group in self.param_groups]
        for group, pieces in zip(self.param_groups, self._pieces, strict=True):
            group["step"] += 1
            if pieces:
                # The kernel corrects the bias by a step that lies on the device; all pieces of a group share it.
                pieces[0].steps[0].fill_(group["step"])
            for piece in pieces:
                self._update(piece, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch would turn moments into the type of their parameters; here they keep their own, whatever they come in."""
        super().load_state_dict({**state_dict, "state": {}})
        for number, param in enumerate(param for group in self.param_groups for param in group["params"]):
            if number in state_dict["state"]:
                self.state[param] = {name: value.to(self._moments) for name, value in state_dict["state"][number].items()}
        self._pieces = None

    def _cut(self, params: list[Tensor]) -> Iterator[Piece]:
        """The tensors of a group in launches: one for fp32 moments, which need no scratch space, else pieces of at most PIECE_NUMEL elements."""
        if not params:
            return
        most = PIECE_NUMEL if self._moments != torch.float32 else sum(param.numel() for param in params)
        step = torch.zeros((), device=params[0].device)
        piece, room = Piece([], [], [], [], []), most
        for param in params:
            flat = [tensor.detach().view(-1) for tensor in (param, self._gradients[param], *(self.state[param][name] for name in ("exp_avg", "exp_avg_sq")))]
            start = 0
            while start < param.numel():
                end = min(start + room, param.numel())
                for tensors, tensor in zip((piece.params, piece.grads, piece.exp_avgs, piece.exp_avg_sqs), flat, strict=True):
                    tensors.append(tensor[start:end])
                piece.steps.append(step)
                room -= end - start
                start = end
                if room == 0:
                    yield piece
                    piece, room = Piece([], [], [], [], []), most
        if piece.params:
            yield piece

    def _update(self, piece: Piece, group: dict[str, Any]) -> None:
        if self._moments == torch.float32:
            fused_adamw(piece, piece.exp_avgs, piece.exp_avg_sqs, group)
            return
        kept = [*piece.exp_avgs, *piece.exp_avg_sqs]
        wide = self._widened(kept)
        torch._foreach_copy_(wide, kept)
        fused_adamw(piece, wide[: len(piece.params)], wide[len(piece.params) :], group)
        torch._foreach_copy_(kept, wide)

    def _widened(self, tensors: list[Tensor]) -> list[Tensor]:
        """Room in fp32 for tensors of a piece, the same for every piece."""
        if self._scratch is None:
            self._scratch = torch.empty(2 * PIECE_NUMEL, device=tensors[0].device)
        sizes = [tensor.numel() for tensor in tensors]
        return list(self._scratch[: sum(sizes)].split(sizes))


def fused_adamw(piece: Piece, exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], group: Mapping[str, Any]) -> None:
    """torch's kernel for one piece, in place; moments in fp32."""
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        piece.params,
        piece.grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        piece.steps,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
