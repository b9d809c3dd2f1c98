"""megatron-core's distributed optimizer over our AdamW (`adamw.py`), its settings, and the learning-rate schedule.

What a step does stands in `step.py`.
"""

from __future__ import annotations

import math
from typing import Any

import megatron.core.optimizer as core_optimizer
import megatron.core.optimizer.distrib_optimizer as distributed
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_skywork.config.schema import Config, Optim
from megatron_skywork.model.transformer_config import DTYPES
from megatron_skywork.optim.adamw import FusedAdamW
from megatron_skywork.optim.step import gradients_of


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
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            _number_mixed_groups(part)
            part.optimizer.allocate(gradients_of(part), DTYPES[optim.moments])
    return optimizer


def set_rates(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and weight decay; megatron-core marks norms and biases with `wd_mult` 0 and leaves applying it to us."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def take_rates(state: Any, optimizer: MegatronOptimizer) -> None:
    """Give the parameter groups of a checkpoint the bounds of this start's learning rate: megatron-core 0.19 tells groups apart by them, among other things,
    and finds none when they have changed. Nothing else reads them, see `set_rates`.

    Args:
        state: the optimizer's part of a checkpoint, as it was loaded; changed in place.
    """
    bounds = {name: group[name] for group in optimizer.param_groups for name in ("max_lr", "min_lr") if name in group}
    for part in state.values() if isinstance(state, dict) else state if isinstance(state, list) else []:
        take_rates(part, optimizer)
    for group in state.get("param_groups", []) if isinstance(state, dict) else []:
        group.update({name: value for name, value in bounds.items() if name in group})


def apply_settings(optimizer: MegatronOptimizer, optim: Optim) -> None:
    """Give every parameter group Adam's settings of this start: a checkpoint brings back those it was saved with. `set_rates` sees to the others."""
    for group in optimizer.param_groups:
        group.update(betas=(optim.beta1, optim.beta2), eps=optim.eps)


def _number_mixed_groups(optimizer: DistributedOptimizer) -> None:
    """Number the parameters of a group as they lie in it: fp32 ones (the routers) first, then those kept in half precision.

    megatron-core numbers them in the order of its buffers instead, which is another order as soon as a group has both; checkpoints would then take a
    parameter's moments from its neighbour.
    """
    for group, (fp32, half) in enumerate(zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)):
        for order, param in enumerate([*fp32, *half]):
            optimizer.model_param_group_index_map[param] = (group, order)


def _offer_fused_adamw() -> None:
    """Put `FusedAdamW` where megatron-core looks for Transformer Engine's or apex's FusedAdam, so that a run is the same with and without them."""
    core_optimizer.Adam = distributed.Adam = FusedAdamW
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
