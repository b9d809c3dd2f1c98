"""Reads megatron-core's distributed checkpoints (`torch_dist`) box by box, whatever layout wrote them, without megatron-core and without process groups.

Only the weights are ever handed out; optimizer state in a training checkpoint is left alone. `streaming.mcore_target` writes such checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_skywork.convert.files.marker import check_marker
from megatron_skywork.convert.files.read_bytes import read_part, read_tensor
from megatron_skywork.convert.files.tensors import TensorInfo
from megatron_skywork.convert.files.torch_record import around
from megatron_skywork.convert.layouts import Shape, numel
from megatron_skywork.convert.safety.safe_archive import read_object
from megatron_skywork.convert.safety.safe_pickle import METADATA, read_metadata
from megatron_skywork.convert.table import OUR_STATE_SUFFIXES, OUR_WEIGHT_PREFIXES
from megatron_skywork.errors import CheckpointError

# What torch.save writes around a tensor's numbers is a few thousand bytes.
_RECORD_BYTES = 1 << 20



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
        """A box of the tensor `key` (all of it by default), assembled from every stored box that overlaps with it. From any thread."""
        if key not in self.tensors:
            raise CheckpointError(f"{self.folder}: no tensor {key}")
        info = self.tensors[key]
        offset = offset or (0,) * len(info.shape)
        shape = info.shape if shape is None else shape
        for chunk, place in self._boxes[key]:
            if tuple(chunk.offsets) == tuple(offset) and tuple(chunk.sizes) == tuple(shape):
                return self._load(key, chunk, place, info.dtype)
        return self._assemble(key, info, offset, shape)

    def _assemble(self, key: str, info: TensorInfo, offset: Shape, shape: Shape) -> torch.Tensor:
        result = torch.empty(shape, dtype=info.dtype)
        covered = 0
        for chunk, place in self._boxes[key]:
            low = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(b <= a for a, b in zip(low, high, strict=True)):
                continue
            stored = self._load_again(key, chunk, place, info.dtype)
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = stored[
                tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            ]
            covered += numel(tuple(b - a for a, b in zip(low, high, strict=True)))
        if covered != numel(shape):
            raise CheckpointError(f"{self.folder}: stored boxes of {key} cover {covered} of {numel(shape)} elements at {offset}; the checkpoint is damaged")
        return result

    def _load_again(self, key: str, chunk: ChunkStorageMetadata, place: _StorageInfo, dtype: torch.dtype) -> torch.Tensor:
        """As `_load`. Neighbouring reads often want the same stored box (an embedding written by one rank, read in slices): the last one is kept."""
        cached = self._cached
        if cached is None or cached[0] is not place:
            cached = self._cached = (place, self._load(key, chunk, place, dtype))
        return cached[1]

    def _load(self, key: str, chunk: ChunkStorageMetadata, place: _StorageInfo, dtype: torch.dtype) -> torch.Tensor:
        path, shape = self.folder / place.relative_path, tuple(chunk.sizes)
        # What torch of this version wrote is known to the byte, so that the numbers can be read without unpickling anything.
        before, after = around(shape, dtype)
        size = numel(shape) * dtype.itemsize
        if place.length == len(before) + size + len(after) and read_part(path, place.offset, len(before)) == before:
            return read_tensor(path, place.offset + len(before), shape, dtype)
        stored = read_object(path, place.offset, place.length)
        if not isinstance(stored, torch.Tensor) or tuple(stored.shape) != shape or stored.dtype != dtype:
            raise CheckpointError(f"{path}: {key} at {tuple(chunk.offsets)} is not the tensor its index describes; the file is damaged")
        return stored
