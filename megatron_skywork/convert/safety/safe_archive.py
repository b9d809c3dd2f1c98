"""Reads what torch.save wrote (tensors, settings, random states) without running anything and without taking more memory than the file takes on the disk.

`torch.load(weights_only=True)` runs nothing, and still allocates what a file claims: `bytearray(10**12)`, a packed record, a storage of any size, a view that
repeats one number a trillion times; a dictionary's key of tuples within tuples it hashes forever. So `archive_inspector` looks at a file's pickle first, and
torch reads only what is plain there.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_skywork.convert.safety.archive_inspector import ArchiveInspector, StoredTensor
from megatron_skywork.convert.safety.pickle_inspector import RefusedPickle
from megatron_skywork.convert.safety.shown import first_lines, reason, shown
from megatron_skywork.errors import CheckpointError

# Settings and random states take a few thousand bytes, an index a few hundred for a box; what claims to be larger is not read into memory.
LARGEST_OBJECT_BYTES = 1 << 30
# Names and shapes in a file of tensors, some 250 bytes for each, and the archive's table of contents.
_LARGEST_PICKLE_BYTES = 32 << 20
_LARGEST_TABLE_BYTES = 64 << 20
# What saved random states are made of; arrays of numbers, nothing that can act.
_ARRAYS: list[Any] = [
    numpy.zeros(1).__reduce__()[0], numpy.ndarray, numpy.dtype, type(numpy.dtype("uint32")), type(numpy.dtype("int64")), type(numpy.dtype("float64")),
]  # fmt: skip


def content_of(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of a regular file.

    Raises:
        CheckpointError: no regular file, or the whole of one that is too large.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file")
    with open(path, "rb") as file:
        if length is None and (length := os.fstat(file.fileno()).st_size) > LARGEST_OBJECT_BYTES:
            raise CheckpointError(f"{path}: is {length:,} bytes large; what it is for needs a small part of that, so it was not read")
        file.seek(offset)
        return file.read(length)


def read_object(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """An object written by torch.save, at an offset of a file, read with `weights_only`.

    Raises:
        CheckpointError: missing, damaged, packed so that it would grow when it is read, or more than plain data.
    """
    try:
        content = content_of(path, offset, length)
        _inspect_archive(content, str(path))
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than plain data, so it was not loaded ({str(error).strip().splitlines()[0]})") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive raises almost anything; all of it means the same to the reader
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); the file is damaged") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a `.bin` file, mapped into memory where its format allows that.

    Raises:
        CheckpointError: damaged, packed, more than tensors by name, or a tensor that claims more than the file holds.
    """
    try:
        is_archive = zipfile.is_zipfile(path)
        content = _inspect_archive(path, path.name) if is_archive else _inspect_old_file(path)
        _check_tensors(content, path.name)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name}: holds more than tensors, so it was not loaded ({str(error).strip().splitlines()[0]}); convert it to safetensors where you trust it"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{path.name}: cannot be read ({reason(error)}); the file is damaged") from error


def _check_tensors(content: Any, where: str) -> None:
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds a {type(content).__name__}, not tensors by name")
    problems = [f"{shown(name)}: is a {type(name).__name__}, not a tensor's name" for name in content if not isinstance(name, str)]
    others = {name: value for name, value in content.items() if not isinstance(value, StoredTensor)}
    problems += [f"{shown(name)}: in {where}, and not a tensor ({type(value).__name__})" for name, value in others.items()]
    if problems:
        raise CheckpointError(f"{where}: holds more than tensors by name: " + "; ".join(first_lines(problems, 10)))


def check_archive(content: bytes | Path, where: str) -> dict[str, int]:
    """Refuse an archive of torch.save that is not what torch.save writes: each record stored as it is. A compressed one can be a thousand times its size.

    Args:
        content: the archive, or the path of one.

    Returns:
        The size of each record.

    Raises:
        CheckpointError: no archive, or one with packed records.
    """
    try:
        with _Sparing(content) if isinstance(content, Path) else io.BytesIO(content) as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except Exception as error:  # as above
        raise CheckpointError(f"{where}: is not an archive that torch.save writes ({reason(error)}); the file is damaged") from error
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or sum(record.file_size for record in records) > size:
        raise CheckpointError(f"{where}: holds compressed records, which torch.save never writes and which can grow beyond any memory; it was not loaded")
    sizes = {record.filename: record.file_size for record in records}
    if len(sizes) != len(records) or len({name.partition("/")[0] for name in sizes}) != 1:
        raise CheckpointError(f"{where}: is not an archive that torch.save writes (two records have one name, or no common folder); the file is damaged")
    return {name.partition("/")[2]: size for name, size in sizes.items()}


class _Sparing(io.FileIO):
    """A file of which nothing large is read at once: an archive's table of contents claims its own length, and a file of zeros takes no place on the disk."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_TABLE_BYTES:
            raise ValueError(f"its table of contents claims {size:,} bytes")
        return super().read(-1 if size is None else size)


def _inspect_archive(content: bytes | Path, where: str) -> Any:
    """What an archive holds, with a `StoredTensor` for each tensor."""
    sizes = check_archive(content, where)
    # The settings in a checkpoint may be large where a file of tensors has only names: their pickle was read into memory as a whole already.
    if "data.pkl" not in sizes or (isinstance(content, Path) and sizes["data.pkl"] > _LARGEST_PICKLE_BYTES):
        raise CheckpointError(f"{where}: is not an archive that torch.save writes (its data.pkl is {'too large' if 'data.pkl' in sizes else 'missing'})")
    # torch's own reader, so that what is looked at is what torch.load will see, whatever two readers may make of a crafted table of contents.
    reader = torch._C.PyTorchFileReader(str(content) if isinstance(content, Path) else io.BytesIO(content))  # type: ignore[arg-type]
    held = {name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")}
    return ArchiveInspector(reader.get_record("data.pkl"), held).load()


def _inspect_old_file(path: Path) -> Any:
    """The same for a file older than torch 1.6: five pickles, then the storages."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        pass
    else:  # torch.load would unpack it to the disk
        raise CheckpointError(f"{path.name}: is a tar archive, as torch wrote them before 2016; it was not unpacked")
    with open(path, "rb") as file:
        content = file.read(_LARGEST_PICKLE_BYTES)
    inspector = ArchiveInspector(content, None)
    _magic, _protocol, _machine, value, keys = (inspector.load() for _ in range(5))
    if not isinstance(keys, Iterable) or not all(isinstance(key, str) for key in keys):
        raise RefusedPickle("storages by other things than text")
    claimed = sum(storage.nbytes for storage in inspector.storages.values())
    if claimed > path.stat().st_size:
        raise CheckpointError(f"{path.name}: its tensors claim {shown(claimed)} bytes, and the file has {path.stat().st_size:,}; the file is damaged")
    return value
