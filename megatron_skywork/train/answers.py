"""What a run does when the numbers of a step are wrong: not finite, spiking, or not the same in all copies of a parameter.

All ranks have the same verdict (`step.py`), so all give the same answer; nothing here decides by a number of one rank.

* Not finite: the step changed nothing but the position. It is recorded, with where it came from. After `train.max_nonfinite_steps` in a row the run ends,
  with a checkpoint: the parameters are those of the last step that was applied, its step and samples those of the last one that was refused. Started again, it
  goes on behind the data that failed.
* A spike: `spikes.policy`. After a rewind steps count on from the checkpoint's, so that the schedule is that of the parameters, while samples count on from the
  spike. The checkpoint itself stays as it was: a run that dies before its next save finds the same spike again, and does the same about it.
* Copies that differ: the run ends and saves nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Protocol

from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_skywork.checkpoint.state import TrainState
from megatron_skywork.checkpoint.verify import newest
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import CheckpointError, TrainingError
from megatron_skywork.metrics.writers import Writers
from megatron_skywork.train.loss_spikes import Spike
from megatron_skywork.train.nonfinite import nonfinite_sources
from megatron_skywork.train.replicas import ReplicaCheck, described
from megatron_skywork.train.step import StepResult


class Run(Protocol):
    """The part of `Training` that answers are given with."""

    config: Config
    chunks: list[Any]
    optimizer: MegatronOptimizer
    state: TrainState
    writers: Writers

    def settle_save(self, wait: bool = False) -> None: ...

    def save_last(self, in_a_hurry: bool) -> None: ...

    def go_back(self, folder: Path) -> TrainState: ...


class Answers:
    """Gives them, and remembers how often.

    Attributes:
        refused_in_a_row: steps that were not finite, up to now.
        rewinds: how often the run went back.
    """

    def __init__(self) -> None:
        self.refused_in_a_row = self.rewinds = 0

    def state_dict(self) -> dict[str, Any]:
        return {"refused_in_a_row": self.refused_in_a_row, "rewinds": self.rewinds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refused_in_a_row, self.rewinds = state["refused_in_a_row"], state["rewinds"]

    def nonfinite(self, run: Run, result: StepResult) -> None:
        """Record a step that was refused for it.

        Raises:
            TrainingError: too many in a row.
        """
        verdict = result.verdict
        if verdict.nonfinite:
            sources = nonfinite_sources(run.chunks, run.optimizer, result.loss_sum)
            ranks = [source["rank"] for source in sources]
            run.writers.event("nonfinite", run.state.step, samples=_samples(run), what=list(verdict.nonfinite), ranks=ranks, sources=sources)
        # fp16's loss scale looks for its level by gradients that overflow, and may; a loss that is not finite is beyond its help.
        counts = "loss" in verdict.nonfinite or (bool(verdict.nonfinite) and not _loss_scale_can_fall(run.optimizer))
        self.refused_in_a_row = self.refused_in_a_row + 1 if counts else 0
        limit = run.config.train.max_nonfinite_steps
        if self.refused_in_a_row >= limit:
            self.refused_in_a_row = 0  # the next start gets as many tries
            raise TrainingError(
                f"{limit} steps in a row, up to step {run.state.step}, had a loss or gradient that is not finite (gradient norm {result.grad_norm}); "
                f"none was applied, and what the last good one left {_saved(run)}. "
                "Lower optim.lr, look at the data of these steps (events in metrics.jsonl), or raise train.max_nonfinite_steps"
            )

    def spike(self, run: Run, spike: Spike) -> bool:
        """Record a spike, and go back where that is asked for and can be done.

        Returns:
            whether the run went back.
        """
        settings, folder, answer = run.config.spikes, None, "recorded"
        if settings.policy == "skip":
            answer = "its update was left out"
        elif settings.policy == "rewind" and self.rewinds >= settings.max_rewinds:
            answer = f"recorded; no rewind, spikes.max_rewinds={settings.max_rewinds} is reached"
        elif settings.policy == "rewind":
            run.settle_save(wait=True)
            folder, _ = newest(Path(run.config.run_dir))
            answer = "rewind" if folder is not None else "recorded; no rewind, there is no checkpoint to go back to"
        fields = {**asdict(spike), "samples": _samples(run)}
        run.writers.event("spike", run.state.step, **fields, answer=answer)
        if folder is None:
            return False
        step, rewinds = run.state.step, self.rewinds + 1
        saved = run.go_back(folder)
        self.rewinds = rewinds  # not as many as the checkpoint knows of: they would never end
        passed_over = [saved.samples, run.state.samples - 1]
        run.writers.event("rewind", run.state.step, folder=str(folder), passed_over=passed_over, spike={"step": step, **fields}, number=rewinds)
        return True


def refuse_differing_copies(run: Run, replicas: ReplicaCheck) -> NoReturn:
    """End the run: some rank computes with parameters that are not those of the others. A save on its way was begun with equal ones, and is finished.

    Raises:
        TrainingError: always, with who it is.
    """
    suspects = replicas.suspects()
    run.writers.event("replicas", run.state.step, suspects=[asdict(suspect) for suspect in suspects])
    with contextlib.suppress(CheckpointError):  # recorded by then; who differs is what has to be said
        run.settle_save(wait=True)
    raise TrainingError(
        f"step {run.state.step}: copies of parameters differ: {described(suspects)}. Nothing of this step was saved; "
        "have the machine looked at, or leave it out, and start again: the run goes on from its newest checkpoint"
    )


def _loss_scale_can_fall(optimizer: MegatronOptimizer) -> bool:
    """Whether there is a loss scale, and a lower one to try."""
    scalers = [part.grad_scaler for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return any(scaler is not None and bool(scaler.scale > scaler.min_scale) for scaler in scalers)


def _samples(run: Run) -> list[int]:
    """First and last sample of the step just done, counted from 0 over the whole run."""
    return [run.state.samples - run.config.train.global_batch_size, run.state.samples - 1]


def _saved(run: Run) -> str:
    """Save, before a run ends for another reason than a save that fails; how that went, in words."""
    try:
        run.settle_save(wait=True)
        run.save_last(in_a_hurry=False)
    except CheckpointError as failure:  # on all ranks alike
        return f"could not be saved ({failure})"
    return f"is saved as step {run.state.step}"
