"""megatron-core's distributed checkpoint (`torch_dist`) as a target, written without megatron-core and without process groups.

What is written is what `dist_checkpointing.save` writes: tensors as torch.save records one after another in `__0_I.distcp` files, their places in the pickled
`.metadata`, `metadata.json` and `common.pt` beside them. A box (chunk) may be any part of a tensor; whoever loads, under any layout, reads the boxes that
overlap with what it wants. So the cut of the boxes decides only how much a rank reads beside what it needs (`Cut`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_skywork.convert.files.torch_record import around, raw_bytes, record
from megatron_skywork.convert.layouts import Piece, Shape, numel
from megatron_skywork.convert.safety.safe_pickle import BACKEND, COMMON, METADATA
from megatron_skywork.convert.streaming.targets import PlannedFile
from megatron_skywork.convert.streaming.units import Unit, into_files
from megatron_skywork.convert.table import Weight

# 0.16 needs all four entries; 0.19 drops the two it no longer knows.
BACKEND_CONTENT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
FILE_BYTES = 4 << 30
# How a box is cut further: (axis of the box, number of equal parts), or None to leave it whole.
Cut = Callable[[Weight], tuple[int, int] | None]


class McoreTarget:
    """A distributed checkpoint of the given units.

    Args:
        clusters: from `units.units_of`.
        objects: keys of the empty objects that a model asks for (`table.extra_states`).
        file_bytes: about the size of a file.
        cut: see `Cut`.
    """

    def __init__(self, clusters: Iterable[list[Unit]], objects: Iterable[str] = (), file_bytes: int = FILE_BYTES, cut: Cut = lambda weight: None):
        self._cut = cut
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self.files = [self._plan(f"__0_{number}.distcp", units) for number, units in enumerate(into_files(clusters, file_bytes))]
        objects = list(objects)
        if objects:
            self.files.append(self._plan_objects(f"__0_{len(self.files)}.distcp", objects))
        for key, entry in self._entries.items():
            if isinstance(entry, TensorStorageMetadata) and sum(numel(chunk.sizes) for chunk in entry.chunks) != numel(entry.size):
                raise ValueError(f"{key}: its boxes do not cover its shape {tuple(entry.size)}")

    def _plan(self, name: str, units: Sequence[Unit]) -> PlannedFile:
        at = 0
        for unit in units:
            key = unit.weight.ours
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = TensorStorageMetadata(TensorProperties(dtype=unit.dtype), torch.Size(unit.weight.layout.whole), [])
            assert isinstance(entry, TensorStorageMetadata)
            for piece in unit.pieces:
                for offset, shape in self._boxes(unit.weight, piece):
                    before, after = around(shape, unit.dtype)
                    length = len(before) + numel(shape) * unit.dtype.itemsize + len(after)
                    entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
                    self._places[MetadataIndex(key, torch.Size(offset))] = _StorageInfo(name, at, length)
                    at += length
        return PlannedFile(name, b"", units, at)

    def _plan_objects(self, name: str, keys: Sequence[str]) -> PlannedFile:
        empty = record([None])
        for number, key in enumerate(keys):
            self._entries[key] = BytesStorageMetadata()
            self._places[MetadataIndex(key)] = _StorageInfo(name, number * len(empty), len(empty))
        return PlannedFile(name, empty * len(keys), (), len(empty) * len(keys))

    def _boxes(self, weight: Weight, piece: Piece) -> Iterator[tuple[Shape, Shape]]:
        """Offset and shape of what one piece is cut into."""
        axis, count = self._cut(weight) or (0, 1)
        if piece.shape[axis] % count:
            count = 1
        length = piece.shape[axis] // count
        shape = (*piece.shape[:axis], length, *piece.shape[axis + 1 :])
        for number in range(count):
            yield (*piece.offset[:axis], piece.offset[axis] + number * length, *piece.offset[axis + 1 :]), shape

    def encode(self, unit: Unit, piece: Piece, parts: Sequence[torch.Tensor]) -> Iterator[Any]:
        """As `targets.Target`: torch's record around the numbers of each box."""
        block = unit.weight.layout.pack(piece, parts).to(unit.dtype)  # the padding of a vocabulary has no dtype of its own
        for offset, shape in self._boxes(unit.weight, piece):
            before, after = around(shape, block.dtype)
            yield before
            yield raw_bytes(block[tuple(slice(a - b, a - b + n) for a, b, n in zip(offset, piece.offset, shape, strict=True))])
            yield after

    def finish(self, folder: Path) -> Mapping[str, str]:
        """Write the index. The folder is loadable after this; its completion marker is the caller's."""
        index = Metadata(self._entries, None, self._places, StorageMeta(), CURRENT_DCP_VERSION)
        content = {METADATA: pickle.dumps(index), COMMON: record({}), BACKEND: json.dumps(BACKEND_CONTENT).encode()}
        for name, text in content.items():
            with open(folder / name, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        return {name: hashlib.sha256(text).hexdigest() for name, text in content.items()}
