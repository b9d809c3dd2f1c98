"""This rank's file of a checkpoint: hashed while it is written, made durable, and read back. No collective is issued, so any thread may run it."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_skywork.checkpoint.capture import Capture
from megatron_skywork.convert.files.marker import sha256_of
from megatron_skywork.convert.files.torch_record import around, raw_bytes
from megatron_skywork.convert.streaming.file_writer import FileRecord, FileWriter, Stopped


@dataclass
class Part:
    """What one rank has put on the disk, or why it could not.

    Attributes:
        files: what the manifest says of them.
        places: where in them each item lies, for the index.
    """

    files: dict[str, FileRecord] = field(default_factory=dict)
    places: list[tuple[MetadataIndex, _StorageInfo]] = field(default_factory=list)
    seconds: float = 0.0
    failure: str | None = None


def write_part(folder: Path, captured: Capture, stopped: threading.Event, read_back: bool) -> Part:
    """Write what was captured; each item's memory is given back once it is written. It never raises: all ranks have to learn of a failure together.

    Args:
        stopped: when set, writing ends with a failure.
        read_back: compare the hash of what is on the disk with that of what was written.
    """
    started, part = time.perf_counter(), Part()
    try:
        if captured.items:
            path = folder / captured.file_name
            made = _write(path, captured.items, part.places, stopped)
            if read_back:
                _read_back(path, made, stopped)
            part.files[path.name] = made
    except Exception as failure:
        part.failure = f"rank {torch.distributed.get_rank()} on {socket.gethostname()}: {reason_of(failure)}"
    part.seconds = time.perf_counter() - started
    return part


def reason_of(failure: BaseException) -> str:
    """Why, in one line."""
    if isinstance(failure, OSError) and failure.strerror:
        return f"{failure.strerror}: {failure.filename}" if failure.filename else failure.strerror
    return f"{type(failure).__name__}: {failure}"


def _write(
    path: Path, items: deque[tuple[MetadataIndex, torch.Tensor | bytes]], places: list[tuple[MetadataIndex, _StorageInfo]], stopped: threading.Event
) -> FileRecord:
    at = 0
    with FileWriter(path, stopped=stopped) as file:
        while items:
            index, data = items.popleft()
            if isinstance(data, bytes):
                contents: list[bytes | memoryview] = [data]
            else:
                before, after = around(tuple(data.shape), data.dtype)
                contents = [before, raw_bytes(data.cpu()), after]
            for content in contents:
                file.write(content)
            length = sum(len(content) for content in contents)
            places.append((index, _StorageInfo(path.name, at, length)))
            at += length
        return file.finish()


def _read_back(path: Path, made: FileRecord, stopped: threading.Event) -> None:
    def go_on(length: int) -> None:
        if stopped.is_set():
            raise Stopped

    if hasattr(os, "posix_fadvise"):  # what is read must come from the disk, not from a copy in memory
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if sha256_of(path, go_on) != made.sha256:
        raise OSError(errno.EIO, "the disk gave back other bytes than were written", str(path))
