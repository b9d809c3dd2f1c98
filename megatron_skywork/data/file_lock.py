"""A lock between processes that a killed owner cannot keep: the operating system releases it with the file descriptor."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`; yields True when this process is alone, False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it and `wait` is False.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            alone = _acquire(descriptor, wait)
            if _is_current(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed the file between our open and our lock: lock the new one
    try:
        yield alone
    finally:
        if alone:
            os.unlink(path)
        os.close(descriptor)


def _acquire(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False  # some network file systems refuse flock; every file is published by one rename, so only work is done twice
    return True


def _is_current(descriptor: int, path: str | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
