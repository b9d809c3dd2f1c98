"""Names of parameters for people: layers are counted over the whole model, from 0, as in checkpoints, and not from the first layer of a pipeline stage."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from megatron_skywork.model.build import unwrap

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def named_parameters(chunks: Iterable[Any]) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of this rank's chunks, in model order."""
    found = []
    for chunk in map(unwrap, chunks):
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        found += [(_counted_over_all(name, numbers), parameter) for name, parameter in chunk.named_parameters()]
    return found


def _counted_over_all(name: str, numbers: list[int]) -> str:
    """The name with the number that its layer has in the model; `numbers` gives it for each layer of the chunk."""
    return _LAYER.sub(lambda match: f"decoder.layers.{numbers[int(match[1])]}.", name)


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter belongs to an expert, and so to the expert-parallel layout."""
    return not getattr(parameter, "allreduce", True)
