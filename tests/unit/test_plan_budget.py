"""Days, money and the interval between saves: by hand, against published figures, and against a job that is really made to fail, again and again."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.budget import Budget, budget, budget_lines, budget_record, gpus_for, runnable_world_sizes, tokens_in
from megatron_skywork.plan.checkpoint_interval import (
    PUBLISHED_RATES,
    FailureRate,
    SaveCost,
    checkpoint_size,
    daly_seconds,
    failure_rate,
    plan_saves,
    save_cost,
    shares,
    young_seconds,
)
from megatron_skywork.plan.hardware import load_cluster, one_node
from megatron_skywork.plan.rates import HostCopyPoint

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
SAVE = SaveCost(20.0)


def skywork(*overrides: str) -> Config:
    return load_config([str(CONFIGS / "skywork_moe_146b.yaml")], list(overrides), 1536)


# ---------------------------------------------------------------------------------------------------------------- the interval


@pytest.mark.parametrize(("mean", "stall", "minutes"), [(24 * HOUR, 5 * MINUTE, 117), (6 * HOUR, 5 * MINUTE, 57), (15 * MINUTE, 5 * MINUTE, 9.1)])
def test_the_intervals_of_dalys_paper(mean: float, stall: float, minutes: float):
    """Figures 3 to 5 of the paper name the interval for a dump of 5 minutes."""
    assert daly_seconds(stall, mean) / MINUTE == pytest.approx(minutes, rel=0.01)


@pytest.mark.parametrize("stall", [0.1, 5.0, 60.0, 600.0, 3000.0])
def test_dalys_interval_is_near_the_minimum_of_the_exact_cost(stall: float):
    """The minimum is looked for on a grid of 1 in 10,000."""
    mean, save = HOUR, SaveCost(stall)
    found = max((1.0001**power for power in range(20, 90_000)), key=lambda seconds: shares(seconds, save, 0.0, mean).useful)
    assert daly_seconds(stall, mean) == pytest.approx(found, rel=0.02)
    assert shares(daly_seconds(stall, mean), save, 0.0, mean).useful == pytest.approx(shares(found, save, 0.0, mean).useful, rel=1e-3)
    assert stall > 100 or young_seconds(stall, mean) == pytest.approx(found, rel=0.25)
    assert shares(found, save, 0.0, mean).useful >= shares(young_seconds(stall, mean), save, 0.0, mean).useful


def test_beyond_twice_the_mean_time_the_interval_is_the_mean_time():
    assert daly_seconds(200.0, 100.0) == daly_seconds(1e9, 100.0) == 100.0


def life(train: float, save: SaveCost, failure_at: float) -> int:
    """How many saves are on the disk when the job fails: training and saves one after another, by the clock."""
    clock = written_at = 0.0
    ends: list[float] = []
    while True:
        clock = max(clock + train, written_at) + save.stall_seconds  # a save begins when the one before is written
        written_at = clock + save.written_seconds
        if clock >= failure_at:
            return sum(end <= failure_at for end in ends)
        ends.append(written_at)


def simulated(train: float, save: SaveCost, restart: float, mean: float, lives: int) -> tuple[float, float]:
    """Shares of useful time and of restarts, of a job that fails at random moments."""
    chance, useful, restarting, total = random.Random(7), 0.0, 0.0, 0.0
    for _ in range(lives):
        lasted = chance.expovariate(1 / mean)
        useful, total = useful + train * life(train, save, lasted), total + lasted
        while (survived := chance.expovariate(1 / mean)) < restart:
            restarting += survived
        restarting += restart
    return useful / (total + restarting), restarting / (total + restarting)


@pytest.mark.parametrize(("train", "stall", "written", "restart", "mean"), [
    (600.0, 20.0, 0.0, 0.0, 7200.0), (600.0, 20.0, 300.0, 660.0, 7200.0), (60.0, 5.0, 200.0, 100.0, 3600.0), (3000.0, 300.0, 1500.0, 900.0, 3600.0),
    (900.0, 60.0, 900.0, 2000.0, 2400.0),
])  # fmt: skip
def test_a_simulated_job_loses_what_the_formula_says(train: float, stall: float, written: float, restart: float, mean: float):
    save = SaveCost(stall, written)
    told = shares(train, save, restart, mean)
    useful, restarting = simulated(train, save, restart, mean, 40_000)
    assert useful == pytest.approx(told.useful, rel=0.02) and restarting == pytest.approx(told.restarts, rel=0.03)
    assert told.useful + told.saving + told.again + told.restarts == pytest.approx(1) and min(told.saving, told.again, told.restarts) >= 0


@pytest.mark.parametrize(("stall", "written"), [(30.0, 0.0), (30.0, 200.0), (300.0, 100.0)])
def test_a_simulated_job_loses_least_at_the_formulas_interval(stall: float, written: float):
    """The same failures for every interval; those a quarter shorter and longer lose more, and none loses noticeably less."""
    mean, restart, save = 2 * HOUR, 300.0, SaveCost(stall, written)
    best = daly_seconds(stall, mean)
    by_factor = {factor: simulated(best * factor, save, restart, mean, 20_000)[0] for factor in (0.5, 0.75, 1.0, 1.25, 2.0)}
    assert by_factor[1.0] > by_factor[0.5] and by_factor[1.0] > by_factor[2.0]
    assert by_factor[1.0] >= max(by_factor.values()) * 0.998


def test_saving_the_slower_the_longer_it_is_written():
    """Below the time a save is written, training waits for it: the interval is bounded from below."""
    config, mean = skywork(), 2 * HOUR
    assert plan_saves(config, 30.0, 32_000, mean, SaveCost(1.0), 0.0).every == round(daly_seconds(1.0, mean) / 30)
    assert plan_saves(config, 30.0, 32_000, mean, SaveCost(1.0, 900.0), 0.0).every == 30
    useful = [shares(100.0, SaveCost(5.0, written), 0.0, mean).useful for written in (0.0, 50.0, 100.0, 200.0, 400.0)]
    assert all(before > after for before, after in pairwise(useful))


def test_a_run_shorter_than_the_interval_saves_at_its_end_only():
    saves = plan_saves(skywork("checkpoint.every=0"), 1.0, 100, 1e9, SaveCost(10.0), 0.0)
    assert saves.every == saves.configured == 0 and saves.shares == saves.configured_shares and saves.shares.lost == pytest.approx(10 / 110, rel=1e-3)


def test_what_never_ends_is_no_error_of_arithmetic():
    assert shares(1e9, SaveCost(1.0), 0.0, 1.0).useful == 0.0
    assert shares(1e-6, SaveCost(1e-9), 0.0, 1e12).useful == pytest.approx(0.999, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------- failure rates


def test_published_rates_give_the_published_times():
    """Llama 3: one in three hours. RSC-1: the paper projects 1.8 h for 16,384 GPUs and 0.23 h for 131,072."""
    assert PUBLISHED_RATES["llama3"].gpu_hours / 16_384 == pytest.approx(54 * 24 / 419) == pytest.approx(3.1, abs=0.02)
    assert PUBLISHED_RATES["rsc1"].gpu_hours / 16_384 == pytest.approx(1.8, abs=0.01)
    assert PUBLISHED_RATES["rsc1"].gpu_hours / 131_072 == pytest.approx(0.23, abs=0.006)
    assert PUBLISHED_RATES["rsc1"].gpu_hours / PUBLISHED_RATES["rsc1_jobs"].gpu_hours == pytest.approx(3.65, abs=0.01), "small jobs fail more than their share"
    assert 0.2 < PUBLISHED_RATES["opt"].gpu_hours / PUBLISHED_RATES["llama3"].gpu_hours < 0.3
    assert all(rate.source.count("(") == 1 for rate in PUBLISHED_RATES.values())


def test_a_rate_by_name_or_number():
    assert failure_rate("rsc2") is PUBLISHED_RATES["rsc2"] and failure_rate("25_000").gpu_hours == 25_000
    for text in ("", "llama4", "0", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match="llama3, rsc1, rsc2, rsc1_jobs, opt, bloom, or GPU-hours per failure"):
            failure_rate(text)


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def test_the_size_of_a_checkpoint_by_hand():
    """146 B: vocabulary padded to 65,536; 52 routers of 16 x 4608 in fp32. A stage of 5 layers over 4 ranks is what one rank writes."""
    size = checkpoint_size(skywork())
    outside = 2 * 65_536 * 4608 + 105 * 4608
    padded = outside + 52 * (4 * 4608 * 4608 + 16 * 4608 + 16 * 3 * 4608 * 12_288)
    assert size.optimizer == 12 * padded and size.weights == 2 * padded + 2 * 52 * 16 * 4608
    layer = (4 * 4608 * 4608 + 16 * 3 * 4608 * 12_288) // 4 + 2 * 4608
    assert size.largest_writer == 5 * (14 * layer + 16 * 16 * 4608) and size.writers == 48
    assert checkpoint_size(skywork("train.precision=fp32")).total == 16 * padded


def test_a_save_takes_at_least_what_its_rates_say():
    """The first of 32 ranks that share a stage's optimizer, on 16 nodes, two of them on each: 12 of 14 bytes come over two shares of the network, all
    go to the host."""
    config, size, cluster = skywork(), checkpoint_size(skywork()), load_cluster(str(CONFIGS / "clusters" / "a800_192x8.yaml"))
    gathered = size.largest_writer * size.optimizer / size.total * 31 / 32
    seconds = gathered / (2 * cluster.between.bytes_per_second) + size.largest_writer / (16 * 16e9 / 8 * 128 / 130)
    least = save_cost(config, cluster)
    assert least.stall_seconds == pytest.approx(seconds, rel=1e-3) and least.written_seconds == 0 and least.is_least and "not known" in least.source
    stored = save_cost(config, cluster, 20e9)
    assert stored.stall_seconds == least.stall_seconds and stored.written_seconds == pytest.approx(size.total / 20e9)
    waited = save_cost(skywork("checkpoint.background=false"), cluster, 20e9)
    assert waited.stall_seconds == pytest.approx(seconds + size.total / 20e9, rel=1e-3) and waited.written_seconds == 0


def test_a_measured_copy_to_the_host_counts_and_one_rank_gathers_nothing():
    config, cluster = load_config([str(CONFIGS / "tiny.yaml")], [], 1), one_node("NVIDIA H100 80GB HBM3", 1)
    assert cluster is not None
    point = HostCopyPoint(bytes=2**30, to_host_bytes_per_second=10e9, to_device_bytes_per_second=1e9)
    measured = replace(cluster, rates=cluster.rates.model_copy(update={"host_copy": [point]}))
    assert save_cost(config, measured).stall_seconds == pytest.approx(checkpoint_size(config).total / 10e9)


# ---------------------------------------------------------------------------------------------------------------- the budget


def test_skywork_moe_by_hand():
    """A trillion tokens at the report's 690 tokens per GPU and second, if nothing ever fails and saves cost nothing: 10.92 days."""
    planned = budget(skywork("checkpoint.every=0"), 1536, 690.0, SaveCost(1e-9), failures=FailureRate("none", 1e15, "-"), tokens=10**12, price_per_gpu_hour=2.0)
    assert planned.steps == 31_790 and planned.tokens == 31_790 * 31_457_280
    assert planned.step_seconds == pytest.approx(31_457_280 / 690 / 1536) and planned.saves.shares.useful == pytest.approx(1, abs=1e-6)
    assert planned.seconds / DAY == pytest.approx(planned.tokens / (690 * 1536 * DAY), rel=1e-6) == pytest.approx(10.92, abs=0.005)
    assert planned.gpu_hours == pytest.approx(planned.seconds / 3600 * 1536) and planned.cost == pytest.approx(2 * planned.gpu_hours)
    assert planned.tokens_per_day == pytest.approx(690 * 1536 * DAY, rel=1e-6)


