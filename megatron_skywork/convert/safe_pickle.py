"""Reads the pickled index of a distributed checkpoint (`.metadata`) without being able to run anything.

A pickle can name any function to call. This reader resolves a fixed list of classes, all of them plain records of torch.distributed.checkpoint, and refuses
every other name before it is imported. megatron-core reads the same file with an unrestricted `pickle.load`: `check_metadata` is what stands before it.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_skywork.convert.marker import inside
from megatron_skywork.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"
BACKEND = "metadata.json"
_ENUMS: tuple[type[Enum], ...] = (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType, planner.LoadItemType)
_RECORDS: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta",
        "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "LoadItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
}  # fmt: skip
# What saved random states are made of; arrays of numbers, nothing that can act.
_ARRAYS: list[Any] = [
    numpy.zeros(1).__reduce__()[0], numpy.ndarray, numpy.dtype, type(numpy.dtype("uint32")), type(numpy.dtype("int64")), type(numpy.dtype("float64")),
]  # fmt: skip
_MODULES = {module.__name__: module for module in (metadata, planner, filesystem)}


class _Path(str):
    """Stands for a pathlib path, which megatron-core may have stored as the checkpoint's name."""

    def __new__(cls, *parts: str) -> _Path:
        return super().__new__(cls, "/".join(str(part) for part in parts))


class _Placeholder:
    """Stands for the empty marker classes that older megatron-core versions stored."""


class RefusedPickle(pickle.UnpicklingError):
    """A pickle named something outside the list."""


def _enum_member(owner: Any, member: Any) -> Enum:
    """The only use of getattr that a pickled enum has (Python 3.11 writes members so)."""
    if owner in _ENUMS and isinstance(member, str) and member in owner.__members__:
        return owner[member]
    raise RefusedPickle(f"getattr({owner!r}, {member!r})")


def _layout(name: Any) -> torch.layout:
    if name == "torch.strided":
        return torch.strided
    raise RefusedPickle(f"tensor layout {name!r}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return getattr(_MODULES[module], name)
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):
            return _enum_member
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath", "Path"):
            return _Path
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in ("MCoreMetadata", "MCoreSavePlan"):
            return _Placeholder
        raise RefusedPickle(f"{module}.{name}")


def read_metadata(folder: Path | str) -> Metadata:
    """The index of a distributed checkpoint, with every file name in it checked.

    Raises:
        CheckpointError: the file is missing or unreadable, names anything but index records, or points outside the folder.
    """
    folder = Path(folder)
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {METADATA}, so this is not a distributed checkpoint")
    try:
        index = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except RefusedPickle as error:
        raise CheckpointError(
            f"{path}: names {error}, which no checkpoint index needs; it was not run. Do not use this checkpoint unless you trust who made it"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything; all of it means the same to the reader
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged") from error
    _check_index(folder, index)
    return index


def _check_index(folder: Path, index: Any) -> None:
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict) or not isinstance(index.storage_data, dict):
        raise CheckpointError(f"{folder / METADATA}: is not the index of a distributed checkpoint")
    names = set()
    for key, info in index.storage_data.items():
        if not isinstance(key, metadata.MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
            raise CheckpointError(f"{folder / METADATA}: holds an entry of an unknown kind ({type(key).__name__}: {type(info).__name__})")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{folder / METADATA}: {key.fqn} is stored with a transformation ({info.transform_descriptors}), which is not supported")
        if not isinstance(info.offset, int) or not isinstance(info.length, int) or info.offset < 0 or info.length < 0:
            raise CheckpointError(f"{folder / METADATA}: {key.fqn} lies at offset {info.offset!r}, length {info.length!r}")
        names.add(info.relative_path)
    for name in names:
        inside(folder, name, METADATA)
    for key, kind in index.state_dict_metadata.items():
        if not isinstance(kind, (TensorStorageMetadata, BytesStorageMetadata)):
            raise CheckpointError(f"{folder / METADATA}: {key} is of an unknown kind ({type(kind).__name__})")


def read_object(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """An object written by torch.save, at an offset of a file, read with `weights_only`."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read() if length is None else file.read(length)
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: holds more than plain data, so it was not loaded ({reason})") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged") from error


def check_metadata(folder: Path | str) -> Metadata:
    """Make sure that megatron-core's unrestricted loads of this folder run nothing: its index, its `common.pt`, and every pickled object in its files.

    Returns:
        The index, for those who want to read on.

    Raises:
        CheckpointError: as `read_metadata`; or an object holds more than plain data.
    """
    folder = Path(folder)
    try:
        backend = json.loads((folder / BACKEND).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {BACKEND}, so this is not a distributed checkpoint of megatron-core") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / BACKEND}: is not JSON ({error})") from error
    if not isinstance(backend, dict) or backend.get("sharded_backend") != "torch_dist":
        raise CheckpointError(f"{folder / BACKEND}: sharded_backend is {backend!r}; only torch_dist is supported")
    index = read_metadata(folder)
    if (folder / COMMON).exists():
        read_object(folder / COMMON)
    for key, info in index.storage_data.items():
        if isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            read_object(folder / info.relative_path, info.offset, info.length)
    return index
