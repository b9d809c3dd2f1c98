"""Metrics are reduced as they say, over one process and over two."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_skywork.metrics.record import MetricBuffer


def test_one_process_reduces_each_kind_over_what_was_added():
    buffer = MetricBuffer()
    for value, tokens in ((2.0, 30), (4.0, 10)):
        buffer.add("loss", torch.tensor(value, dtype=torch.bfloat16), "mean", weight=tokens)
        buffer.add("tokens", tokens, "sum")
        buffer.add("longest", value, "max")
        buffer.add("shortest", torch.tensor(value), "min")
        buffer.add("step", value, "same")
        buffer.add("load", torch.tensor([[value, 0.0], [1.0, 1.0]]), "sum")
    assert buffer.reduce() == {"loss": 2.5, "tokens": 40.0, "longest": 4.0, "shortest": 2.0, "step": 4.0, "load": [[6.0, 0.0], [2.0, 2.0]]}
    assert buffer.reduce() == {}, "a reduce starts anew"


def test_large_counts_keep_their_last_digit():
    buffer = MetricBuffer()
    buffer.add("tokens", torch.tensor(2**40 + 1), "sum")
    buffer.add("tokens", 1, "sum")
    assert buffer.reduce()["tokens"] == 2**40 + 2


def test_a_weight_of_zero_adds_nothing_and_nan_is_not_hidden():
    buffer = MetricBuffer()
    buffer.add("loss", torch.tensor(math.nan), "mean", weight=torch.tensor(0.0))
    buffer.add("loss", 3.0, "mean", weight=2)
    for name, reduction in (("worst", "max"), ("best", "min"), ("norm", "same"), ("total", "sum"), ("average", "mean")):
        buffer.add(name, math.nan, reduction)
    values = buffer.reduce()
    assert values.pop("loss") == 3.0
    assert len(values) == 5 and all(math.isnan(value) for value in values.values())


def test_a_mean_over_no_weight_is_nan_and_a_name_without_value_is_left_out():
    buffer = MetricBuffer()
    buffer.declare("grad_norm", "max")
    buffer.add("loss", 1.0, "mean", weight=0)
    values = buffer.reduce()
    assert list(values) == ["loss"] and math.isnan(values["loss"])


def test_misuse_is_named():
    buffer = MetricBuffer()
    buffer.add("loss", 1.0, "mean")
    with pytest.raises(ValueError, match="loss.*known as mean"):
        buffer.add("loss", 1.0, "sum")
    with pytest.raises(ValueError, match="loss.*shape"):
        buffer.add("loss", torch.ones(2), "mean")
    with pytest.raises(ValueError, match="tokens.*weight"):
        buffer.add("tokens", 1.0, "sum", weight=2.0)
    with pytest.raises(ValueError, match="median"):
        buffer.add("x", 1.0, "median")  # type: ignore[arg-type]


def test_gradients_are_not_kept_alive():
    buffer = MetricBuffer()
    loss = torch.ones((), requires_grad=True) * 2
    buffer.add("loss", loss, "mean", weight=torch.ones((), requires_grad=True))
    assert not any(value.requires_grad for entry in buffer._entries.values() for value in (entry.value, entry.weight) if value is not None)


def _two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    collectives: list[int] = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (collectives.append(tensor.numel()), all_reduce(tensor, *args, **kwargs))[1]  # type: ignore[assignment]

    buffer = MetricBuffer()
    # Added in a different order on each rank, and the loss by the last stage only.
    additions = [
        lambda: buffer.add("tokens", [10, 30][rank], "sum"),
        lambda: buffer.add("weighted", [2.0, 4.0][rank], "mean", weight=[10, 30][rank]),
        lambda: buffer.add("slowest", [-0.5, -0.8][rank], "max"),
        lambda: buffer.add("fastest", [0.5, 0.8][rank], "min"),
        lambda: buffer.add("norm", 1.25, "same"),
        lambda: buffer.add("load", torch.tensor([1.0, 0.0] if rank == 0 else [0.0, 3.0]), "sum"),
        lambda: buffer.add("loss", 2.5, "mean", weight=4) if rank == 1 else buffer.declare("loss", "mean"),
        lambda: buffer.add("peak", 7.0, "max") if rank == 0 else buffer.declare("peak", "max"),
        lambda: buffer.declare("nobody", "same"),
    ]
    for add in additions if rank == 0 else reversed(additions):
        add()
    assert collectives == [], "adding must not communicate"
    values = buffer.reduce()
    expected = {"tokens": 40.0, "weighted": 3.5, "slowest": -0.5, "fastest": 0.5, "norm": 1.25, "load": [1.0, 3.0], "loss": 2.5, "peak": 7.0}
    assert values == expected, values
    assert len(collectives) == 3, collectives

    alone = dist.new_group([0]), dist.new_group([1])
    buffer.add("tokens", [10, 30][rank], "sum")
    assert buffer.reduce(alone[rank])["tokens"] == [10, 30][rank]

    buffer.add("slowest", [math.nan, 1.0][rank], "max")
    assert math.isnan(buffer.reduce()["slowest"])

    buffer.add("norm", [1.0, 1.5][rank], "same")
    with pytest.raises(RuntimeError, match="norm.*1.0.*1.5"):
        buffer.reduce()

    other = MetricBuffer()
    other.add(["loss", "los"][rank], 1.0, "mean")
    with pytest.raises(RuntimeError, match=r"declare\(\)"):
        other.reduce()
    dist.destroy_process_group()


def test_two_ranks_reduce_everything_in_three_collectives(tmp_path: Path):
    mp.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