def test_failures_and_saves_lengthen_it_by_their_share():
    quiet, planned = budget(skywork(), 1536, 690.0, SAVE, failures=FailureRate("none", 1e15, "-")), budget(skywork(), 1536, 690.0, SAVE)
    assert planned.undisturbed_seconds == quiet.undisturbed_seconds == pytest.approx(32_000 * planned.step_seconds)
    assert planned.seconds == pytest.approx(planned.undisturbed_seconds / planned.saves.shares.useful) and planned.seconds > quiet.seconds
    assert planned.saves.mean_seconds == pytest.approx(54 * 24 * 3600 * 16_384 / 419 / 1536)
    assert planned.saves.every == round(daly_seconds(20.0, planned.saves.mean_seconds) / planned.step_seconds)


def test_the_configurations_own_interval_is_warned_of_only_when_it_loses_more():
    (warning,) = budget(skywork("checkpoint.every=1000"), 1536, 690.0, SAVE).warnings
    assert warning.startswith("checkpoint.every=1000 loses ") and warning.endswith(" longer")
    best = budget(skywork(), 1536, 690.0, SAVE).saves.every
    assert not budget(skywork(f"checkpoint.every={best * 5 // 4}"), 1536, 690.0, SAVE).warnings
    (warning,) = budget(skywork("checkpoint.every=0"), 1536, 690.0, SAVE, failures=PUBLISHED_RATES["opt"]).warnings
    assert "would never come to its end" in warning and warning.endswith("use 38")


