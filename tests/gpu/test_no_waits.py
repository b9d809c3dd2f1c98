"""The host never waits for the GPU inside an MoE layer without expert parallelism (routing, dropping, dispatching, experts), nor for hashes of parameters."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, release

from megatron_skywork import device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not device.has_gpu(), reason="needs an NVIDIA GPU")]


def layer_without_waits(settings: dict[str, Any]) -> bool:
    """Forward and backward of the first MoE layer, three times, the last one under CUDA's own check."""
    import torch

    from megatron_skywork import device, parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.evaluate import find_moe_layers
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    layer = find_moe_layers(training.chunks)[0]
    hidden = torch.randn(config.data.seq_length, 1, config.model.hidden_size, device=device.current(), dtype=torch.bfloat16, requires_grad=True)

    def once() -> None:
        layer(hidden)[0].sum().backward()

    once()
    once()  # compilers and allocators may wait in the first rounds
    with device.waits_forbidden():
        once()
    release(training)
    return hidden.grad is not None


@pytest.mark.parametrize("moe", [{}, {"capacity_factor": 1.0}, {"capacity_factor": 1.0, "pad_to_capacity": True}], ids=["dropless", "dropping", "padded"])
def test_an_moe_layer_does_not_wait(ranks: RankPool, tmp_path: Any, moe: dict[str, Any]) -> None:
    settings = merged(BASE, {"run_dir": str(tmp_path), "train": {"precision": "bf16"}, "moe": moe})
    assert ranks.run(1, layer_without_waits, settings) == [True]


def test_hashing_a_parameter_does_not_wait_and_agrees_with_a_cpu() -> None:
    import torch

    from megatron_skywork.train.replicas import checksum, odd_weights

    tensor = torch.randn(3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    here, weights = tensor.to(device.current()), odd_weights(1024, device.current())
    checksum(here, weights)
    with device.waits_forbidden():
        found = checksum(here, weights)
    assert int(found) == int(checksum(tensor, odd_weights(1024, tensor.device)))
