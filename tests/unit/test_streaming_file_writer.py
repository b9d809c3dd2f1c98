"""Files of every size are what was written, whatever the file system does on the way; nothing is left running behind them."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_skywork.convert.files.read_bytes import read_part, read_tensor
from megatron_skywork.convert.streaming import file_writer
from megatron_skywork.convert.streaming.file_writer import FileRecord, FileWriter, Stopped
from megatron_skywork.errors import CheckpointError

BLOCK = 8192
SIZES = [0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 5, 11 * BLOCK + 4097]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks, and after each test as many threads and descriptors as before it."""
    monkeypatch.setattr(file_writer, "BLOCK_BYTES", BLOCK)
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)


def write(path: Path, content: bytes, cuts: list[int] | None = None) -> FileRecord:
    """In parts that end at `cuts`."""
    ends = [*(cuts or []), len(content)]
    with FileWriter(path) as file:
        for start, end in zip([0, *ends], ends, strict=False):
            file.write(memoryview(content)[start:end])
        return file.finish()


def check(path: Path, content: bytes, cuts: list[int] | None = None) -> None:
    path.write_bytes(b"what was there before, and longer" * BLOCK)
    made = write(path, content, cuts)
    assert path.read_bytes() == content
    assert made == FileRecord(len(content), hashlib.sha256(content).hexdigest())


def a_file(tmp_path: Path, size: int) -> tuple[Path, bytes]:
    return tmp_path / "file", random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", SIZES)
def test_content_and_hash_are_those_of_what_was_written(size: int, tmp_path: Path):
    path, content = a_file(tmp_path, size)
    check(path, content)
    check(path, content, sorted(random.Random(size).choices(range(size + 1), k=20)))
    check(path, content, [1, 1, size // 2] if size > 2 else None)


def test_a_block_is_not_filled_again_before_it_is_written_and_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = os.pwrite

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(0.002)
        return plain(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    check(*a_file(tmp_path, 23 * BLOCK + 7))


@pytest.mark.parametrize("most", [1000, 4096, 5000, BLOCK - 1])
@pytest.mark.parametrize("size", [1, 4097, BLOCK, 4 * BLOCK + 5])
def test_a_kernel_that_writes_less_than_asked(most: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: plain(descriptor, data[:most], offset))
    check(*a_file(tmp_path, size))


def refuse_direct(monkeypatch: pytest.MonkeyPatch, at: str) -> list[int]:
    """A file system that refuses O_DIRECT at open (tmpfs of old), or at the first write (some network file systems)."""
    import fcntl

    refused: list[int] = []
    plain_open, plain_write = os.open, os.pwrite

    def open_(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            refused.append(1)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_open(path, flags, mode)

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(1)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_write(descriptor, data, offset)

    monkeypatch.setattr(os, "open" if at == "open" else "pwrite", open_ if at == "open" else pwrite)
    return refused


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="O_DIRECT is Linux's")
@pytest.mark.parametrize("at", ["open", "write"])
def test_a_file_system_without_direct_writes(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, content = a_file(tmp_path, 4 * BLOCK + 5)
    path.write_bytes(b"longer" * BLOCK)
    refused = refuse_direct(monkeypatch, at)
    made = write(path, content)
    assert len(refused) == 1, "asked once, and not again for every block"
    monkeypatch.undo()
    assert path.read_bytes() == content and made.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINVAL])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_a_disk_that_fails_is_an_error_that_names_the_file(call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file_writer, "_DIRECT", 0)  # EINVAL of a file system that was not asked for O_DIRECT is an error too

    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as failure:
        write(*a_file(tmp_path, 9 * BLOCK))
    assert failure.value.errno == number and failure.value.filename == str(tmp_path / "file")


def test_other_refusals_to_open_are_not_taken_for_a_lack_of_direct_writes(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        FileWriter(tmp_path / "none" / "file")
    with pytest.raises(IsADirectoryError):
        FileWriter(tmp_path)


def test_who_is_told_to_stop_stops_at_the_next_write(tmp_path: Path):
    stopped = threading.Event()
    with pytest.raises(Stopped), FileWriter(tmp_path / "file", stopped=stopped) as file:
        file.write(b"a" * 3 * BLOCK)
        stopped.set()
        file.write(b"")
        file.write(b"b")


def test_an_error_between_writes_leaves_nothing_running(tmp_path: Path):
    with pytest.raises(KeyError), FileWriter(tmp_path / "file") as file:
        file.write(b"a" * 9 * BLOCK)
        raise KeyError


def test_progress_adds_up(tmp_path: Path):
    seen: list[int] = []
    with FileWriter(tmp_path / "file", seen.append) as file:
        for _ in range(3):
            file.write(b"a" * (BLOCK + 1))
        file.finish()
    assert seen == [BLOCK] * 3 + [3]


# ----------------------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("most", [1, 100, 1 << 20], ids=["byte by byte", "in parts", "at once"])
def test_a_tensor_is_read_from_its_place(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = torch.randn(3, 5, 7).to(torch.bfloat16)
    (tmp_path / "file").write_bytes(b"before!" + bytes(expected.view(-1).view(torch.uint8).numpy().data) + b"after")
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: plain(descriptor, [views[0][:most]], offset))
    found = read_tensor(tmp_path / "file", 7, (3, 5, 7), torch.bfloat16)
    assert torch.equal(found, expected) and found.is_contiguous()
    assert read_part(tmp_path / "file", 0, 6) == b"before" and read_part(tmp_path / "file", 7 + expected.nbytes, 100) == b"after"


def test_tensors_without_numbers_and_without_axes(tmp_path: Path):
    (tmp_path / "file").write_bytes(torch.tensor(2.5).numpy().tobytes())
    assert read_tensor(tmp_path / "file", 0, (), torch.float32).item() == 2.5
    assert read_tensor(tmp_path / "file", 4, (0, 3), torch.float32).shape == (0, 3)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: os.truncate(path, 50), "ends at byte 50, 64 were expected"),
        (lambda path: path.unlink(), "cannot be read .No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read .Is a directory"),
    ],
    ids=["truncated", "gone", "a folder"],
)
def test_a_file_that_cannot_be_read_is_named(damage: Callable[[Path], object], said: str, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64))
    damage(path)
    with pytest.raises(CheckpointError, match=said) as refusal:
        read_tensor(path, 0, (16,), torch.float32)
    assert str(path) in str(refusal.value)