def test_the_questions_the_other_way_round():
    planned = budget(skywork(), 1536, 690.0, SAVE)
    tokens = tokens_in(planned.seconds / DAY, planned)
    assert planned.tokens - 31_457_280 <= tokens <= planned.tokens and tokens % 31_457_280 == 0
    worlds = runnable_world_sizes(skywork())
    assert worlds[:5] == [48, 96, 144, 192, 240] and worlds[-1] == 48 * 3840 and 1536 in worlds and all(48 * 3840 % world == 0 for world in worlds)

    def on(world_size: int) -> Budget:
        return budget(skywork(), world_size, 690.0, SAVE, tokens=10**12)

    found = gpus_for(skywork(), 10**12, 20.0, on)
    assert found.seconds <= 20 * DAY < on(worlds[worlds.index(found.gpus) - 1]).seconds
    with pytest.raises(ConfigError, match=r"1 T tokens in 0\.001 days: no number of GPUs .* GPUs take .* days"):
        gpus_for(skywork(), 10**12, 0.001, on)


def test_experts_limit_the_number_of_gpus_too():
    """tp 1, ep 4 on two stages: whole expert groups only."""
    config = load_config([str(CONFIGS / "tiny.yaml")], ["parallel.pp=2", "parallel.ep=4", "train.micro_batch_size=1"], 8)
    assert runnable_world_sizes(config) == [8, 16]


