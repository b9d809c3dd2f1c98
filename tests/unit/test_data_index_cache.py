"""A cache that many processes build at once, that killed builders leave behind, and that is never believed unseen."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_skywork.data.index_cache import cached_arrays

KINDS = ("documents", "samples")
EXPECTED = (np.arange(500, dtype=np.int32), np.arange(60, dtype=np.int64).reshape(30, 2))


def build() -> Sequence[np.ndarray]:
    return EXPECTED


def never() -> Sequence[np.ndarray]:
    raise AssertionError("the cache was not believed")


def is_whole(arrays: Sequence[np.ndarray]) -> bool:
    return all(array.dtype == expected.dtype and np.array_equal(array, expected) for array, expected in zip(arrays, EXPECTED, strict=True))


def child(body: Callable[[], object]) -> int:
    """Process id of a fork that runs `body` and ends with 0, or with 1 where it raises."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return number


def status_of(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def test_built_once_and_mapped_afterwards(tmp_path: Path) -> None:
    assert is_whole(cached_arrays(tmp_path / "new" / "folder", "x", KINDS, build))
    arrays = cached_arrays(tmp_path / "new" / "folder", "x", KINDS, never)
    assert is_whole(arrays) and all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays)
    assert names(tmp_path / "new" / "folder") == ["x-documents.npy", "x-samples.npy"]


def test_eight_processes_at_once_build_one_cache(tmp_path: Path) -> None:
    def counted() -> Sequence[np.ndarray]:
        time.sleep(0.2)  # long enough for the others to arrive
        with open(tmp_path / "builds", "a") as stream:
            stream.write("x")
        return build()

    children = [child(lambda: is_whole(cached_arrays(tmp_path / "cache", "x", KINDS, counted)) or os._exit(2)) for _ in range(8)]
    assert [status_of(number) for number in children] == [0] * 8
    assert (tmp_path / "builds").read_text() == "x"
    assert names(tmp_path / "cache") == ["x-documents.npy", "x-samples.npy"]


def test_eight_processes_without_locks_build_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none: work is done eight times, and what is read is whole at every moment."""
    monkeypatch.setattr("megatron_skywork.data.file_lock._acquire", lambda descriptor, wait: False)
    children = [child(lambda: is_whole(cached_arrays(tmp_path / "cache", "x", KINDS, build)) or os._exit(2)) for _ in range(8)]
    assert [status_of(number) for number in children] == [0] * 8
    assert [name for name in names(tmp_path / "cache") if name != "x.lock"] == ["x-documents.npy", "x-samples.npy"]


@pytest.mark.parametrize("moment", ["build", "save", "fsync", "replace"])
def test_a_killed_builder_leaves_nothing_that_hinders_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Killed at each step, with seven others waiting for its lock: they go on at once, and nobody reads half a file."""
    def stop_here(*_: object, **__: object) -> None:
        (tmp_path / "there").touch()
        time.sleep(600)

    def first() -> None:
        if moment == "save":  # half of the array, in the file
            monkeypatch.setattr(np, "save", lambda stream, array, allow_pickle: (stream.write(array.tobytes()[:100]), stream.flush(), stop_here()))
        elif moment != "build":
            monkeypatch.setattr(os, moment, stop_here)
        cached_arrays(tmp_path / "cache", "x", KINDS, stop_here if moment == "build" else build)  # type: ignore[arg-type]

    victim = child(first)
    wait_for((tmp_path / "there").exists)
    others = [child(lambda: is_whole(cached_arrays(tmp_path / "cache", "x", KINDS, build)) or os._exit(2)) for _ in range(7)]
    assert os.waitpid(others[0], os.WNOHANG)[0] == 0
    os.kill(victim, signal.SIGKILL)
    assert status_of(victim) == -signal.SIGKILL
    assert [status_of(number) for number in others] == [0] * 7
    assert names(tmp_path / "cache") == ["x-documents.npy", "x-samples.npy"]
    assert is_whole(cached_arrays(tmp_path / "cache", "x", KINDS, never))


def test_leftovers_of_another_host_are_left_alone(tmp_path: Path) -> None:
    """Its writer may be alive: the lock need not reach from one host to another."""
    theirs, dead = (tmp_path / f"x-samples.npy.{host}.17.partial" for host in ("elsewhere", socket.gethostname()))
    for path in (theirs, dead):
        path.touch()
    cached_arrays(tmp_path, "x", KINDS, build)
    assert theirs.exists() and not dead.exists()


def test_every_cut_and_flipped_bit_is_noticed_and_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    choose = random.Random(3)
    cached_arrays(tmp_path, "x", KINDS, build)
    path = tmp_path / "x-samples.npy"
    whole = path.read_bytes()
    damages = [whole[:cut] for cut in (0, 1, 31, 32, 33, 128, len(whole) - 33, len(whole) - 32, len(whole) - 1)] + [whole + b"\0", bytes(len(whole))]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        damages.append(bytes(flipped))
    for damage in damages:
        path.write_bytes(damage)
        caplog.clear()
        assert is_whole(cached_arrays(tmp_path, "x", KINDS, build))
        assert path.read_bytes() == whole and "x-samples.npy: this sample index is damaged; it is built again" in caplog.text


def test_an_array_of_numpy_alone_is_built_again(tmp_path: Path) -> None:
    """As versions before the hash wrote it."""
    for kind, array in zip(KINDS, EXPECTED, strict=True):
        np.save(tmp_path / f"x-{kind}.npy", array)
    assert is_whole(cached_arrays(tmp_path, "x", KINDS, build))
    assert is_whole(cached_arrays(tmp_path, "x", KINDS, never))
