"""Arrays in a cache folder that any number of processes may want at once, on any number of nodes, and that none of them believes unseen.

A file is an array as numpy writes it, followed by the SHA-256 of those bytes: a cut or changed one is noticed before it is mapped, and built again, for it
costs nothing but time. It is written under a name of the writer's own and renamed when it is on disk, so a reader sees a whole file or none. A lock keeps
processes of one node from doing the work twice; a killed owner cannot keep it (see `file_lock`), and where a file system has none, work is only done twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_skywork.convert.files.marker import fsync
from megatron_skywork.data.file_lock import exclusive
from megatron_skywork.errors import DataError

logger = logging.getLogger(__name__)

_HASH_BYTES = 1 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size


def cached_arrays(folder: Path, name: str, kinds: Sequence[str], build: Callable[[], Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The arrays NAME-KIND.npy of the folder, mapped; those that are missing or damaged are built first.

    Args:
        name: tells this content from any other.
        build: makes one array for each of `kinds`, the same in every process.
    Raises:
        DataError: what was written cannot be read back.
        OSError: the folder cannot be written, and the arrays are not there.
    """
    paths = [folder / f"{name}-{kind}.npy" for kind in kinds]
    arrays = [_load(path) for path in paths]
    if any(array is None for array in arrays):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f"{name}.lock") as alone:
            if alone:
                _remove_leftovers(folder, name)
            arrays = [_load(path) for path in paths]  # another process may have built them while this one waited
            if any(array is None for array in arrays):
                _say_damaged(paths)
                for path, array in zip(paths, build(), strict=True):
                    _publish(path, array)
                arrays = [_load(path) for path in paths]
    if missing := [path for path, array in zip(paths, arrays, strict=True) if array is None]:
        raise DataError(f"{missing[0]}: was written a moment ago and cannot be read back as it was; set data.cache_dir to a folder on another disk")
    return [array for array in arrays if array is not None]


def _load(path: Path) -> np.ndarray | None:
    """The array of a whole file, mapped; None where the file is missing or damaged."""
    try:
        with open(path, "rb") as stream:
            length = os.fstat(stream.fileno()).st_size - _DIGEST_BYTES
            if length < 0 or _digest(stream, length) != stream.read():
                return None
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None


def _publish(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with open(temporary, "w+b") as stream:
            np.save(stream, array, allow_pickle=False)
            stream.write(_digest(stream, stream.tell()))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(stream: BinaryIO, length: int) -> bytes:
    """SHA-256 of the first `length` bytes; the stream stands behind them then."""
    stream.seek(0)
    digest = hashlib.sha256()
    while length and (chunk := stream.read(min(length, _HASH_BYTES))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.digest()


def _remove_leftovers(folder: Path, name: str) -> None:
    """Files of writers that were killed: those of this host, for whoever holds its lock is the only writer on it."""
    for path in folder.glob(f"{name}-*.npy.{socket.gethostname()}.*.partial"):
        path.unlink(missing_ok=True)


def _say_damaged(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists() and _load(path) is None:
            logger.warning("%s: this sample index is damaged; it is built again", path)
