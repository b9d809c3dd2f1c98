"""AdamW, its learning-rate schedule, and a step that refuses gradients that are not finite.

AdamW (Loshchilov and Hutter, arXiv 1711.05101): m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr (m^ / (sqrt(v^) + eps) + wd w).

megatron-core uses the Adam of Transformer Engine or apex where they are installed. Without them it falls back to torch's AdamW, whose state holds a step
per parameter that its distributed optimizer cannot save in a reshardable way. `FusedAdamW` is torch's own fused kernel behind the shape of state that
megatron-core expects: moments per parameter, the step per parameter group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import megatron.core.optimizer as core_optimizer
import megatron.core.optimizer.distrib_optimizer as distributed
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_skywork.config.schema import Config, Optim
from megatron_skywork.model.transformer_config import DTYPES


def learning_rate(step: int, optim: Optim, total_steps: int) -> float:
    """Learning rate of a step, a function of nothing else, so that a resume cannot shift it.

    Args:
        step: number of the step, from 1.
        optim: the schedule.
        total_steps: length of the run.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        length = optim.decay_steps or max(1, total_steps // 10)
        start, end = total_steps - length, total_steps
    else:
        start, end = optim.warmup_steps, optim.decay_steps or total_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining


class FusedAdamW(torch.optim.Optimizer):
    """AdamW in one fused kernel per group, on CPU and GPU, with state that megatron-core can shard.

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(params, group)

    def allocate(self) -> None:
        """Make the moments now: a run that has refused all its steps so far (fp16 looking for its scale) must be able to save, too."""
        for group in self.param_groups:
            group.setdefault("step", 0)
            for param in group["params"]:
                if not self.state[param]:
                    self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        # The kernel counts steps itself, in one tensor per parameter; unbinding a single tensor makes them in one launch.
        steps = list(torch.full((len(params),), float(group["step"] - 1), device=params[0].device).unbind())
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [param.grad for param in params],  # type: ignore[misc]
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class NonFiniteGradient(Exception):
    """Raised inside a step, before anything is changed."""


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """megatron-core's mixed-precision, distributed optimizer over AdamW, for all chunks of this rank."""
    _offer_fused_adamw()
    optim, dtype = config.optim, DTYPES[config.train.precision]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # Where fp16's loss scale starts; it halves on overflow and doubles after a quiet while. Losses are summed over tokens here, so gradients are larger
        # than those of a mean by the tokens of a micro-batch; megatron-core's 2^32 would spend dozens of steps on coming down.
        initial_loss_scale=2.0**8,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap,
    )
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    _gather_parameters_once(optimizer)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            _number_mixed_groups(part)
            if isinstance(part.optimizer, FusedAdamW):
                part.optimizer.allocate()
    _refuse_nonfinite_norm(optimizer)
    return optimizer


def set_rates(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and weight decay; megatron-core marks norms and biases with `wd_mult` 0 and leaves applying it to us."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def apply_settings(optimizer: MegatronOptimizer, optim: Optim) -> None:
    """Give every parameter group Adam's settings of this start: a checkpoint brings back those it was saved with. `set_rates` sees to the others."""
    for group in optimizer.param_groups:
        group.update(betas=(optim.beta1, optim.beta2), eps=optim.eps)


def guarded_step(optimizer: MegatronOptimizer) -> tuple[bool, float]:
    """Apply one update, unless a gradient is not finite.

    The norm is reduced over all ranks before it is looked at, so every rank decides alike.

    Returns:
        whether parameters changed, and the gradient norm before clipping (NaN where fp16's loss scale was too high, or as found).
    """
    try:
        applied, norm, _ = optimizer.step()
    except NonFiniteGradient as found:
        return False, found.args[0]
    return bool(applied), float("nan") if norm is None else float(norm)


def _refuse_nonfinite_norm(optimizer: MegatronOptimizer) -> None:
    """Stop megatron-core between measuring the norm and using it: it would clip by NaN and step."""
    measure = optimizer.get_grad_norm

    def checked() -> float:
        norm = measure()
        if not math.isfinite(norm):
            raise NonFiniteGradient(float(norm))
        return norm

    optimizer.get_grad_norm = checked


def _gather_parameters_once(optimizer: MegatronOptimizer) -> None:
    """Have the last of several optimizers gather the updated parameters, for all of them.

    megatron-core has one optimizer for experts and one for the rest, and each gathers all parameters of the model after its own update: twice the bytes.
    """
    for part in getattr(optimizer, "chained_optimizers", [])[:-1]:
        # Read for this alone: overlapped gathering is what an optimizer leaves to others.
        part.ddp_config = dataclasses.replace(part.ddp_config, overlap_param_gather=True)


def _number_mixed_groups(optimizer: DistributedOptimizer) -> None:
    """Number the parameters of a group as they lie in it: fp32 ones (the routers) first, then those kept in half precision.

    megatron-core numbers them in the order of its buffers instead, which is another order as soon as a group has both; checkpoints would then take a
    parameter's moments from its neighbour.
    """
    for group, (fp32, half) in enumerate(zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)):
        for order, param in enumerate([*fp32, *half]):
            optimizer.model_param_group_index_map[param] = (group, order)


def _offer_fused_adamw() -> None:
    """Put `FusedAdamW` where megatron-core looks for apex's FusedAdam, unless it found a real one."""
    if core_optimizer.USING_PYTORCH_OPTIMIZER:
        core_optimizer.Adam = FusedAdamW
        core_optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.Adam = FusedAdamW
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
