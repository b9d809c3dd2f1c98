"""Mean loss of every validation set, each of its samples counted exactly once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megatron_skywork import device
from megatron_skywork.config.schema import Config
from megatron_skywork.metrics.record import MetricBuffer
from megatron_skywork.model.build import parameters_gathered
from megatron_skywork.train.step import Batch, run_schedule


@torch.no_grad()
def evaluate(config: Config, chunks: list[Any], loaders: Mapping[str, Iterable[Batch]]) -> dict[str, float]:
    """Loss per named validation set, the same on every rank. The model is left in training mode."""
    buffer = MetricBuffer(device.current())
    with parameters_gathered(chunks):
        for chunk in chunks:
            chunk.eval()
        for name, loader in loaders.items():
            buffer.declare(name, "mean")
            loss_sum, num_tokens = run_schedule(config, chunks, _padded(config, list(loader)), forward_only=True)
            if loss_sum is not None and num_tokens is not None:
                buffer.add(name, loss_sum / num_tokens.clamp(min=1), "mean", weight=num_tokens)
        for chunk in chunks:
            chunk.train()
    return buffer.reduce()


def _padded(config: Config, batches: list[Batch]) -> list[Batch]:
    """An interleaved pipeline takes micro-batches in groups of its stages; the ones added count for nothing."""
    group = config.parallel.pp if config.parallel.vpp > 1 else 1
    filler = {**batches[0], "loss_mask": torch.zeros_like(batches[0]["loss_mask"])}
    return batches + [filler] * (-len(batches) % group)
