"""What a target costs: steps, days, GPU-hours and money for a number of tokens; and the inverse, tokens in some days, GPUs for a date.

    days = steps * (tokens of a step / (tokens per GPU and second * GPUs)) / useful share / 86400

Tokens per GPU and second are given: measured, or `estimate`'s. The useful share of the time is what saves and failures leave (`checkpoint_interval.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.wording import count, duration, percent, sized
from megatron_skywork.plan.checkpoint_interval import (
    DEFAULT_RATE,
    RESTART_SECONDS,
    CheckpointSize,
    FailureRate,
    SaveCost,
    Saves,
    checkpoint_size,
    plan_saves,
)
from megatron_skywork.plan.stages import batch

DAY_SECONDS, HOUR_SECONDS = 86_400, 3_600
# A setting is warned of when it loses this much more of the time than the best one.
_WORTH_A_WARNING = 0.005
_MEASURE_IT = "The event `save` in metrics.jsonl has what a save of this run really takes (stalled_seconds)"


@dataclass(frozen=True)
class Budget:
    """What a target costs.

    Args:
        tokens, steps: the target, in whole steps.
        undisturbed_seconds: without saves and failures; `seconds` with them.
        cost: in the currency of the price; None without a price.
        tokens_per_day: training that counts.
    """

    tokens: int
    steps: int
    gpus: int
    tokens_per_gpu_second: float
    step_seconds: float
    undisturbed_seconds: float
    seconds: float
    gpu_hours: float
    tokens_per_day: float
    price_per_gpu_hour: float | None
    cost: float | None
    failures: FailureRate
    restart_seconds: float
    save: SaveCost
    saves: Saves
    checkpoint: CheckpointSize
    warnings: tuple[str, ...]


def budget(
    config: Config, world_size: int, tokens_per_gpu_second: float, save: SaveCost, *, tokens: int | None = None, failures: FailureRate = DEFAULT_RATE,
    restart_seconds: float = RESTART_SECONDS, price_per_gpu_hour: float | None = None,
) -> Budget:  # fmt: skip
    """What `tokens` cost on `world_size` GPUs.

    Args:
        config: checked for this world size.
        tokens_per_gpu_second: of a step, measured or estimated.
        tokens: the target; None for what train.steps comes to.

    Raises:
        ConfigError: a number that must be positive is not, or failures come so often that nothing is ever finished.
    """
    _refuse_nonsense(tokens_per_gpu_second, save, restart_seconds, price_per_gpu_hour, tokens)
    per_step = batch(config, world_size).tokens_per_step
    steps = config.train.steps if tokens is None else -(-tokens // per_step)
    step_seconds = per_step / (tokens_per_gpu_second * world_size)
    mean_seconds = failures.gpu_hours * HOUR_SECONDS / world_size
    saves = plan_saves(config, step_seconds, steps, mean_seconds, save, restart_seconds)
    undisturbed, size = steps * step_seconds, checkpoint_size(config)
    if not saves.shares.useful:
        raise ConfigError(
            f"world size {world_size}: a failure every {duration(mean_seconds)} leaves no time for a step of {duration(step_seconds)} and a save of "
            f"{duration(save.stall_seconds)}; save faster, use fewer GPUs, or look at the failure rate ({failures.source})")
    seconds = undisturbed / saves.shares.useful
    gpu_hours = world_size * seconds / HOUR_SECONDS
    return Budget(
        steps * per_step, steps, world_size, tokens_per_gpu_second, step_seconds, undisturbed, seconds, gpu_hours,
        tokens_per_gpu_second * world_size * DAY_SECONDS * saves.shares.useful, price_per_gpu_hour,
        None if price_per_gpu_hour is None else price_per_gpu_hour * gpu_hours, failures, restart_seconds, save, saves, size,
        tuple(_warnings(saves, undisturbed)),
    )  # fmt: skip


def _refuse_nonsense(speed: float, save: SaveCost, restart_seconds: float, price: float | None, tokens: int | None) -> None:
    above = {"tokens per GPU and second": speed, "seconds a save stalls training": save.stall_seconds, "tokens": 1 if tokens is None else tokens}
    least = {"restart seconds": restart_seconds, "seconds a save is written": save.written_seconds, "price per GPU-hour": price or 0.0}
    problems = [f"{name}={number:g}: must be a number above 0" for name, number in above.items() if not 0 < number < math.inf]
    problems += [f"{name}={number:g}: must be a number, 0 or more" for name, number in least.items() if not 0 <= number < math.inf]
    if problems:
        raise ConfigError(problems)


def _warnings(saves: Saves, undisturbed_seconds: float) -> list[str]:
    more = saves.configured_shares.lost - saves.shares.lost
    if more < _WORTH_A_WARNING:
        return []
    if saves.configured_shares.useful < 1e-6:
        return [f"checkpoint.every={saves.configured} would never come to its end: the job fails every {duration(saves.mean_seconds)}; use {saves.every}"]
    longer = undisturbed_seconds / saves.configured_shares.useful - undisturbed_seconds / saves.shares.useful
    return [f"checkpoint.every={saves.configured} loses {percent(saves.configured_shares.lost)} of the time, {saves.every} loses {percent(saves.shares.lost)}: "
            f"{duration(longer)} longer"]  # fmt: skip


def tokens_in(days: float, planned: Budget) -> int:
    """Tokens that a plan's GPUs train on in so many days, saves and failures counted, in whole steps of the plan."""
    per_step = planned.tokens // planned.steps
    return int(planned.tokens_per_day * days / per_step) * per_step


