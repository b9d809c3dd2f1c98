"""What training sustains is found again from steps that were made with it, and a whole estimate follows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_collective_time import config_of

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.estimate import estimate
from megatron_skywork.plan.hardware import Sustained, load_cluster
from megatron_skywork.plan.sustained import Sample, find, sample

LAYOUTS = [{"tp": 1, "pp": 2}, {"tp": 2, "pp": 1}, {"tp": 4, "pp": 2}, {"tp": 8, "pp": 1}]


def large(parallel: dict[str, int]) -> Config:
    """A model whose kernels take far longer than their launch, which nothing slows down."""
    small = config_of(parallel)
    shape = {"hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32, "max_position_embeddings": 2048}
    return small.model_copy(update={"model": small.model.model_copy(update=shape), "data": small.data.model_copy(update={"seq_length": 2048})})


@pytest.mark.parametrize("kernels, collectives", [(0.8, 0.5), (1.0, 1.0), (0.6, 0.9), (1.2, 0.3)])
def test_shares_are_found_again(kernels: float, collectives: float) -> None:
    parts = [(1.0, 0.1), (2.0, 0.9), (0.5, 0.4)]
    found = find([Sample(work, sent, work / kernels + sent / collectives) for work, sent in parts], "made up")
    assert (found.kernels, found.collectives, found.source) == (pytest.approx(kernels), pytest.approx(collectives), "made up")


def test_one_odd_run_does_not_move_the_others() -> None:
    runs = [Sample(work, sent, work / 0.8 + sent / 0.5) for work, sent in ((1.0, 0.1), (2.0, 0.9), (0.5, 0.4), (3.0, 0.2))]
    found = find([*runs, Sample(1.0, 0.3, 5.0)], "")
    assert (found.kernels, found.collectives) == (pytest.approx(0.8), pytest.approx(0.5))


def test_shares_stay_within_reason_and_one_run_has_one() -> None:
    assert find([Sample(2.0, 1.0, 6.0)], "").kernels == pytest.approx(0.5) == find([Sample(2.0, 1.0, 6.0)], "").collectives
    # Of runs that communicate nothing only the kernels' share can be known.
    assert find([Sample(1.0, 0.0, 2.0), Sample(2.0, 0.0, 4.0)], "").kernels == pytest.approx(0.5)
    wild = find([Sample(1.0, 1e-3, 1.2), Sample(1.0, 2e-3, 1.4)], "")
    assert wild.collectives >= 0.25


def test_a_sample_says_what_an_estimate_becomes() -> None:
    """Two products of an estimate: its step with other shares is what the sample's sums say."""
    cluster = load_cluster("dgx_a100:1")
    slower = replace(cluster, sustained=Sustained(0.8, 0.5, "made up"))
    for parallel in LAYOUTS:
        config = large(parallel)
        told = sample(estimate(config, cluster), 0.0)
        assert estimate(config, slower).step_seconds == pytest.approx(told.kernels / 0.8 + told.collectives / 0.5, rel=0.03)
    samples = [sample(estimate(large(parallel), cluster), estimate(large(parallel), slower).step_seconds) for parallel in LAYOUTS]
    found = find(samples, "")
    assert (found.kernels, found.collectives) == (pytest.approx(0.8, rel=0.03), pytest.approx(0.5, rel=0.03))
