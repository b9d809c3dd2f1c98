"""How often to save: what a checkpoint weighs, how often a job of many GPUs fails, and the interval between saves that loses least.

A job of N GPUs fails whenever one of them does, so its mean time between failures is M = (GPU-hours per failure) / N; failures are taken as exponential,
without memory. With t seconds of training between saves, C seconds for which a save stalls training, B seconds for which it is then written in the background,
R seconds from a failure to the first step after it, and P = t + C, the best t is

    Young  t = sqrt(2 C M)                                                     J. W. Young, CACM 17(9), 1974
    Daly   t = sqrt(2 C M) (1 + x / 3 + x^2 / 9) - C,  x = sqrt(C / (2 M))     J. T. Daly, Future Gener. Comput. Syst. 22(3), 2006; t = M from C >= 2 M on

and what of the time is training that counts follows from one life of the job: it lasts M on average; save k counts if the job lives until k P + B; a restart
succeeds at once or is begun again, M (exp(R / M) - 1) in all. Saves that count in a life: sum over k >= 1 of exp(-(k P + B) / M). So

    useful share = t exp(-(R + B) / M) / (M (exp(P / M) - 1))
    restarts     = 1 - exp(-R / M)         saving = useful share * C / t         work done again = the rest

which for B = 0 is Daly's equation for the wall-clock time. B multiplies it and does not move the best t, but a save waits for the one before it: below t = B
training stalls for B - t more. Not in it: a slower step while a save is written, queues of a cluster, evaluations, saves that fail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.wording import duration
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.communication import COMPUTE_BYTES, FP32
from megatron_skywork.plan.hardware import Cluster, Sustained
from megatron_skywork.plan.parameters import HeldParameters, count_parameters, held_parameters

# A checkpoint holds fp32 master weights and two moments of every parameter, whatever moments are kept in while training.
OPTIMIZER_BYTES = 3 * FP32
# From a failure to the next attempt's start where that is automatic: the median of a cluster of 504 B200, 11 min (arXiv 2605.09370).
RESTART_SECONDS = 660.0
# 16 lanes of PCIe 4.0, 16 GT/s each, 128 of 130 bits data: what a GPU can send to its host at best.
HOST_BYTES_PER_SECOND = 16 * 16e9 * 128 / 130 / 8


@dataclass(frozen=True)
class FailureRate:
    """How often a GPU, with its share of node, network and software, ends a job.

    Args:
        gpu_hours: per failure.
    """

    name: str
    gpu_hours: float
    source: str


PUBLISHED_RATES = {
    rate.name: rate
    for rate in (
        FailureRate("llama3", 54 * 24 * 16_384 / 419, "419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783)"),
        FailureRate("rsc1", 8 * 24 * 1000 / 6.50, "6.50 failures in 1,000 days of a node of 8 A100, RSC-1 (arXiv 2410.21680)"),
        FailureRate("rsc2", 8 * 24 * 1000 / 2.34, "2.34 failures in 1,000 days of a node of 8 A100, RSC-2 (arXiv 2410.21680)"),
        FailureRate("rsc1_jobs", 7.9 * 1024, "7.9 hours between failures of jobs of 1,024 A100, RSC-1: more than its nodes' rate tells (arXiv 2410.21680)"),
        FailureRate("opt", 61 * 24 * 992 / 105, "35 restarts by hand and about 70 automatic ones in 2 months on 992 A100, OPT-175B (arXiv 2205.01068)"),
        FailureRate("bloom", 7 * 24 * 400 / 1.5, "1 to 2 GPUs a week of about 400 A100, BLOOM (huggingface.co/blog/bloom-megatron-deepspeed)"),
    )
}
DEFAULT_RATE = PUBLISHED_RATES["llama3"]


def failure_rate(text: str, option: str = "--failures") -> FailureRate:
    """A published rate by its name, or the GPU-hours per failure as a number.

    Raises:
        ConfigError: neither.
    """
    if text in PUBLISHED_RATES:
        return PUBLISHED_RATES[text]
    try:
        hours = float(text.replace("_", ""))
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        names = ", ".join(PUBLISHED_RATES)
        raise ConfigError(f"{option}={text!r}: is no known failure rate; use {names}, or GPU-hours per failure, e.g. {DEFAULT_RATE.gpu_hours:.0f}")
    return FailureRate("given", hours, "given")


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint of a run.

    Args:
        weights: in the compute precision, routers in fp32, vocabulary padded.
        optimizer: masters and moments, fp32.
        largest_writer: what the rank that writes most writes: the first of the data-parallel ranks of a stage writes all that they share.
        writers: ranks that write tensors.
    """

    weights: int
    optimizer: int
    largest_writer: int
    writers: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer


def checkpoint_size(config: Config) -> CheckpointSize:
    """Bytes of a checkpoint, and who writes them; indices and random states (kilobytes a rank) are left out."""
    counted, size = count_parameters(config), COMPUTE_BYTES[config.train.precision]
    weights = counted.padded_total * size + counted.components.get("routers", 0) * (FP32 - size)
    held = [sum(_saved_bytes(chunk, size) for chunk in chunks) for chunks in held_parameters(config)]
    p = config.parallel
    return CheckpointSize(weights, counted.padded_total * OPTIMIZER_BYTES, max(held), p.pp * max(p.tp, p.ep * p.etp))


def _saved_bytes(chunk: HeldParameters, size: int) -> int:
    return chunk.total * (size + OPTIMIZER_BYTES) + chunk.routers * (FP32 - size)


