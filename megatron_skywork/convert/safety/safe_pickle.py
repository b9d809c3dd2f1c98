"""Reads the pickled index of a distributed checkpoint (`.metadata`) without being able to run anything.

A pickle can name any function to call. This reader resolves a fixed list of classes, all of them plain records of torch.distributed.checkpoint, and refuses
every other name before it is imported. megatron-core reads the same file with an unrestricted `pickle.load`: `check_metadata` is what stands before it.

A pickle can also be a bomb (see `pickle_inspector`). So a file is read twice: first by the inspector, then by the fast unpickler, which is the one that
megatron-core uses and the one whose view of the names counts.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_skywork.convert.files.marker import check_link
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.safety.index_rules import check_index
from megatron_skywork.convert.safety.pickle_inspector import Inspector, RefusedPickle, ordered
from megatron_skywork.convert.safety.safe_archive import LARGEST_OBJECT_BYTES, content_of, read_object
from megatron_skywork.convert.safety.shown import reason, shown
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
_MADE = {getattr(module, name) for module in (metadata, planner, filesystem) for name in _RECORDS[module.__name__]}.difference(_ENUMS)
_MODULES = {module.__name__: module for module in (metadata, planner, filesystem)}


class _Path(str):
    """Stands for a pathlib path, which megatron-core may have stored as the checkpoint's name."""

    def __new__(cls, *parts: str) -> _Path:
        if not all(isinstance(part, str) for part in parts):
            raise RefusedPickle("a path that is not made of text")
        return super().__new__(cls, "/".join(parts))


class _Placeholder:
    """Stands for the empty marker classes that older megatron-core versions stored."""


_MADE.add(_Placeholder)


def _enum_member(owner: Any, member: Any) -> Enum:
    """The only use of getattr that a pickled enum has (Python 3.11 writes members so)."""
    if owner in _ENUMS and isinstance(member, str) and member in owner.__members__:
        return owner[member]
    raise RefusedPickle(f"getattr({shown(owner)}, {shown(member)})")


def _layout(name: Any) -> torch.layout:
    if isinstance(name, str) and name == "torch.strided":
        return torch.strided
    raise RefusedPickle(f"tensor layout {shown(name)}")


def _named(module: str, name: str) -> Any:
    """What a name in the pickle stands for; everything else is refused."""
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
        return ordered
    if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath", "Path"):
        return _Path
    if module == "megatron.core.dist_checkpointing.strategies.torch" and name in ("MCoreMetadata", "MCoreSavePlan"):
        return _Placeholder
    raise RefusedPickle(f"{module}.{name}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _named(module, name)


class _Inspector(Inspector):
    """Looks at an index before the fast unpickler does."""

    made = _MADE
    keys = (*Inspector.keys, Enum)

    def find_class(self, module: str, name: str) -> Any:
        return _named(module, name)

    def plain_key(self, key: Any) -> Any:
        return key.fqn if isinstance(key, MetadataIndex) and type(key.offset) in (torch.Size, type(None)) else key


def read_metadata(folder: Path | str) -> Metadata:
    """The index of a distributed checkpoint, with every file name, place and box in it checked (see `index_rules`).

    Raises:
        CheckpointError: the file is missing or unreadable, names anything but index records, points outside the folder, or its boxes do not fit.
    """
    folder = Path(folder)
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {METADATA}, so this is not a distributed checkpoint")
    check_link(folder, path)
    content = content_of(path)
    try:
        _Inspector(content).load()
        index = _Unpickler(io.BytesIO(content)).load()
    except RefusedPickle as error:
        raise CheckpointError(
            f"{path}: names {error}, which no checkpoint index needs; it was not run. Do not use this checkpoint unless you trust who made it"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything; all of it means the same to the reader
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); the file is damaged") from error
    check_index(folder, METADATA, index)
    return index


def check_metadata(folder: Path | str) -> Metadata:
    """Make sure that megatron-core's unrestricted loads of this folder run nothing: its index, its `common.pt`, and every pickled object in its files.

    Returns:
        The index, for those who want to read on.

    Raises:
        CheckpointError: as `read_metadata`; or an object holds more than plain data.
    """
    folder = Path(folder)
    if not (folder / BACKEND).is_file():
        raise CheckpointError(f"{folder}: no {BACKEND}, so this is not a distributed checkpoint of megatron-core")
    backend = json_object(folder / BACKEND)
    if backend.get("sharded_backend") != "torch_dist":
        raise CheckpointError(f"{folder / BACKEND}: sharded_backend is {shown(backend)}; only torch_dist is supported")
    index = read_metadata(folder)
    if (folder / COMMON).exists():
        check_link(folder, folder / COMMON)
        read_object(folder / COMMON)
    for key, info in index.storage_data.items():
        if not isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            continue
        if info.length > LARGEST_OBJECT_BYTES:
            raise CheckpointError(f"{folder / info.relative_path}: {key.fqn} is an object of {info.length:,} bytes; none that is needed is so large")
        read_object(folder / info.relative_path, info.offset, info.length)
    return index
