"""One optimizer step: micro-batches through the pipeline, gradients reduced, one update unless the numbers forbid it, router coefficients moved.

The loss of a step is the mean over all tokens of its global batch that count: sum(mask * cross entropy) / sum(mask). Every rank sums over its own tokens,
and megatron-core divides gradients once, by the tokens of the global batch, so its split into micro-batches and ranks does not show.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_skywork import device, parallel
from megatron_skywork.config.schema import Config
from megatron_skywork.metrics.throughput import PhaseTimer
from megatron_skywork.model.documents import Documents
from megatron_skywork.moe.router_state import (
    RouterSummary,
    expert_biases,
    find_routers,
    observe,
    restore_expert_biases,
    schedule_coefficients,
    update_coefficients,
)
from megatron_skywork.optim.build import learning_rate, set_rates
from megatron_skywork.optim.step import OptimizerStep
from megatron_skywork.train.loss_spikes import LossWindow, Spike
from megatron_skywork.train.pipeline_clock import PipelineClock
from megatron_skywork.train.replicas import ReplicaCheck

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the numbers of all ranks say about a step, before its update; the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch that count."""
    nonfinite: tuple[str, ...]
    """Which of the two are not finite: `loss`, `gradient norm`."""
    spike: Spike | None
    num_differing: int
    """Tensors that some rank holds otherwise than another one, summed over ranks; 0 in a step that does not compare."""


@dataclass(frozen=True)
class StepResult:
    """What a step has to say; `loss_sum` and `num_tokens` are this rank's own, and lie on the last pipeline stage only."""

    verdict: Verdict
    loss_sum: Tensor | None
    num_tokens: Tensor | None
    grad_norm: float
    learning_rate: float
    applied: bool
    routers: RouterSummary


class TrainStep:
    """Runs optimizer steps of one model.

    Args:
        config: the run.
        chunks: this rank's wrapped model chunks.
        optimizer: over them.
        num_micro_batches: of one step, on every data-parallel rank.
        timer: told which phase is running.

    Attributes:
        losses: those of the last steps, which spikes stand out from.
        replicas: compares copies of parameters.
        clock: of the pipeline, where there is one.
    """

    def __init__(self, config: Config, chunks: list[Any], optimizer: Any, num_micro_batches: int, timer: PhaseTimer):
        self._config, self._chunks, self._optimizer, self._timer = config, chunks, optimizer, timer
        self._update = OptimizerStep(optimizer, config.optim.clip_grad)
        self._num_micro_batches = num_micro_batches
        self._routers = find_routers(chunks)
        observe(self._routers, health=config.metrics.router)
        self.losses, self.replicas = LossWindow(config.spikes), ReplicaCheck(chunks)
        connect_schedule(config, chunks, optimizer)
        self.clock: PipelineClock | None = None
        if config.parallel.pp > 1:
            self.clock = chunks[0].config.timers = PipelineClock(parallel.coordinates().pp, config.parallel.pp)

    def __call__(self, step: int, loader: Iterator[Batch]) -> StepResult:
        """Do step number `step` with the next micro-batches."""
        with self._timer.phase("data"):
            batches = [next(loader) for _ in range(self._num_micro_batches)]
        with self._timer.phase("forward_backward"):
            for chunk in self._chunks:
                chunk.zero_grad_buffer()
            schedule_coefficients(self._routers, step)
            biases = expert_biases(self._routers)
            if self.clock is not None:
                self.clock.begin()
            loss_sum, num_tokens = run_schedule(self._config, self._chunks, batches, forward_only=False)
        with self._timer.phase("optimizer"):
            rate = learning_rate(step, self._config.optim, self._config.train.steps)
            set_rates(self._optimizer, rate, self._config.optim.weight_decay)
            verdicts: list[Verdict] = []

            def accepts(norm: float, sums: list[float]) -> bool:
                verdicts.append(self._judge(norm, *sums))
                return self._may_apply(verdicts[0])

            applied, grad_norm = self._update(self._numbers(step, loss_sum, num_tokens), accepts)
            if not applied:
                restore_expert_biases(self._routers, biases)
            routers = update_coefficients(self._routers, parallel.token_group(), skipped=not applied)
        return StepResult(verdicts[0], loss_sum, num_tokens, grad_norm, rate, applied, routers)

    def _numbers(self, step: int, loss_sum: Tensor | None, num_tokens: Tensor | None) -> Tensor:
        """What this rank brings to the verdict, on the device. Tensor-parallel ranks all bring the same loss; the mean does not mind."""
        nothing = torch.zeros((), dtype=torch.float64, device=device.current())
        every = self._config.train.check_replicas
        # The parameters that this step was computed with: its update writes all copies anew.
        differing = self.replicas.num_differing() if every and step % every == 0 else nothing
        return torch.stack([nothing if loss_sum is None else loss_sum.double(), nothing if num_tokens is None else num_tokens.double(), differing])

    def _judge(self, norm: float, loss_sum: float, num_tokens: float, num_differing: float) -> Verdict:
        loss = loss_sum / max(num_tokens, 1.0)
        nonfinite = tuple(name for name, value in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(value))
        spike = None if nonfinite or num_differing else self.losses.observe(loss)
        return Verdict(loss, nonfinite, spike, int(num_differing))

    def _may_apply(self, verdict: Verdict) -> bool:
        is_left_out = verdict.spike is not None and self._config.spikes.policy == "skip"
        return not verdict.nonfinite and not verdict.num_differing and not is_left_out


def connect_schedule(config: Config, chunks: list[Any], optimizer: Any) -> None:
    """Tell megatron-core's schedules how to reduce gradients and scale losses."""
    transformer = chunks[0].config
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    transformer.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    if config.parallel.overlap and len(chunks) > 1:
        transformer.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
        transformer.param_sync_func = [chunk.start_param_sync for chunk in chunks]


def run_schedule(config: Config, chunks: list[Any], batches: list[Batch], *, forward_only: bool) -> tuple[Tensor | None, Tensor | None]:
    """Send micro-batches through the pipeline.

    Returns:
        sum of the losses of all counted tokens of this data-parallel rank, and their number; None on stages that see no loss.
    """
    # Every chunk of this rank reads the same micro-batches, each at its own time.
    iterators = [iter(batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        forward_only=forward_only,
    )
    if not outputs:
        return None, None
    return torch.stack([output["loss_sum"] for output in outputs]).sum(), torch.stack([output["num_tokens"] for output in outputs]).sum()


def forward_step(batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
    """One micro-batch through one chunk, in the form megatron-core's schedules call."""
    held = next(batches)  # every chunk of this rank reads the same one, so it stays as it is
    batch = {name: tensor.to(device.current(), non_blocking=True) for name, tensor in held.items() if name != "document_lengths"}
    documents = Documents(held["document_lengths"], device.current()) if "document_lengths" in held else None
    cp_rank, cp_size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    if cp_size > 1:  # validate.py refuses documents here
        batch = {name: parallel.sequence_part(tensor, cp_rank, cp_size) for name, tensor in batch.items()}
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=documents)
    return output, functools.partial(masked_loss, batch["loss_mask"])


def masked_loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses that count, and how many they are."""
    loss_sum = (losses_BS.float() * loss_mask_BS).sum()
    num_tokens = loss_mask_BS.sum().to(torch.int)
    return loss_sum, num_tokens, {"loss_sum": loss_sum.detach(), "num_tokens": num_tokens}
