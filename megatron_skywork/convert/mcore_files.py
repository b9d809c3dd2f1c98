"""megatron-core's distributed checkpoints (`torch_dist`), written and read box by box in one process, without megatron-core and without process groups.

What is written is what `dist_checkpointing.save` writes: tensors as torch.save records one after another in `__0_I.distcp` files, their places in
the pickled `.metadata`, `metadata.json` and `common.pt` beside them. A box (chunk) may be any part of a tensor; whoever loads, under any layout, reads
the boxes that overlap with what it wants. Only the weights are ever handed out; optimizer state in a training checkpoint is left alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
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

from megatron_skywork.convert.layouts import Shape, numel
from megatron_skywork.convert.marker import check_marker
from megatron_skywork.convert.safe_pickle import BACKEND, COMMON, METADATA, read_metadata, read_object
from megatron_skywork.convert.table import OUR_STATE_SUFFIXES, OUR_WEIGHT_PREFIXES
from megatron_skywork.errors import CheckpointError

# 0.16 needs all four entries; 0.19 drops the two it no longer knows.
BACKEND_CONTENT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
FILE_BYTES = 4 << 30
# What torch.save writes around a tensor's numbers is a few thousand bytes.
_RECORD_BYTES = 1 << 20


class DistributedWriter:
    """Writes a distributed checkpoint into an existing folder. Boxes of a tensor may come in any order; each box is written when it is given.

    Args:
        folder: where the files go; must not hold a checkpoint.
        progress: called with the number of bytes after each write.
        file_bytes: a new file is begun after this many bytes.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] | None = None, file_bytes: int = FILE_BYTES):
        self.folder = folder
        self.sha256: dict[str, str] = {}
        self._progress = progress or (lambda count: None)
        self._file_bytes = file_bytes
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._last: tuple[torch.Tensor, bytes] | None = None

    def add(self, key: str, whole: Shape, offset: Shape, block: torch.Tensor) -> None:
        """Write one box of the tensor `key` of shape `whole`; `block` has the tensor's rank. The same block given twice in a row is serialized once."""
        if self._last is None or self._last[0] is not block:
            self._last = (block, _serialize(block))
        entry = self._entries.get(key)
        if entry is None:
            entry = TensorStorageMetadata(TensorProperties(dtype=block.dtype), torch.Size(whole), [])
            self._entries[key] = entry
        if not isinstance(entry, TensorStorageMetadata) or entry.size != torch.Size(whole) or entry.properties.dtype != block.dtype:
            raise ValueError(f"{key}: a box of shape {tuple(whole)} and {block.dtype} does not fit the boxes written before")
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(block.shape)))
        self._append(MetadataIndex(key, torch.Size(offset)), self._last[1])

    def add_empty_object(self, key: str) -> None:
        """Write an object without content, for the `_extra_state` keys that a model asks for."""
        self._entries[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), _serialize([None]))

    def _append(self, index: MetadataIndex, content: bytes) -> None:
        if self._file is not None and self._file.tell() + len(content) > self._file_bytes:
            self._close_file()
        if self._file is None:
            self._digest = hashlib.sha256()
            self._file = open(self.folder / f"__0_{len(self.sha256)}.distcp", "wb")  # noqa: SIM115  it stays open from box to box
        self._places[index] = _StorageInfo(os.path.basename(self._file.name), self._file.tell(), len(content))
        self._file.write(content)
        self._digest.update(content)
        self._progress(len(content))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.sha256[os.path.basename(self._file.name)] = self._digest.hexdigest()
            self._file = None

    def finish(self) -> None:
        """Write the index. The folder is loadable after this; its completion marker is the caller's."""
        self._last = None
        self._close_file()
        for key, entry in self._entries.items():
            if isinstance(entry, TensorStorageMetadata) and sum(numel(chunk.sizes) for chunk in entry.chunks) != numel(entry.size):
                raise ValueError(f"{key}: its boxes do not cover its shape {tuple(entry.size)}")
        index = Metadata(self._entries, None, self._places, StorageMeta(), CURRENT_DCP_VERSION)
        self._write(METADATA, pickle.dumps(index))
        self._write(COMMON, _serialize({}))
        self._write(BACKEND, json.dumps(BACKEND_CONTENT).encode())

    def _write(self, name: str, content: bytes) -> None:
        with open(self.folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.sha256[name] = hashlib.sha256(content).hexdigest()


def _serialize(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # torch.save would write the whole storage that a view belongs to
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: Shape
    dtype: torch.dtype


class DistributedReader:
    """Reads weights from a complete distributed checkpoint, whatever layout wrote it.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or its index names anything but index records.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        check_marker(self.folder)
        index = read_metadata(self.folder)
        self._boxes: dict[str, list[tuple[ChunkStorageMetadata, _StorageInfo]]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.other_keys: list[str] = []
        self._cached: tuple[_StorageInfo, torch.Tensor] | None = None
        missing = sorted({info.relative_path for info in index.storage_data.values() if not (self.folder / info.relative_path).is_file()})
        if missing:
            raise CheckpointError(f"{self.folder}: files named by {METADATA} are missing: {', '.join(missing)}")
        for key, entry in index.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or not key.startswith(OUR_WEIGHT_PREFIXES) or key.endswith(OUR_STATE_SUFFIXES):
                self.other_keys.append(key)
                continue
            self.tensors[key] = TensorInfo(tuple(entry.size), entry.properties.dtype)
            self._boxes[key] = [(chunk, self._place(index, key, chunk)) for chunk in entry.chunks]

    def _place(self, index: Metadata, key: str, chunk: ChunkStorageMetadata) -> _StorageInfo:
        place = index.storage_data.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise CheckpointError(f"{self.folder / METADATA}: no place for {key} at {tuple(chunk.offsets)}; the index is damaged")
        dtype = self.tensors[key].dtype
        if place.length > numel(tuple(chunk.sizes)) * dtype.itemsize + _RECORD_BYTES:
            raise CheckpointError(
                f"{self.folder / METADATA}: the place of {key} at {tuple(chunk.offsets)} has {place.length:,} bytes, many more than the box needs; "
                "the index is damaged"
            )
        return place

    def read(self, key: str, offset: Shape | None = None, shape: Shape | None = None) -> torch.Tensor:
        """A box of the tensor `key` (all of it by default), assembled from every stored box that overlaps with it."""
        if key not in self.tensors:
            raise CheckpointError(f"{self.folder}: no tensor {key}")
        info = self.tensors[key]
        offset = offset or (0,) * len(info.shape)
        shape = info.shape if shape is None else shape
        result = torch.empty(shape, dtype=info.dtype)
        covered = 0
        for chunk, place in self._boxes[key]:
            low = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(b <= a for a, b in zip(low, high, strict=True)):
                continue
            stored = self._load(key, chunk, place, info.dtype)
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = stored[
                tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            ]
            covered += numel(tuple(b - a for a, b in zip(low, high, strict=True)))
        if covered != numel(shape):
            raise CheckpointError(f"{self.folder}: stored boxes of {key} cover {covered} of {numel(shape)} elements at {offset}; the checkpoint is damaged")
        return result

    def _load(self, key: str, chunk: ChunkStorageMetadata, place: _StorageInfo, dtype: torch.dtype) -> torch.Tensor:
        # Neighbouring reads often want the same stored box (an embedding written by one rank, read in slices): the last one is kept.
        if self._cached is not None and self._cached[0] is place:
            return self._cached[1]
        stored = read_object(self.folder / place.relative_path, place.offset, place.length)
        if not isinstance(stored, torch.Tensor) or tuple(stored.shape) != tuple(chunk.sizes) or stored.dtype != dtype:
            raise CheckpointError(
                f"{self.folder / place.relative_path}: {key} at {tuple(chunk.offsets)} is not the tensor its index describes; the file is damaged"
            )
        self._cached = (place, stored)
        return stored
