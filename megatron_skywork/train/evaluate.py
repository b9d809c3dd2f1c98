"""What an evaluation says: the mean loss of every validation set, each of its samples counted exactly once over all ranks, and how the experts are doing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_skywork import device, parallel
from megatron_skywork.config.schema import Config
from megatron_skywork.metrics.record import MetricBuffer
from megatron_skywork.model.build import parameters_gathered
from megatron_skywork.moe.expert_similarity import expert_similarity
from megatron_skywork.moe.routing_probe import RoutingProbe, changed_shares
from megatron_skywork.train.step import Batch, run_schedule


@torch.no_grad()
def evaluate(config: Config, chunks: list[Any], loaders: Mapping[str, Iterable[Batch]]) -> dict[str, Any]:
    """The evaluation's part of a metrics record, the same on every rank. The model is left in training mode.

    Args:
        loaders: named validation sets, at least one; the first micro-batch of the first is what routers are compared on, and must not change.

    Returns:
        `losses`, and `router` where there are experts and metrics.router is set.
    """
    buffer = MetricBuffer(device.current())
    moe_layers = find_moe_layers(chunks)
    observed = moe_layers if config.metrics.router else []
    for layer in observed:
        layer.router.probe = layer.router.probe or RoutingProbe()
        layer.router.probe.listen()
    with parameters_gathered(chunks), _evaluating(chunks), evaluation_capacity(config, moe_layers):
        for name, loader in loaders.items():
            buffer.declare(name, "mean")
            loss_sum, num_tokens = run_schedule(config, chunks, _padded(config, list(loader)), forward_only=True)
            if loss_sum is not None and num_tokens is not None:
                buffer.add(name, loss_sum / num_tokens.clamp(min=1), "mean", weight=num_tokens)
        similarities = [float(expert_similarity(layer.experts)) for layer in observed]
    record: dict[str, Any] = {"losses": buffer.reduce()}
    if config.moe is not None and config.metrics.router:
        record["router"] = _router_part(observed, similarities)
    return record


def find_moe_layers(chunks: Iterable[torch.nn.Module]) -> list[MoELayer]:
    """The MoE layers of this rank, in model order, however deep they are wrapped."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]


@contextlib.contextmanager
def evaluation_capacity(config: Config, moe_layers: Sequence[MoELayer]) -> Iterator[None]:
    """Inside, dispatchers expect what routers in evaluation mode give them: nothing padded, and dropped only by moe.eval_capacity_factor.

    megatron-core's dispatcher decides by the training settings: padding fixes its shapes at the capacity, and a missing capacity factor makes it
    expect every token top-k times. What it leaves behind would be read by the padded path (split sizes) or slow training down (an earlier wait for
    the device), so that is put back too.
    """
    with contextlib.ExitStack() as stack:
        for dispatcher in [layer.token_dispatcher for layer in moe_layers]:
            assert config.moe is not None
            stack.enter_context(_set_for_now(dispatcher.config, moe_expert_capacity_factor=config.moe.eval_capacity_factor))
            if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
                no_splits = {"input_splits": None, "output_splits": None, "output_splits_tp": None}
                stack.enter_context(_set_for_now(dispatcher, drop_and_pad=False, cuda_sync_point=dispatcher.cuda_sync_point, **no_splits))
        yield


@contextlib.contextmanager
def _set_for_now(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(before)


@contextlib.contextmanager
def _evaluating(chunks: list[Any]) -> Iterator[None]:
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()


def _router_part(moe_layers: Sequence[MoELayer], similarities: Sequence[float]) -> dict[str, list[Any]]:
    """What there is to say of every MoE layer of the model, from all pipeline stages: lists of one entry per layer."""
    numbers = [int(layer.router.layer_number) for layer in moe_layers]
    rows = list(zip(numbers, changed_shares([layer.router.probe for layer in moe_layers], parallel.token_group()), similarities, strict=True))
    stages = parallel_state.get_pipeline_model_parallel_group()
    if stages.size() > 1:
        gathered: list[Any] = [None] * stages.size()
        torch.distributed.all_gather_object(gathered, rows, group=stages)
        rows = [row for stage in gathered for row in stage]
    rows.sort(key=lambda row: row[0])
    return {name: [row[index] for row in rows] for index, name in enumerate(("layers", "changed_experts", "expert_similarity"))}


def _padded(config: Config, batches: list[Batch]) -> list[Batch]:
    """An interleaved pipeline takes micro-batches in groups of its stages; the ones added count for nothing."""
    group = config.parallel.pp if config.parallel.vpp > 1 else 1
    filler = {**batches[0], "loss_mask": torch.zeros_like(batches[0]["loss_mask"])}
    return batches + [filler] * (-len(batches) % group)
