"""Reads the pickled index of a distributed checkpoint (`.metadata`) without being able to run anything.

A pickle can name any function to call. This reader resolves a fixed list of classes, all of them plain records of torch.distributed.checkpoint, and refuses
every other name before it is imported. megatron-core reads the same file with an unrestricted `pickle.load`: `check_metadata` is what stands before it.

A pickle can also be a bomb without calling anything: a memo entry numbered 2^32 makes the fast unpickler clear 64 GiB, a key made of tuples within tuples takes
forever to hash. So a file is read twice: first by `_Inspector`, Python's slow unpickler with a short list of opcodes and a look at every key, then by the fast
one, which is the one that megatron-core uses and the one whose view of the names counts.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_skywork.convert.index_rules import check_index, shown
from megatron_skywork.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"
BACKEND = "metadata.json"
# An index takes a few hundred bytes for a box, settings and random states a few thousand; what claims to be larger is not read into memory.
LARGEST_OBJECT_BYTES = 1 << 30
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


class RefusedPickle(pickle.UnpicklingError):
    """A pickle named something outside the list."""


def _enum_member(owner: Any, member: Any) -> Enum:
    """The only use of getattr that a pickled enum has (Python 3.11 writes members so)."""
    if owner in _ENUMS and isinstance(member, str) and member in owner.__members__:
        return owner[member]
    raise RefusedPickle(f"getattr({shown(owner)}, {shown(member)})")


def _layout(name: Any) -> torch.layout:
    if isinstance(name, str) and name == "torch.strided":
        return torch.strided
    raise RefusedPickle(f"tensor layout {shown(name)}")


def _ordered(*pairs: Any) -> collections.OrderedDict[Any, Any]:
    """An empty OrderedDict, to be filled by opcodes whose keys are looked at."""
    if pairs:
        raise RefusedPickle("an OrderedDict with content")
    return collections.OrderedDict()


class _Names:
    """What a name in the pickle stands for; everything else is refused."""

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
            return _ordered
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath", "Path"):
            return _Path
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in ("MCoreMetadata", "MCoreSavePlan"):
            return _Placeholder
        raise RefusedPickle(f"{module}.{name}")


class _Unpickler(_Names, pickle.Unpickler):
    pass


_SLOW: Any = pickle._Unpickler  # type: ignore[attr-defined]
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.DICT,
    pickle.LIST, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT,
    pickle.BINFLOAT, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.STRING, pickle.BINSTRING,
    pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GET, pickle.BINGET,
    pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip


class _Opcodes(dict):
    def __missing__(self, code: int) -> NoReturn:
        raise RefusedPickle(f"opcode {code:#04x}")


class _Inspector(_Names, _SLOW):
    """Reads a pickle to see that reading it is harmless: known opcodes, memo numbers within reason, keys that hash at once, state given to records only."""

    dispatch = _Opcodes({opcode[0]: _SLOW.dispatch[opcode[0]] for opcode in _OPCODES})

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self._size = len(content)

    def _check_memo(self) -> None:
        # The numbers count objects, and an object takes a byte at least.
        if next(reversed(self.memo)) > self._size:
            raise RefusedPickle("a memo number beyond the file's length")

    def _put(self) -> None:
        _SLOW.load_put(self)
        self._check_memo()

    def _long_put(self) -> None:
        _SLOW.load_long_binput(self)
        self._check_memo()

    def _set_one(self) -> None:
        _check_keys(self.stack[-2:-1])
        _SLOW.load_setitem(self)

    def _set_many(self) -> None:
        _check_keys(self.stack[::2])
        _SLOW.load_setitems(self)

    def _dict(self) -> None:
        _check_keys(self.stack[::2])
        _SLOW.load_dict(self)

    def _build(self) -> None:
        state, made = self.stack[-1], self.stack[-2]
        if type(made) not in _MADE:
            raise RefusedPickle(f"state for a {type(made).__name__}")
        if not hasattr(made, "__setstate__") and not (isinstance(state, dict) and all(isinstance(key, str) for key in state)):
            raise RefusedPickle(f"a state that is no record's: {type(state).__name__}")
        _SLOW.load_build(self)

    dispatch |= {pickle.PUT[0]: _put, pickle.LONG_BINPUT[0]: _long_put, pickle.SETITEM[0]: _set_one, pickle.SETITEMS[0]: _set_many,
                 pickle.DICT[0]: _dict, pickle.BUILD[0]: _build}  # fmt: skip


def _check_keys(keys: list[Any]) -> None:
    """Only what hashes at once: text, numbers, and index keys made of them."""
    for key in keys:
        plain = key.fqn if isinstance(key, MetadataIndex) and type(key.offset) in (torch.Size, type(None)) else key
        if not isinstance(plain, (str, int, Enum, type(None))):
            raise RefusedPickle(f"a key that is a {type(key).__name__}")


def read_metadata(folder: Path | str) -> Metadata:
    """The index of a distributed checkpoint, with every file name, place and box in it checked (see `index_rules`).

    Raises:
        CheckpointError: the file is missing or unreadable, names anything but index records, points outside the folder, or its boxes do not fit.
    """
    folder = Path(folder)
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {METADATA}, so this is not a distributed checkpoint")
    content = _content(path)
    try:
        _Inspector(content).load()
        index = _Unpickler(io.BytesIO(content)).load()
    except RefusedPickle as error:
        raise CheckpointError(
            f"{path}: names {error}, which no checkpoint index needs; it was not run. Do not use this checkpoint unless you trust who made it"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything; all of it means the same to the reader
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)}); the file is damaged") from error
    check_index(folder, METADATA, index)
    return index


def _content(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    with open(path, "rb") as file:
        if length is None and (length := os.fstat(file.fileno()).st_size) > LARGEST_OBJECT_BYTES:
            raise CheckpointError(f"{path}: is {length:,} bytes large; what it is for needs a small part of that, so it was not read")
        file.seek(offset)
        return file.read(length)


def _reason(error: BaseException) -> str:
    """An exception in a few words of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def read_object(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """An object written by torch.save, at an offset of a file, read with `weights_only`.

    Raises:
        CheckpointError: missing, damaged, packed so that it would grow when it is read, or more than plain data.
    """
    try:
        content = _content(path, offset, length)
        check_archive(content, str(path))
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than plain data, so it was not loaded ({str(error).strip().splitlines()[0]})") from error
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)}); the file is damaged") from error


