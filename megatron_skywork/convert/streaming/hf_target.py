"""Hugging Face's safetensors shards as a target: 8 bytes of length, a JSON header, the tensors one after another; an index where there are several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.convert.files.hf_files import SAFETENSORS_DTYPES
from megatron_skywork.convert.files.torch_record import raw_bytes
from megatron_skywork.convert.layouts import Piece, numel
from megatron_skywork.convert.streaming.targets import PlannedFile
from megatron_skywork.convert.streaming.units import Unit, into_files

SHARD_BYTES = 4 << 30
_NAMES_OF_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class HfTarget:
    """Shards of the given units, whose weights have the names of the family to write.

    Args:
        clusters: from `units.units_of`.
        shard_bytes: about the size of a shard.
    """

    def __init__(self, clusters: Iterable[list[Unit]], shard_bytes: int = SHARD_BYTES):
        # The padding of a vocabulary is ours alone, and would be a shard of its own behind a full one.
        held = ([unit for unit in cluster if any(piece.parts for piece in unit.pieces)] for cluster in clusters)
        shards = into_files([cluster for cluster in held if cluster], shard_bytes)
        names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        self.files = [self._plan(name, units) for name, units in zip(names, shards, strict=True)]

    def _plan(self, name: str, units: Sequence[Unit]) -> PlannedFile:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for unit in units:
            for piece in unit.pieces:
                for index in piece.parts:
                    shape = unit.weight.layout.parts[index]
                    end = at + numel(shape) * unit.dtype.itemsize
                    header[unit.weight.theirs[index]] = {"dtype": _NAMES_OF_DTYPES[unit.dtype], "shape": list(shape), "data_offsets": [at, end]}
                    self._weight_map[unit.weight.theirs[index]] = name
                    at = end
        self._total_bytes += at
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return PlannedFile(name, head, units, len(head) + at)

    def encode(self, unit: Unit, piece: Piece, parts: Sequence[torch.Tensor]) -> Iterator[Any]:
        """As `targets.Target`: the numbers of each part."""
        return (raw_bytes(part) for part in parts)

    def finish(self, folder: Path) -> Mapping[str, str]:
        """Write the index, where there is more than one shard."""
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return {}
