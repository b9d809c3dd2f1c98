"""Hugging Face weight folders, tensor by tensor: safetensors (one file, or shards with an index) and `.bin` shards; and a streaming safetensors writer.

Reading executes nothing: safetensors has no code in it, and `.bin` files go through torch's `weights_only` reader.
File names in an index stay inside the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_skywork.convert.layouts import Shape, numel
from megatron_skywork.convert.marker import check_link, inside
from megatron_skywork.convert.mcore_files import TensorInfo
from megatron_skywork.convert.safe_archive import load_tensors
from megatron_skywork.convert.shown import first_lines
from megatron_skywork.convert.text_files import json_object
from megatron_skywork.errors import CheckpointError

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES_OF_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
SHARD_BYTES = 4 << 30
_SINGLE = (("model.safetensors", True), ("pytorch_model.bin", False))
_INDEXED = (("model.safetensors.index.json", True), ("pytorch_model.bin.index.json", False))


class HfReader:
    """Names, shapes and dtypes of a folder's tensors at once; their values one by one.

    Raises:
        CheckpointError: no weights, a missing or damaged shard, an index that disagrees with its shards; every one is listed.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder; give a Hugging Face model folder with config.json and weights")
        self.files, listed, self._safe = self._find()
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        problems: list[str] = []
        for path in self.files:
            if not path.is_file():
                problems.append(f"{path.name}: named by the index, and missing")
                continue
            try:
                self._list(path, problems)
            except CheckpointError as error:
                problems.append(str(error))
        if not problems and listed is not None:
            problems += [f"{name}: in the index for {path.name}, and not in that file" for name, path in listed.items() if self._file_of.get(name) != path]
            problems += [f"{name}: in {self._file_of[name].name}, and not in the index" for name in self.tensors if name not in listed]
        if problems:
            raise CheckpointError(f"{self.folder}: the weights are incomplete or damaged:\n" + "\n".join("  " + line for line in first_lines(problems)))

    def _find(self) -> tuple[list[Path], dict[str, Path] | None, bool]:
        for name, safe in _INDEXED[:1] + _SINGLE[:1] + _INDEXED[1:] + _SINGLE[1:]:
            path = self.folder / name
            if not path.is_file():
                continue
            check_link(self.folder, path)
            if not name.endswith(".json"):
                return [path], None, safe
            content = read_json(path)
            weight_map = content.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{path}: has no weight_map")
            listed = {key: inside(self.folder, value, name) for key, value in weight_map.items()}
            return sorted(set(listed.values())), listed, safe
        raise CheckpointError(f"{self.folder}: no weights; looked for {', '.join(name for name, _ in _SINGLE + _INDEXED)}")

    def _list(self, path: Path, problems: list[str]) -> None:
        handle = self._handle(path)
        for name in handle.keys():  # noqa: SIM118  a safetensors handle is not iterable
            if name in self.tensors:
                problems.append(f"{name}: both in {self._file_of[name].name} and in {path.name}")
            if self._safe:
                part = handle.get_slice(name)
                if part.get_dtype() not in SAFETENSORS_DTYPES:
                    problems.append(f"{name}: dtype {part.get_dtype()} is not supported")
                    continue
                info = TensorInfo(tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()])
            elif isinstance(handle[name], torch.Tensor):
                info = TensorInfo(tuple(handle[name].shape), handle[name].dtype)
            else:
                problems.append(f"{name}: in {path.name}, and not a tensor")
                continue
            self.tensors[name] = info
            self._file_of[name] = path

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            if not self._safe:
                self._open.clear()  # a .bin shard is mapped as a whole; one at a time is enough
            self._open[path] = _open_safetensors(path) if self._safe else load_tensors(path)
        return self._open[path]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        handle = self._handle(path)
        try:
            return handle.get_tensor(name) if self._safe else handle[name]
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: not a sound safetensors file ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    return json_object(path)


class HfWriter:
    """Writes safetensors shards in the order given, each tensor as soon as it is there.

    Args:
        folder: existing folder the files go to.
        plan: (name, shape, dtype) of every tensor, in the order in which `add` will bring them. The headers are made from it.
        shard_bytes: a new shard is begun before a tensor that would take a shard beyond this.
        progress: called with the number of bytes after each write.
    """

    def __init__(
        self, folder: Path, plan: Iterable[tuple[str, Shape, torch.dtype]], shard_bytes: int = SHARD_BYTES, progress: Callable[[int], None] | None = None
    ):
        self.folder = folder
        self._progress = progress or (lambda count: None)
        self._shards: list[list[tuple[str, Shape, torch.dtype]]] = [[]]
        self._total = filled = 0
        for name, shape, dtype in plan:
            size = numel(shape) * dtype.itemsize
            if self._shards[-1] and filled + size > shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append((name, shape, dtype))
            filled += size
            self._total += size
        count = len(self._shards)
        self.names = ["model.safetensors"] if count == 1 else [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        self._current = -1
        self._queue: list[tuple[str, Shape, torch.dtype]] = []
        self._file: Any = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of the plan."""
        if not self._queue:
            self._next_shard()
        expected, shape, dtype = self._queue.pop(0)
        if (expected, shape, dtype) != (name, tuple(tensor.shape), tensor.dtype):
            raise ValueError(f"the plan has {expected} {shape} {dtype} here, not {name} {tuple(tensor.shape)} {tensor.dtype}")
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        self._file.write(content.data)
        self._progress(content.nbytes)

    def _next_shard(self) -> None:
        self._close()
        self._current += 1
        self._queue = list(self._shards[self._current])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, shape, dtype in self._queue:
            end = start + numel(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES_OF_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self.folder / self.names[self._current], "wb")  # noqa: SIM115  it stays open from tensor to tensor
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Close the last shard and write the index, if there is more than one shard."""
        if self._queue or self._current + 1 != len(self._shards):
            raise ValueError("not every tensor of the plan was written")
        self._close()
        if len(self.names) > 1:
            weight_map = {name: file for file, shard in zip(self.names, self._shards, strict=True) for name, _, _ in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