def check_archive(content: bytes | Path, where: str) -> None:
    """Refuse an archive of torch.save that is not what torch.save writes: each record stored as it is. A compressed one can be a thousand times its size.

    Args:
        content: the archive, or the path of one.

    Raises:
        CheckpointError: no archive, or one with packed records.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content) if isinstance(content, bytes) else content) as archive:
            records = archive.infolist()
    except Exception as error:  # as above
        raise CheckpointError(f"{where}: is not an archive that torch.save writes ({_reason(error)}); the file is damaged") from error
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or sum(record.file_size for record in records) > size:
        raise CheckpointError(f"{where}: holds compressed records, which torch.save never writes and which can grow beyond any memory; it was not loaded")


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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / BACKEND}: cannot be read as JSON ({_reason(error)})") from error
    if not isinstance(backend, dict) or backend.get("sharded_backend") != "torch_dist":
        raise CheckpointError(f"{folder / BACKEND}: sharded_backend is {shown(backend)}; only torch_dist is supported")
    index = read_metadata(folder)
    if (folder / COMMON).exists():
        read_object(folder / COMMON)
    for key, info in index.storage_data.items():
        if not isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            continue
        if info.length > LARGEST_OBJECT_BYTES:
            raise CheckpointError(f"{folder / info.relative_path}: {key.fqn} is an object of {info.length:,} bytes; none that is needed is so large")
        read_object(folder / info.relative_path, info.offset, info.length)
    return index
