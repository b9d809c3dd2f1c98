"""The loss without whole logits, over ranks and inside the model: megatron-core's own loss of the model's own logits is what it is held against."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged

TOKENS, HIDDEN, VOCABULARY = 20, 16, 512


def shared_vocabulary(dtype_name: str, keep_logits: bool) -> dict[str, Any]:
    """Losses and gradients with the vocabulary spread over all ranks, as lists; every rank's rows of the weight have two blocks or more."""
    import torch

    from megatron_skywork.model.output_loss import output_losses

    group, dtype = torch.distributed.group.WORLD, getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    whole_VH = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    labels_T, gradient_T = torch.randint(VOCABULARY, (TOKENS,), generator=generator), torch.randn(TOKENS, generator=generator)
    rows = VOCABULARY // group.size()
    first = group.rank() * rows
    weight_VH = whole_VH[first : first + rows].clone().requires_grad_()
    losses_T = output_losses(hidden_TH, weight_VH, labels_T, first_entry=first, tp_group=group, keep_logits=keep_logits, block_bytes=1)
    losses_T.backward(gradient_T)
    hidden_gradient_TH = hidden_TH.grad.float()
    torch.distributed.all_reduce(hidden_gradient_TH, group=group)
    return {"losses": losses_T.tolist(), "hidden": hidden_gradient_TH.flatten().tolist(), "weight": weight_VH.grad.float().flatten().tolist()}


@pytest.mark.parametrize(("dtype", "keep_logits", "tolerance"), [("float32", True, 1e-6), ("bfloat16", True, 1e-2), ("bfloat16", False, 1e-2)])
def test_a_vocabulary_spread_over_ranks_gives_the_same(ranks: RankPool, dtype: str, keep_logits: bool, tolerance: float) -> None:
    (alone,) = ranks.run(1, shared_vocabulary, dtype, keep_logits)
    for world_size in (2, 4):
        answers = ranks.run(world_size, shared_vocabulary, dtype, keep_logits)
        for answer in answers:
            assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-6)
            assert answer["hidden"] == pytest.approx(alone["hidden"], rel=tolerance, abs=tolerance)
        assert sum((answer["weight"] for answer in answers), []) == pytest.approx(alone["weight"], rel=tolerance, abs=tolerance)


def both_ways(settings: dict[str, Any], sequence_parallel: bool) -> dict[str, Any]:
    """How far losses, and each parameter's gradient, are from megatron-core's loss of this model's logits; and how often the output layer's hooks ran."""
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.model.build import build_chunks
    from megatron_skywork.model.transformer_config import transformer_config

    config = Config(**settings)
    parallel.start(config)
    transformer = dataclasses.replace(transformer_config(config, "torch"), sequence_parallel=sequence_parallel)
    (chunk,) = build_chunks(config, transformer)
    generator = torch.Generator().manual_seed(5)
    tokens_BS, labels_BS = (torch.randint(config.model.vocab_size, (3, config.data.seq_length), generator=generator) for _ in range(2))
    positions_BS, gradient_BS = torch.arange(config.data.seq_length).expand(3, -1), torch.randn(tokens_BS.shape, generator=generator)
    # Every number of the router's losses would be in both gradients; without them there is less to hide a difference.
    calls: list[str] = []
    chunk.output_layer.register_forward_pre_hook(lambda module, inputs: calls.append("called"))

    def gradients(losses_BS: torch.Tensor) -> dict[str, torch.Tensor]:
        chunk.zero_grad()
        losses_BS.backward(gradient_BS)
        return {name: parameter.grad.float() for name, parameter in chunk.named_parameters()}

    logits_BSV = chunk(tokens_BS, positions_BS, None)
    assert logits_BSV.shape == (*tokens_BS.shape, config.model.padded_vocab_size // config.parallel.tp)
    expected_BS = chunk.compute_language_model_loss(labels_BS, logits_BSV.transpose(0, 1).contiguous())
    expected = gradients(expected_BS)
    calls.clear()
    found_BS = chunk(tokens_BS, positions_BS, None, labels=labels_BS)
    found = gradients(found_BS)
    with torch.no_grad():
        without_backward_BS = chunk(tokens_BS, positions_BS, None, labels=labels_BS)
    return {
        "losses": float(((found_BS - expected_BS).abs() / expected_BS).max()),
        "evaluated": torch.equal(without_backward_BS, found_BS),
        "gradients": {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected},
        "calls": len(calls),
    }


DENSE = {"moe": None}
MODELS = {
    "tp1": (1, {}, True),
    "tp1 tied": (1, {"model": {"tie_embeddings": True}}, True),
    "tp2": (2, {}, True),
    "tp4 tied": (4, {"model": {"tie_embeddings": True}}, True),
    "tp2 without sequence parallelism": (2, DENSE, False),
    "tp4 without sequence parallelism, tied": (4, merged(DENSE, {"model": {"tie_embeddings": True}}), False),
    "tp2 bf16": (2, {"train": {"precision": "bf16"}}, True),
    "tp2 bf16, logits computed again": (2, {"train": {"precision": "bf16", "keep_logits": False}}, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_losses_and_gradients_of_its_own_logits(ranks: RankPool, name: str) -> None:
    world_size, more, sequence_parallel = MODELS[name]
    settings = merged(BASE, {"parallel": {"tp": world_size}, "moe": {"aux_loss": "none"}}, more)
    tolerance = 2e-2 if "bf16" in name else 1e-5
    for answer in ranks.run(world_size, both_ways, settings, sequence_parallel and world_size > 1):
        assert answer["losses"] < 1e-6 and answer["evaluated"]
        assert len(answer["gradients"]) > 10 and max(answer["gradients"].values()) < tolerance, answer["gradients"]
        assert answer["calls"] == 2, "weights are gathered in the output layer's hooks; the loss must go through its forward"


SEQUENCE, LARGE_VOCABULARY = 256, 16384


def largest_fp32(settings: dict[str, Any]) -> int:
    """Elements of the largest fp32 tensor that a forward and backward pass of the model makes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.model.build import build_chunks

    config = Config(**settings)
    parallel.start(config)
    (chunk,) = build_chunks(config)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    largest = max(largest, tensor.numel())
            return result

    tokens_BS = torch.arange(SEQUENCE)[None]
    with Watch():
        chunk(tokens_BS, tokens_BS, None, labels=tokens_BS).sum().backward()
    return largest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_logits_are_never_in_fp32(ranks: RankPool, precision: str) -> None:
    settings = merged(BASE, {"model": {"vocab_size": LARGE_VOCABULARY}, "data": {"seq_length": SEQUENCE}, "train": {"precision": precision}})
    (largest,) = ranks.run(1, largest_fp32, settings)
    assert largest < SEQUENCE * LARGE_VOCABULARY
    (largest,) = ranks.run(1, largest_fp32, merged(settings, {"megatron": {"cross_entropy_loss_fusion": True}}))
    assert largest == SEQUENCE * LARGE_VOCABULARY, "megatron-core's own loss, asked for, makes them"