def runnable_world_sizes(config: Config, gpus_per_node: int = 1) -> list[int]:
    """GPUs on which the configuration runs as it is, by its data-parallel degree, fewest first; more than a node are whole nodes."""
    p, sequences = config.parallel, config.train.global_batch_size // config.train.micro_batch_size
    degrees = [degree for degree in range(1, sequences + 1) if sequences % degree == 0]
    worlds = [world for world in (p.tp * p.pp * p.cp * degree for degree in degrees) if world % (p.etp * p.ep * p.pp) == 0]
    return [world for world in worlds if world <= gpus_per_node or world % gpus_per_node == 0]


def gpus_for(config: Config, tokens: int, days: float, plan: Callable[[int], Budget], gpus_per_node: int = 1) -> Budget:
    """The plan with fewest GPUs that trains on `tokens` in `days`.

    Args:
        plan: the budget of the target on so many GPUs; more GPUs fail more often and have fewer micro-batches each, which is the plan's to know.

    Raises:
        ConfigError: no number of GPUs that fits the batch is enough; names the fastest one.
    """
    plans = []
    for world_size in runnable_world_sizes(config, gpus_per_node):
        plans.append(plan(world_size))
        if plans[-1].seconds <= days * DAY_SECONDS:
            return plans[-1]
    fastest = min(plans, key=lambda found: found.seconds)
    raise ConfigError(
        f"{count(tokens)} tokens in {days:g} days: no number of GPUs that train.global_batch_size={config.train.global_batch_size} can be cut over is enough; "
        f"{fastest.gpus:,} GPUs take {fastest.seconds / DAY_SECONDS:.1f} days. Ask for more days, fewer tokens or a larger batch")


# ------------------------------------------------------------------------------------------------------------------------------ in words


def budget_lines(planned: Budget) -> list[str]:
    """What a person reads."""
    saves, size, save, split = planned.saves, planned.checkpoint, planned.save, planned.saves.shares
    days, quiet_days = planned.seconds / DAY_SECONDS, planned.undisturbed_seconds / DAY_SECONDS
    money = "" if planned.cost is None else f", {planned.cost:,.0f} at {planned.price_per_gpu_hour:g} a GPU-hour"
    every = f"{saves.every}" if saves.every else "0 (only at the end: the run is shorter than the best interval)"
    every += " or more" if saves.every and save.is_least else ""
    stall = f"at least {duration(save.stall_seconds)}" if save.is_least else duration(save.stall_seconds)
    between = saves.every * planned.step_seconds or planned.undisturbed_seconds
    return [
        f"budget: {count(planned.tokens)} tokens in {days:.1f} days on {planned.gpus:,} GPUs: {planned.gpu_hours:,.0f} GPU-hours{money}",
        f"  {planned.steps:,} steps of {duration(planned.step_seconds)} at {planned.tokens_per_gpu_second:,.0f} tokens per GPU and second: "
        f"{quiet_days:.1f} days undisturbed, {count(planned.tokens_per_day)} tokens a day with saves and failures",
        f"failures: one every {duration(saves.mean_seconds)}, about {planned.seconds / saves.mean_seconds:,.0f} in all; a restart takes "
        f"{duration(planned.restart_seconds)}",
        f"  {planned.failures.gpu_hours:,.0f} GPU-hours per failure: {planned.failures.source}",
        f"checkpoint.every: {every}; Daly {duration(saves.daly_seconds)}, Young {duration(saves.young_seconds)} of training between saves",
        f"  a save stalls training for {stall}: {save.source}" + (f". {_MEASURE_IT}" if save.is_least else ""),
        f"  lost: {percent(split.lost)} of the time: saving {percent(split.saving)}, work done again {percent(split.again)}, "
        f"restarts {percent(split.restarts)}",
        f"a checkpoint holds {sized(size.total)}: {sized(size.weights)} weights, {sized(size.optimizer)} masters and moments; {size.writers:,} ranks "
        f"write it, one of them {sized(size.largest_writer)}",
        f"  to be written before the next save begins, it needs a storage of {sized(size.total / between)}/s, {sized(size.largest_writer / between)}/s of it "
        "for that rank",
        *(f"warning: {warning}" for warning in planned.warnings),
    ]


def budget_record(planned: Budget) -> dict[str, Any]:
    """The same for JSON, with the sum of a checkpoint's bytes."""
    record = asdict(planned)
    record["checkpoint"]["total"] = planned.checkpoint.total
    return {**record, "days": planned.seconds / DAY_SECONDS, "warnings": list(planned.warnings)}
