"""Writes a large file past the page cache and hashes it on the way: filling, hashing and writing of three blocks overlap.

Writing through the page cache copies everything once more, and the kernel writes back when it sees fit; what is written here is not read again soon. Where a
file system does not know O_DIRECT, the page cache is used. Blocks are filled by copying, so no alignment is asked of what is written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy

BLOCK_BYTES = 8 << 20
_NUM_BLOCKS = 4
_ALIGN_BYTES = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class Stopped(Exception):
    """Another worker failed, or the user interrupted."""


@dataclass(frozen=True)
class FileRecord:
    """A finished file."""

    num_bytes: int
    sha256: str


class FileWriter:
    """`with FileWriter(path) as file:` `file.write(...)` any number of times, then `file.finish()`.

    Args:
        progress: called with the number of bytes after each block.
        stopped: when set, the next write raises Stopped.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None, stopped: threading.Event | None = None):
        self._progress, self._stopped = progress or (lambda count: None), stopped
        self._digest = hashlib.sha256()
        self._blocks = [numpy.frombuffer(mmap.mmap(-1, BLOCK_BYTES), numpy.uint8) for _ in range(_NUM_BLOCKS)]
        self._pending: list[tuple[Future[Any], ...]] = [()] * _NUM_BLOCKS
        self._current = self._filled = self._flushed = 0
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._path, self._descriptor = path, _open(path)

    def write(self, content: Any) -> None:
        """Append a buffer (bytes, or a contiguous memoryview)."""
        rest = numpy.frombuffer(content, numpy.uint8) if len(content) else numpy.empty(0, numpy.uint8)
        while len(rest):
            if self._stopped is not None and self._stopped.is_set():
                raise Stopped
            count = min(len(rest), BLOCK_BYTES - self._filled)
            numpy.copyto(self._blocks[self._current][self._filled : self._filled + count], rest[:count])
            self._filled += count
            rest = rest[count:]
            if self._filled == BLOCK_BYTES:
                self._flush()

    def _flush(self) -> None:
        block, length = self._blocks[self._current], self._filled
        self._pending[self._current] = (
            self._hasher.submit(self._digest.update, block[:length]), self._writer.submit(self._put, block, length, self._flushed)
        )  # fmt: skip
        self._flushed += length
        self._filled = 0
        self._current = (self._current + 1) % _NUM_BLOCKS
        self._wait(self._current)
        self._progress(length)

    def _wait(self, number: int) -> None:
        for job in self._pending[number]:
            job.result()
        self._pending[number] = ()

    def _put(self, block: numpy.ndarray, length: int, offset: int) -> None:
        """Write a block; the last one of a file is padded to what O_DIRECT asks for, and the padding cut off at the end."""
        done = 0
        while done < length:
            padded = -(-(length - done) // _ALIGN_BYTES) * _ALIGN_BYTES
            try:
                count = os.pwrite(self._descriptor, block[done : done + padded].data, offset + done)
            except OSError as error:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise self._named(error) from error
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
                continue
            done += count

    def _named(self, error: OSError) -> OSError:
        """The error with the file's name, which the kernel does not give for a descriptor."""
        return OSError(error.errno, error.strerror, str(self._path))

    def finish(self) -> FileRecord:
        """Everything on the disk, and what it is."""
        if self._filled:
            self._flush()
        for number in range(_NUM_BLOCKS):
            self._wait(number)
        try:
            os.ftruncate(self._descriptor, self._flushed)
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._named(error) from error
        return FileRecord(self._flushed, self._digest.hexdigest())

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()
        os.close(self._descriptor)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)
