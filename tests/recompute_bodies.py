"""What ranks do in the tests of recomputation: the gradients of one batch, who computed what how often, and the bytes a forward leaves for backward."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any
from weakref import ReferenceType, ref

import torch
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from training_bodies import merged

from megatron_skywork import parallel
from megatron_skywork.config.load import check_config
from megatron_skywork.config.schema import Config
from megatron_skywork.data.loader import build_train_loader
from megatron_skywork.model.build import build_chunks, wrap_for_training
from megatron_skywork.moe.router_state import find_routers
from megatron_skywork.train.step import connect_schedule, forward_step, run_schedule

Answer = dict[str, Any]


def gradients(settings: dict[str, Any], choices: dict[str, dict[str, Any]]) -> dict[str, Answer]:
    """Forward and backward of the same batch from the same weights under each choice of recomputation."""
    place = parallel.start(Config(**settings))
    return {name: _gradients(Config(**merged(settings, {"parallel": choice})), place) for name, choice in choices.items()}


def _gradients(config: Config, place: parallel.Coordinates) -> Answer:
    check_config(config, place.world_size)
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(place.rank, None, config.train.global_batch_size, config.train.micro_batch_size, place.dp_size)
    parallel.seed_everything(config.train.seed)
    chunks = wrap_for_training(config, build_chunks(config))
    connect_schedule(config, chunks, SimpleNamespace(scale_loss=lambda loss: loss))
    loader = build_train_loader(config, dp_rank=place.dp, dp_size=place.dp_size, consumed_samples=0)
    batches = [next(loader) for _ in range(config.train.global_batch_size // (config.train.micro_batch_size * place.dp_size))]
    forwards: Counter[int] = Counter()
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for layer in _layers(chunk):
            layer.register_forward_pre_hook(lambda layer, _: forwards.update([layer.layer_number]))
    loss_sum, _ = run_schedule(config, chunks, batches, forward_only=False)
    answer = {
        "loss": None if loss_sum is None else loss_sum.item(),
        "gradients": {f"{index} {name}": weight.main_grad.numpy().copy() for index, chunk in enumerate(chunks) for name, weight in chunk.named_parameters()},
        "statistics": [(router.layer_number, router.window.tolist()) for router in find_routers(chunks)],
        "forwards": {layer: count / len(batches) for layer, count in sorted(forwards.items())},
    }
    _take_apart(chunks)
    return answer


def kept_bytes(settings: dict[str, Any], choices: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Bytes that are alive after the forward of one micro-batch and were not before it, under each choice of recomputation."""
    parallel.start(Config(**settings))
    return {name: _kept_bytes(Config(**merged(settings, {"parallel": choice}))) for name, choice in choices.items()}


def _kept_bytes(config: Config) -> int:
    parallel.seed_everything(config.train.seed)
    chunks = wrap_for_training(config, build_chunks(config))
    batch = [next(build_train_loader(config, dp_rank=0, dp_size=1, consumed_samples=0))]
    memory = _NewMemory()
    with memory:
        output, _ = forward_step(iter(batch), chunks[0])
    assert output.requires_grad
    kept = memory.alive()
    _take_apart(chunks)
    return kept


class _NewMemory(TorchDispatchMode):
    """Sees every storage that operations make inside."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, ReferenceType[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage()._cdata for value in _pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        for value in _pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in given:
                self._made[value.untyped_storage()._cdata] = ref(value.untyped_storage())
        return result

    def alive(self) -> int:
        """Bytes of the storages that somebody still holds."""
        return sum(storage.nbytes() for made in self._made.values() if (storage := made()) is not None)


def _layers(chunk: torch.nn.Module) -> list[TransformerLayer]:
    return [module for module in chunk.modules() if isinstance(module, TransformerLayer)]


def _take_apart(chunks: list[torch.nn.Module]) -> None:
    # Hooks on gradients form a cycle through autograd that Python's collector cannot see.
    for module in [module for chunk in chunks for module in chunk.modules()]:
        vars(module).clear()