@dataclass(frozen=True)
class SaveCost:
    """What a save takes.

    Args:
        stall_seconds: C, for which training stands still (`stalled_seconds` of the event `save` in metrics.jsonl).
        written_seconds: B, for which it is written while training goes on; 0 where that is not known.
        source: where the two come from.
        is_least: whether the stall is the least there can be, not a measurement.
    """

    stall_seconds: float
    written_seconds: float = 0.0
    source: str = "given"
    is_least: bool = False


def save_cost(config: Config, cluster: Cluster, storage_bytes_per_second: float | None = None) -> SaveCost:
    """The least that a save can take on all GPUs of a cluster: the writing rank gathers masters and moments from those it shares them with, and copies all to
    its host.

    Args:
        storage_bytes_per_second: what the storage takes from all writers together, at most; None where that is not known.
    """
    # What training sustains of a link is no bound.
    size, network = checkpoint_size(config), Network(config, cluster.world_size, replace(cluster, sustained=Sustained()))
    # Of a mixture nearly all are experts.
    shared = "expert_dp" if config.moe is not None else "dp_cp"
    ranks = network.where(shared).size
    gathering = network.sent(shared, "all_gather", size.largest_writer * size.optimizer / size.total * (ranks - 1) / ranks)
    measured = [point.to_host_bytes_per_second for point in cluster.rates.host_copy]
    to_host = max(measured, default=HOST_BYTES_PER_SECOND)
    stall = gathering + size.largest_writer / to_host
    rates = f"gathered from {ranks:,} ranks in {duration(gathering)}, copied to the host at {to_host / 1e9:.3g} GB/s"
    rates += " (as measured)" if measured else " (16 lanes of PCIe 4.0)"
    if storage_bytes_per_second is None:
        return SaveCost(stall, 0.0, f"{rates}; the time of writing is not known", is_least=True)
    written = size.total / storage_bytes_per_second
    if not config.checkpoint.background:
        return SaveCost(stall + written, 0.0, f"{rates}, then written at {storage_bytes_per_second / 1e9:.4g} GB/s", is_least=True)
    return SaveCost(stall, written, f"{rates}; written meanwhile at {storage_bytes_per_second / 1e9:.4g} GB/s", is_least=True)


def young_seconds(stall_seconds: float, mean_seconds: float) -> float:
    """Young's interval: seconds of training between saves, for C and M."""
    return math.sqrt(2 * stall_seconds * mean_seconds)


def daly_seconds(stall_seconds: float, mean_seconds: float) -> float:
    """Daly's higher-order interval: seconds of training between saves, for C and M."""
    if stall_seconds >= 2 * mean_seconds:
        return mean_seconds
    x = math.sqrt(stall_seconds / (2 * mean_seconds))
    return young_seconds(stall_seconds, mean_seconds) * (1 + x / 3 + x * x / 9) - stall_seconds


@dataclass(frozen=True)
class Shares:
    """Where the time of a job goes; the four add up to 1.

    Args:
        useful: training that counts.
        saving: training stands still for saves that count.
        again: work that a failure took, with its saves.
        restarts: from failures to the first steps after them.
    """

    useful: float
    saving: float
    again: float
    restarts: float

    @property
    def lost(self) -> float:
        return 1 - self.useful


def shares(train_seconds: float, save: SaveCost, restart_seconds: float, mean_seconds: float) -> Shares:
    """Where the time goes with so many seconds of training between saves; see the module's docstring."""
    waits = max(0.0, save.written_seconds - train_seconds)
    stall, written = save.stall_seconds + waits, save.written_seconds - waits
    restarts = -math.expm1(-restart_seconds / mean_seconds)
    lives = (train_seconds + stall) / mean_seconds
    if lives > 700:  # no save is ever reached, and exp would not be a number
        return Shares(0.0, 0.0, 1 - restarts, restarts)
    useful = train_seconds / mean_seconds * math.exp(-(restart_seconds + written) / mean_seconds) / math.expm1(lives)
    saving = useful * stall / train_seconds
    return Shares(useful, saving, 1 - useful - saving - restarts, restarts)


@dataclass(frozen=True)
class Saves:
    """How often to save.

    Args:
        mean_seconds: M, between failures of the whole job.
        young_seconds, daly_seconds: the formulas' intervals.
        every: steps between saves: Daly's interval in whole steps, no less than a save takes in the background; 0 where the run is over before.
        shares: where the time goes with `every`.
        configured: the configuration's own checkpoint.every.
        configured_shares: where it goes with that one.
    """

    mean_seconds: float
    young_seconds: float
    daly_seconds: float
    every: int
    shares: Shares
    configured: int
    configured_shares: Shares


def plan_saves(config: Config, step_seconds: float, steps: int, mean_seconds: float, save: SaveCost, restart_seconds: float) -> Saves:
    """The interval for a run of `steps` steps, beside the configuration's own."""
    best = daly_seconds(save.stall_seconds, mean_seconds)
    every = max(1, round(best / step_seconds), math.ceil(save.written_seconds / step_seconds))

    def of(interval: int) -> Shares:
        return shares((min(interval, steps) or steps) * step_seconds, save, restart_seconds, mean_seconds)

    configured, every = config.checkpoint.every, every if every < steps else 0
    return Saves(mean_seconds, young_seconds(save.stall_seconds, mean_seconds), best, every, of(every), configured, of(configured))
