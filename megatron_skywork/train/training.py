"""A run in memory: model, optimizer, data, metrics and position, built in one place, with the few verbs the loop speaks in."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator

from megatron_skywork import checkpoint, device, parallel
from megatron_skywork.checkpoint import TrainState
from megatron_skywork.config.schema import Config
from megatron_skywork.data.loader import build_train_loader, build_valid_loaders
from megatron_skywork.errors import CheckpointError, TrainingError
from megatron_skywork.metrics.record import MetricBuffer
from megatron_skywork.metrics.throughput import PhaseTimer, formulas, peak_tflops, throughput
from megatron_skywork.metrics.writers import open_writers
from megatron_skywork.model.build import build_chunks, parameters_gathered, wrap_for_training
from megatron_skywork.moe.router_state import gather_router_metrics
from megatron_skywork.optim.build import build_optimizer
from megatron_skywork.plan.flops import formula_text, train_flops_per_token
from megatron_skywork.plan.parameters import count_parameters
from megatron_skywork.train.evaluate import evaluate
from megatron_skywork.train.phases import EVALUATION, SAVE, Phases
from megatron_skywork.train.step import Batch, StepResult, TrainStep


class Training:
    """Everything a running job holds. Building it loads the newest checkpoint, or the initial weights.

    Args:
        config: checked settings.
        place: this rank, with process groups built.
        phases: told what this rank is doing.

    Raises:
        CheckpointError, DataError, ConfigError: something does not fit; nothing has been trained.
    """

    def __init__(self, config: Config, place: parallel.Coordinates, phases: Phases | None = None):
        self.config, self.place, self.phases = config, place, phases or Phases()
        self.run_dir = Path(config.run_dir)
        self.timer = PhaseTimer(self.phases.part)
        batch = config.train.global_batch_size
        micro_batches = batch // (config.train.micro_batch_size * place.dp_size)
        # megatron-core's schedules read the number of micro-batches of a step from this global.
        destroy_num_microbatches_calculator()
        init_num_microbatches_calculator(place.rank, None, batch, config.train.micro_batch_size, place.dp_size)
        self.phases.part("model")
        self.chunks = wrap_for_training(config, build_chunks(config))
        self.optimizer = build_optimizer(config, self.chunks)
        self.phases.part("checkpoint")
        self.state, self.resumed_from = self._restore()
        self.step = TrainStep(config, self.chunks, self.optimizer, micro_batches, self.timer)
        self.phases.part("data")
        self.train_loader: Iterator[Batch] = build_train_loader(
            config, dp_rank=place.dp, dp_size=place.dp_size, consumed_samples=self.state.samples, pin_memory=device.has_gpu()
        )
        self.valid_loaders = build_valid_loaders(config, dp_rank=place.dp, dp_size=place.dp_size, pin_memory=device.has_gpu())
        self.buffer = MetricBuffer(device.current())
        self.refused_in_a_row = 0
        self._unrecorded_steps = 0
        self.writers = open_writers(config, self.run_dir, resume_step=self.state.step if self.resumed_from else None)
        self._write_header()

    # ------------------------------------------------------------------------------------------------------------------------ start

    def _restore(self) -> tuple[TrainState, Path | None]:
        # One rank looks: another node's view of a shared folder may be a moment old, and all must load the same step.
        choice: list[Any] = [checkpoint.newest(self.run_dir) if self.place.is_first_rank else None]
        torch.distributed.broadcast_object_list(choice, src=0)
        folder, passed_over = choice[0]
        for line in passed_over if self.place.is_first_rank else []:
            print(f"warning: passed over a damaged checkpoint: {line}", file=sys.stderr, flush=True)
        if folder is not None and self.config.checkpoint.resume == "none":
            raise CheckpointError(f"{folder} exists and checkpoint.resume is none; choose another run_dir, remove it, or set checkpoint.resume=auto")
        if folder is not None:
            return checkpoint.load(self.config, folder, self.chunks, self.optimizer), folder
        if passed_over:
            raise CheckpointError("every checkpoint of this run is damaged; starting from nothing would hide that. Remove the checkpoints folder to do so")
        if self.config.checkpoint.init_from is not None:
            checkpoint.load_weights(Path(self.config.checkpoint.init_from), self.chunks)
            self.optimizer.reload_model_params()
        return TrainState(), None

    def _write_header(self) -> None:
        config, count = self.config, count_parameters(self.config)
        flops, peak = train_flops_per_token(config), config.metrics.peak_tflops or peak_tflops(device.name())
        self._flops_per_token, self._peak = flops, peak
        self.writers.header(
            {
                "config": config.model_dump(mode="json"),
                "world_size": self.place.world_size,
                "data_parallel_size": self.place.dp_size,
                "parameters": {"total": count.total, "active": count.active},
                "device": device.name(),
                "formulas": formulas(
                    flops_per_token=flops, flops_formula=formula_text(config), num_devices=self.place.world_size, device_name=device.name(), peak=peak
                ),
            }
        )

    # ------------------------------------------------------------------------------------------------------------------------ verbs

    def train_one_step(self) -> StepResult:
        """Advance by one step; a step whose gradients are not finite changes nothing but the position."""
        number = self.state.step + 1
        self.phases.step(number)
        with self.timer.phase("step"):
            result = self.step(number, self.train_loader)
        samples = self.config.train.global_batch_size
        self.state = TrainState(number, self.state.samples + samples, self.state.tokens + samples * self.config.data.seq_length)
        self._unrecorded_steps += 1
        return result

    def log(self, result: StepResult) -> None:
        """Reduce what the ranks measured and write the step's record, when it is due."""
        if self.state.step % self.config.metrics.every and result.applied and not self.is_finished:
            return
        for name in ("loss", "num_tokens"):
            self.buffer.declare(name, "mean" if name == "loss" else "sum")
        if result.loss_sum is not None and result.num_tokens is not None:
            self.buffer.add("loss", result.loss_sum / result.num_tokens.clamp(min=1), "mean", weight=result.num_tokens)
        self.buffer.add("memory_bytes", device.peak_memory_bytes(), "max")
        for name, seconds in self.timer.take().items():
            self.buffer.add(f"seconds.{name}", seconds / self._unrecorded_steps, "max")
        self._unrecorded_steps = 0
        reduced = self.buffer.reduce()
        tokens = self.config.train.global_batch_size * self.config.data.seq_length
        speed = throughput(
            tokens=tokens, seconds=reduced["seconds.step"], flops_per_token=self._flops_per_token, num_devices=self.place.world_size, peak=self._peak
        )
        record: dict[str, Any] = {
            "step": self.state.step,
            "loss": reduced["loss"],
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "samples": self.state.samples,
            "tokens": self.state.tokens,
            "tokens_per_second": speed.tokens_per_second,
            "tflops_per_device": speed.tflops_per_device,
            "mfu": speed.mfu,
            "data_wait_share": reduced["seconds.data"] / reduced["seconds.step"],
            "memory_bytes": int(reduced["memory_bytes"]),
            "seconds": {name.removeprefix("seconds."): value for name, value in reduced.items() if name.startswith("seconds.")},
            "skipped": not result.applied,
        }
        if self.config.moe is not None and self.config.metrics.router:
            record["router"] = gather_router_metrics(result.routers, parallel_state.get_pipeline_model_parallel_group())
        self.writers.step(record)

    def refuse_nonfinite(self, result: StepResult) -> None:
        """Count steps in a row that had to be refused, and stop the run when they are too many. fp16's loss scale looks for its level that way, and may.

        Raises:
            TrainingError: the limit is reached.
        """
        self.refused_in_a_row = 0 if result.applied or self.config.train.precision == "fp16" else self.refused_in_a_row + 1
        limit = self.config.train.max_nonfinite_steps
        if self.refused_in_a_row >= limit:
            raise TrainingError(
                f"{limit} steps in a row, up to step {self.state.step}, had a loss or gradient that is not finite "
                f"(gradient norm {result.grad_norm}); none was applied. "
                "Lower optim.lr, look at the data of these steps, or raise train.max_nonfinite_steps"
            )

    def evaluate(self) -> None:
        """Loss on every validation set, and what routers and experts have to say, written."""
        if self.valid_loaders:
            with self.phases.during(EVALUATION, self.state.step):
                record = evaluate(self.config, self.chunks, self.valid_loaders)
            self.writers.evaluation({"step": self.state.step, **record})

    def save(self) -> None:
        """A checkpoint of this step."""
        started = time.perf_counter()
        with self.phases.during(SAVE, self.state.step), parameters_gathered(self.chunks):
            folder = checkpoint.save(self.config, self.state, self.chunks, self.optimizer)
        self.writers.event("save", self.state.step, folder=str(folder), seconds=time.perf_counter() - started)

    # ------------------------------------------------------------------------------------------------------------------------ questions

    @property
    def last_step(self) -> int:
        """Where this process ends at the latest."""
        return min(self.config.train.steps, self.config.train.stop_at_step or self.config.train.steps)

    @property
    def is_finished(self) -> bool:
        return self.state.step >= self.last_step

    @property
    def is_whole(self) -> bool:
        """Whether the run has done all its steps, not only those asked for this time."""
        return self.state.step >= self.config.train.steps

    def is_due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def close(self) -> None:
        self.writers.close()
