"""The content of a checkpoint as megatron-core takes it: sharded weights, optimizer and random states, under names that say nothing of the layout."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_skywork import device
from megatron_skywork.errors import CheckpointError
from megatron_skywork.model.build import unwrap
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import MEANS_NAME

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


def put_weights(chunks: list[Any], content: dict[str, Any], partial: bool = False) -> None:
    for number, chunk in enumerate(chunks):
        tensors = content["model" if len(chunks) == 1 else f"model{number}"]
        outcome = unwrap(chunk).load_state_dict(tensors, strict=not partial)
        if partial:
            missing = [key for key in outcome.missing_keys if not key.endswith(NOT_WEIGHTS)]
            if missing or outcome.unexpected_keys:
                raise CheckpointError(f"weights do not fit the model: missing {missing}, unexpected {outcome.unexpected_keys}")


def random_states() -> dict[str, Any]:
    """This rank's random states, under its own place among the ranks."""
    states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": device.rng_state(),
        "tracker": {name: state.clone() for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {"states": ShardedObject("rng", states, (world,), (rank,), replica_id=0)}


def restore_rng(content: dict[str, Any]) -> None:
    states = content["states"]
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    device.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
