"""A run in memory: model, optimizer, data, metrics and position, built in one place, with the few verbs the loop speaks in."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator

from megatron_skywork import device, parallel
from megatron_skywork.checkpoint.load import load, load_weights
from megatron_skywork.checkpoint.save import Saver
from megatron_skywork.checkpoint.space import problem_before_training
from megatron_skywork.checkpoint.state import HasState, TrainState
from megatron_skywork.checkpoint.together import from_first
from megatron_skywork.config.schema import Config
from megatron_skywork.data.loader import build_train_loader, build_valid_loaders
from megatron_skywork.errors import CheckpointError
from megatron_skywork.metrics.record import MetricBuffer
from megatron_skywork.metrics.throughput import PhaseTimer, formulas, peak_tflops, throughput
from megatron_skywork.metrics.writers import open_writers
from megatron_skywork.model.build import build_chunks, parameters_gathered, wrap_for_training
from megatron_skywork.moe.router_state import gather_router_metrics
from megatron_skywork.optim.build import build_optimizer
from megatron_skywork.plan.flops import formula_text, train_flops_per_token
from megatron_skywork.plan.parameters import count_parameters
from megatron_skywork.train.answers import Answers, refuse_differing_copies
from megatron_skywork.train.evaluate import evaluate
from megatron_skywork.train.phases import EVALUATION, LOAD, SAVE, Phases
from megatron_skywork.train.pipeline_clock import FORMULAS as PIPELINE_FORMULAS
from megatron_skywork.train.pipeline_clock import pipeline_record
from megatron_skywork.train.resume import find_start
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
        self.phases.part("choice of a checkpoint")
        self.start = find_start(config, place)
        batch = config.train.global_batch_size
        micro_batches = batch // (config.train.micro_batch_size * place.dp_size)
        # megatron-core's schedules read the number of micro-batches of a step from this global.
        destroy_num_microbatches_calculator()
        init_num_microbatches_calculator(place.rank, None, batch, config.train.micro_batch_size, place.dp_size)
        self.phases.part("model")
        self.chunks = wrap_for_training(config, build_chunks(config))
        self.optimizer = build_optimizer(config, self.chunks)
        self.phases.part("checkpoint")
        self.state = self._restore()
        self._parts: dict[str, HasState] = {}
        self.saver, self.saved_step = Saver(config, verified=self.start.folder), self.state.step
        self._check_space()
        self.step = TrainStep(config, self.chunks, self.optimizer, micro_batches, self.timer)
        self.answers = Answers()
        self.remember("losses", self.step.losses)
        self.remember("answers", self.answers)
        self.phases.part("data")
        self.train_loader = self._open_loader()
        self.valid_loaders = build_valid_loaders(config, dp_rank=place.dp, dp_size=place.dp_size, pin_memory=device.has_gpu())
        self.buffer = MetricBuffer(device.current())
        self._unrecorded_steps = 0
        self.writers = open_writers(config, self.run_dir, resume_step=None if self.start.folder is None else self.state.step)
        self._write_header()
        if self.start.restart is not None:
            self.writers.event("restart", 0, reason=self.start.restart)

    # ------------------------------------------------------------------------------------------------------------------------ start

    def _restore(self) -> TrainState:
        if self.start.folder is not None:
            state = load(self.config, self.start.folder, self.chunks, self.optimizer)
            return replace(state, data=self.start.data, continues=self.start.continues or state.continues)
        if self.config.checkpoint.init_from is not None:
            load_weights(Path(self.config.checkpoint.init_from), self.chunks)
            self.optimizer.reload_model_params()
        return TrainState(data=self.start.data)

    def _open_loader(self) -> Iterator[Batch]:
        """Micro-batches from where the run stands."""
        return build_train_loader(
            self.config, dp_rank=self.place.dp, dp_size=self.place.dp_size, consumed_samples=self.state.samples, pin_memory=device.has_gpu()
        )

    def remember(self, name: str, part: HasState) -> None:
        """Save a part's state with the run's from now on, and give it what the checkpoint has of it.

        Args:
            name: of the part, in state.json under `extras`.
            part: its state is plain JSON values, the same on every rank.
        """
        self._parts[name] = part
        if name in self.state.extras:
            part.load_state_dict(self.state.extras[name])

    def _check_space(self) -> None:
        """A run that cannot save should hear it before its first step."""
        problem = from_first(lambda: problem_before_training(self.config, self.state.step))
        if problem is None:
            return
        if self.config.checkpoint.on_save_error == "stop":
            raise CheckpointError(problem)
        if self.place.is_first_rank:
            print(f"warning: {problem}", file=sys.stderr, flush=True)

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
                )
                | (PIPELINE_FORMULAS if config.parallel.pp > 1 else {}),
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
        tokens = self.state.tokens + samples * self.config.data.seq_length
        self.state = replace(self.state, step=number, samples=self.state.samples + samples, tokens=tokens)
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
        if self.step.clock is not None:
            self.step.clock.add_to(self.buffer)
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
        if self.step.clock is not None:
            record["pipeline"] = pipeline_record(reduced)
        if self.config.moe is not None and self.config.metrics.router:
            record["router"] = gather_router_metrics(result.routers, parallel_state.get_pipeline_model_parallel_group())
        self.writers.step(record)

    def answer(self, result: StepResult) -> bool:
        """Do what the settings say about a step whose numbers are wrong, see `answers.py`.

        Returns:
            whether the run went back to a checkpoint, whose step is then the last one that was done.

        Raises:
            TrainingError: copies of parameters differ, or too many steps in a row were not finite.
        """
        if result.verdict.num_differing:
            refuse_differing_copies(self, self.step.replicas)
        self.answers.nonfinite(self, result)
        if result.verdict.spike is None:
            return False
        with self.phases.during(LOAD, self.state.step):
            return self.answers.spike(self, result.verdict.spike)

    def go_back(self, folder: Path) -> TrainState:
        """Take up a checkpoint again, in this process, but go on in the data from where the run stands.

        Returns:
            what the checkpoint says.
        """
        with parameters_gathered(self.chunks):
            saved = load(self.config, folder, self.chunks, self.optimizer)
        for name, part in self._parts.items():
            if name in saved.extras:
                part.load_state_dict(saved.extras[name])
        self.state, self.saved_step = replace(self.state, step=saved.step), saved.step
        self.train_loader = self._open_loader()
        self.timer.take()
        self._unrecorded_steps = 0
        # What was recorded after the checkpoint did not happen, as on a resume.
        self.writers.close()
        self.writers = open_writers(self.config, self.run_dir, resume_step=saved.step)
        self._write_header()
        return saved

    def evaluate(self) -> None:
        """Loss on every validation set, and what routers and experts have to say, written."""
        if self.valid_loaders:
            with self.phases.during(EVALUATION, self.state.step):
                record = evaluate(self.config, self.chunks, self.valid_loaders)
            self.writers.evaluation({"step": self.state.step, **record})

    def save(self) -> None:
        """Begin a checkpoint of this step, as soon as the one before is on the disk."""
        self.settle_save(wait=True)
        self._begin_save(read_back=True)
        self.settle_save(wait=not self.config.checkpoint.background)

    def save_last(self, in_a_hurry: bool) -> None:
        """A checkpoint of this step, on the disk when this returns.

        Args:
            in_a_hurry: somebody waits to end this process, so the checkpoint is not read back (the next start verifies it, as any other).

        Raises:
            CheckpointError: on every rank, whatever checkpoint.on_save_error says: an end that is not saved must not look like one that is.
        """
        self._begin_save(read_back=not in_a_hurry)
        self.settle_save(wait=True, must_succeed=True)

    def _begin_save(self, read_back: bool) -> None:
        with self.phases.during(SAVE, self.state.step), parameters_gathered(self.chunks):
            if self.config.train.check_replicas and self.step.replicas.are_any_differing():
                refuse_differing_copies(self, self.step.replicas)
            self.saver.begin(self._position(), self.chunks, self.optimizer, read_back=read_back)

    def _position(self) -> TrainState:
        """How far the run has come, with the state of the parts that asked to be remembered."""
        self.state = replace(self.state, extras={name: part.state_dict() for name, part in self._parts.items()})
        return self.state

    def settle_save(self, wait: bool = False, must_succeed: bool = False) -> None:
        """Record how a save ended, if one did since the last call.

        Raises:
            CheckpointError: on every rank, for a save that failed on any, unless it may (checkpoint.on_save_error=continue).
        """
        with self.phases.during(SAVE, self.state.step) if wait else contextlib.nullcontext():
            outcome = self.saver.wait() if wait else self.saver.poll()
        if outcome is None:
            return
        if outcome.warning is not None and self.place.is_first_rank:
            print(f"warning: {outcome.warning}", file=sys.stderr, flush=True)
        seconds = {"seconds": outcome.seconds, "stalled_seconds": outcome.stalled_seconds, "written_seconds": outcome.written_seconds}
        if outcome.failure is None:
            self.saved_step = outcome.step
            self.writers.event("save", outcome.step, folder=str(outcome.folder), bytes=outcome.num_bytes, **seconds)
            return
        message = f"{outcome.folder}: could not be saved: {outcome.failure}. The last checkpoint of this run is that of step {self.saved_step}"
        print(f"[rank {self.place.rank}] warning: {message}", file=sys.stderr, flush=True)
        try:
            self.writers.event("save_failed", outcome.step, reason=outcome.failure, **seconds)
        except OSError as full:  # the record lies on the same disk, most of the time; what all ranks agree on comes first
            print(f"warning: the failed save could not be recorded: {full}", file=sys.stderr, flush=True)
        if must_succeed or self.config.checkpoint.on_save_error == "stop":
            raise CheckpointError(message)

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
        """Leave; a save that is still on its way is given up, and the checkpoint before it counts."""
        self.saver.abandon()
        self.writers.close()
