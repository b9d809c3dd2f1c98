"""Reads Hugging Face weight folders tensor by tensor: safetensors (one file, or shards with an index) and `.bin` shards.

Reading executes nothing: safetensors has no code in it, and `.bin` files go through torch's `weights_only` reader.
File names in an index stay inside the folder.
"""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_skywork.convert.files.marker import check_link, inside
from megatron_skywork.convert.files.read_bytes import read_part, read_tensor
from megatron_skywork.convert.files.tensors import TensorInfo
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.safety.safe_archive import load_tensors
from megatron_skywork.convert.safety.shown import first_lines
from megatron_skywork.errors import CheckpointError

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# A mapped .bin shard counts as resident as far as it was read; it is mapped anew after so much.
_MAPPED_BYTES = 1 << 30
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
        self._offset_of: dict[str, int] = {}
        self._mapped: tuple[Path, dict[str, Any]] | None = None
        self._read_bytes = 0
        self._lock = threading.Lock()
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
            content = json_object(path)
            weight_map = content.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{path}: has no weight_map")
            listed = {key: inside(self.folder, value, name) for key, value in weight_map.items()}
            return sorted(set(listed.values())), listed, safe
        raise CheckpointError(f"{self.folder}: no weights; looked for {', '.join(name for name, _ in _SINGLE + _INDEXED)}")

    def _list(self, path: Path, problems: list[str]) -> None:
        if not self._safe:
            self._list_bin(path, problems)
            return
        handle = _open_safetensors(path)
        offsets = _offsets(path)
        for name in handle.keys():  # noqa: SIM118  a safetensors handle is not iterable
            part = handle.get_slice(name)
            if part.get_dtype() not in SAFETENSORS_DTYPES:
                problems.append(f"{name}: dtype {part.get_dtype()} is not supported")
                continue
            self._offset_of[name] = offsets[name]
            self._add(name, TensorInfo(tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()]), path, problems)

    def _list_bin(self, path: Path, problems: list[str]) -> None:
        for name, value in self._bin(path).items():
            if isinstance(value, torch.Tensor):
                self._add(name, TensorInfo(tuple(value.shape), value.dtype), path, problems)
            else:
                problems.append(f"{name}: in {path.name}, and not a tensor")

    def _add(self, name: str, info: TensorInfo, path: Path, problems: list[str]) -> None:
        if name in self.tensors:
            problems.append(f"{name}: both in {self._file_of[name].name} and in {path.name}")
        self.tensors[name] = info
        self._file_of[name] = path

    def _bin(self, path: Path) -> dict[str, Any]:
        """A `.bin` shard, mapped; one at a time is enough."""
        if self._mapped is None or self._mapped[0] != path or self._read_bytes > _MAPPED_BYTES:
            self._mapped, self._read_bytes = (path, load_tensors(path)), 0
        return self._mapped[1]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored; a copy that is the caller's. From any thread."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        info = self.tensors[name]
        if self._safe:
            return read_tensor(path, self._offset_of[name], info.shape, info.dtype)
        with self._lock:
            tensor = self._bin(path)[name].clone(memory_format=torch.contiguous_format)
            self._read_bytes += tensor.nbytes
            return tensor


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins; the file was found sound by its library."""
    length = int.from_bytes(read_part(path, 0, 8), "little")
    header = json.loads(read_part(path, 8, length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path.name}: not a sound safetensors file ({error})") from error
    except RuntimeError as error:  # torch maps the file for its library; what it says has the path and the kernel's reason
        raise OSError(errno.EIO, f"cannot be read ({error})", str(path)) from error
