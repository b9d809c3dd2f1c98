"""The content of a checkpoint as megatron-core takes it: sharded weights, optimizer and random states, under names that say nothing of the layout."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_skywork import device, parallel
from megatron_skywork.errors import CheckpointError
from megatron_skywork.model.build import unwrap
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import MEANS_NAME
from megatron_skywork.moe.router_state import find_routers
from megatron_skywork.moe.routing_probe import RoutingProbe

# `non_homogeneous_layers`: one key per layer, so that a layer's key does not depend on how layers are spread over stages.
LAYOUT_FREE = {"non_homogeneous_layers": True, "singleton_local_shards": False}
OPTIMIZER_LAYOUT = {**LAYOUT_FREE, "chained_optim_avoid_prefix": True, "distrib_optim_sharding_type": "fully_reshardable"}

# Keys of weights begin with these; what ends so is state of a module, and a model may be without it.
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")
NOT_WEIGHTS = ("_extra_state", COEFFICIENT_NAME, MEANS_NAME)


def sharded_weights(chunks: list[Any]) -> dict[str, Any]:
    """`model` or `model0`, `model1`, ...: the sharded weights of each chunk of this rank."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: unwrap(chunk).sharded_state_dict(metadata=dict(LAYOUT_FREE)) for name, chunk in zip(names, chunks, strict=True)}


def merged(weights: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer looks weights up in: megatron-core wants the chunks as they are named when there are several."""
    return weights.get("model", weights)


def put_weights(chunks: list[Any], content: dict[str, Any], absent: tuple[str, ...] = ()) -> None:
    """Give the chunks their tensors; only names that end as one of `absent` may be missing, and then keep what they have.

    Raises:
        CheckpointError: something else is missing, or has no place.
    """
    for number, chunk in enumerate(chunks):
        tensors = content["model" if len(chunks) == 1 else f"model{number}"]
        outcome = unwrap(chunk).load_state_dict(tensors, strict=not absent)
        missing = [key for key in outcome.missing_keys if not key.endswith(absent)]
        if missing or outcome.unexpected_keys:
            raise CheckpointError(f"weights do not fit the model: missing {missing}, unexpected {outcome.unexpected_keys}")


def rank_states(chunks: list[Any]) -> dict[str, Any]:
    """What is this rank's own, under its place in the layout: random states (Python's, NumPy's, torch's with the GPU's, and megatron-core's for tensor, data
    and expert parallelism), and where its routers sent the probe of the last evaluation.
    """
    states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": device.rng_state(),
        "tracker": {name: state.clone() for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }
    probes = [None if router.probe is None else router.probe.memory() for router in find_routers(chunks)]
    return {"rng": _of_this_rank("rng", states), "probes": _of_this_rank("probe", probes)}


def _of_this_rank(name: str, value: Any) -> ShardedObject:
    """The key names every coordinate, so that a state can only come back to the place it was saved at, however ranks are numbered."""
    place = parallel.coordinates()
    key = f"{name}/" + "-".join(f"{axis}{getattr(place, axis)}" for axis in ("tp", "cp", "dp", "pp", "etp", "ep"))
    return ShardedObject(key, value, (1,), (0,), replica_id=0)


def restore_probes(chunks: list[Any], memories: list[torch.Tensor | None]) -> None:
    """Let the next evaluation compare with the last one before the checkpoint."""
    for router, memory in zip(find_routers(chunks), memories, strict=True):
        router.probe = None if memory is None else RoutingProbe(memory.to(device.current()))


def restore_rng(states: dict[str, Any]) -> None:
    """Inverse of `rank_states` for the random states."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    device.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