@pytest.mark.parametrize(("speed", "save", "more", "says"), [
    (0.0, SAVE, {}, "tokens per GPU and second=0"), (math.nan, SAVE, {}, "tokens per GPU and second=nan"), (690.0, SaveCost(0.0), {}, "stalls training=0"),
    (690.0, SAVE, {"restart_seconds": -1.0}, "restart seconds=-1"), (690.0, SAVE, {"tokens": 0}, "tokens=0"),
    (690.0, SAVE, {"price_per_gpu_hour": -2.0}, "price per GPU-hour=-2"), (690.0, SaveCost(1.0, -1.0), {}, "is written=-1"),
    (690.0, SAVE, {"failures": FailureRate("x", 0.001, "-")}, "a failure every .* leaves no time"),
])  # fmt: skip
def test_nonsense_is_refused(speed: float, save: SaveCost, more: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        budget(skywork(), 1536, speed, save, **more)


def test_what_a_person_and_a_program_read():
    planned = budget(skywork(), 1536, 690.0, save_cost(skywork(), load_cluster("hgx_a800:192")), price_per_gpu_hour=1.5)
    text = "\n".join(budget_lines(planned))
    for said in ("1.007 T tokens", "1,536 GPUs", "at 1.5 a GPU-hour", "arXiv 2407.21783", f"checkpoint.every: {planned.saves.every} or more", "Young", "Daly",
                 "at least", "stalled_seconds", "2.0 TB: 292.7 GB weights", "48 ranks", "warning: checkpoint.every=500 loses"):  # fmt: skip
        assert said in text, said
    assert "None" not in text and max(map(len, budget_lines(planned))) < 400
    record = json.loads(json.dumps(budget_record(planned)))
    assert record["saves"]["every"] == planned.saves.every and record["checkpoint"]["total"] == planned.checkpoint.total
    assert record["days"] == pytest.approx(planned.seconds / DAY) and record["warnings"] == list(planned.warnings)
    short = budget(skywork("train.steps=10", "optim.warmup_steps=0"), 1536, 690.0, SAVE)
    assert "checkpoint.every: 0 (only at the end" in "\n".join(budget_lines(short))
