"""What a command costs, and what plain writing costs on the same disk: seconds, bytes, peak memory.

Memory is read from /proc (Linux) every 20 ms for every process of the command's session: VmHWM, the kernel's own high-water mark of resident memory, which
misses no short peak but one in the last 20 ms of a process. Mapped files count as resident (a program that maps what it reads shows more than one that reads
it); pages of the page cache that are not mapped do not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import resource
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 16 << 20
_ALIGN_BYTES = 4096
_SAMPLE_SECONDS = 0.02


@dataclass
class Cost:
    """One command.

    Attributes:
        seconds: from its start to its end, imports included.
        sync_seconds: what fsync of every file it wrote took after it: what the command had left in the page cache.
        cpu_seconds: user and system time of it and of all processes it waited for: hardly touched by what else runs on the machine, unlike `seconds`.
        exit_code, output, errors: how it ended and what it printed.
        largest_bytes: the highest VmHWM of any of its processes.
        tree_bytes: the sum of VmHWM over all of its processes, an upper bound of their common peak (shared pages count in each).
        anonymous_bytes: the highest sum of private memory that was sampled, without mapped files; None where the kernel does not tell.
    """

    seconds: float
    sync_seconds: float
    cpu_seconds: float
    exit_code: int
    output: str
    errors: str
    largest_bytes: int
    tree_bytes: int
    anonymous_bytes: int | None


class _Memory(threading.Thread):
    """Samples the processes of one session until told to stop."""

    def __init__(self, session: int):
        super().__init__(daemon=True)
        self._session = session
        self._stopped = threading.Event()
        self.high: dict[int, int] = {}
        self.anonymous: int | None = None

    def run(self) -> None:
        while not self._stopped.is_set():
            self._sample()
            self._stopped.wait(_SAMPLE_SECONDS)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def _sample(self) -> None:
        anonymous = 0
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if os.getsid(int(entry)) != self._session:  # a system call, not a file: at 20 ms, opening every /proc/PID/stat takes a tenth of a core
                    continue
                with open(f"/proc/{entry}/status", encoding="utf-8", errors="replace") as stream:
                    fields = dict(line.split(":", 1) for line in stream)
            except (OSError, ValueError, IndexError):  # it ended while it was looked at
                continue
            if "VmHWM" in fields:  # a process that has ended and was not waited for has none
                self.high[int(entry)] = max(self.high.get(int(entry), 0), _kib(fields["VmHWM"]))  # exec begins a new count
                anonymous += _kib(fields.get("RssAnon", "0 kB"))
        self.anonymous = max(self.anonymous or 0, anonymous)


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024


def run_command(words: Sequence[str], written: Path | None = None, environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end in a session of its own; what was written before it began is on the disk first.

    Args:
        written: folder the command writes, for `sync_seconds`.
    """
    os.sync()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        cpu_before = _children_seconds()
        started = time.perf_counter()
        child = subprocess.Popen(list(words), stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True)
        memory = _Memory(child.pid)
        memory.start()
        try:
            exit_code = child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)  # its workers too
            child.wait()
            raise
        finally:
            seconds = time.perf_counter() - started
            memory.stop()
        cpu_seconds = _children_seconds() - cpu_before
        started = time.perf_counter()
        for descriptor in _opened(written) if written is not None else ():
            os.fsync(descriptor)
        sync_seconds = time.perf_counter() - started
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", errors="replace"))
    high = memory.high.values()
    return Cost(seconds, sync_seconds, cpu_seconds, exit_code, texts[0], texts[1], max(high, default=0), sum(high), memory.anonymous)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25th, 50th and 75th percentile; of fewer than two values that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


class PlainWriter:
    """Writes files of given sizes one after another: 16 MiB blocks of random bytes from one buffer, fsync at the end of each file."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._buffer = mmap.mmap(-1, 4 * BLOCK_BYTES)  # page-aligned, as O_DIRECT asks for
        for _ in range(4):
            self._buffer.write(os.urandom(BLOCK_BYTES))

    def write(self, sizes: Sequence[int], direct: bool = False) -> float:
        """Seconds; the files are deleted again.

        Args:
            direct: past the page cache (O_DIRECT), but for the last 4096 bytes of a file.

        Raises:
            OSError: the file system does not know O_DIRECT, or is full.
        """
        folder = self._folder / "plain"
        folder.mkdir()
        os.sync()
        started = time.perf_counter()
        try:
            for index, size in enumerate(sizes):
                self._write_file(folder / str(index), size, direct)
            return time.perf_counter() - started
        finally:
            delete(folder)

    def _write_file(self, path: Path, size: int, direct: bool) -> None:
        blocks = itertools.cycle(range(0, len(self._buffer), BLOCK_BYTES))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0), 0o644)
        try:
            with memoryview(self._buffer) as view:
                done = 0
                while done < size:
                    count = min(BLOCK_BYTES, size - done)
                    if direct and count % _ALIGN_BYTES:
                        if count < _ALIGN_BYTES:
                            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
                        else:
                            count -= count % _ALIGN_BYTES
                    start = next(blocks)
                    done += os.write(descriptor, view[start : start + count])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_sizes(folder: Path) -> list[int]:
    """Sizes of all files below a folder, by name."""
    return [path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()]


def forget(folder: Path) -> None:
    """Put a folder's files on the disk and out of the page cache."""
    for descriptor in _opened(folder):
        os.fsync(descriptor)  # a page that is not on the disk yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _opened(folder: Path) -> Iterator[int]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                yield descriptor
            finally:
                os.close(descriptor)


def knows_direct(folder: Path) -> bool:
    """Whether the file system takes writes past the page cache (tmpfs, for one, may not)."""
    try:
        PlainWriter(folder).write([_ALIGN_BYTES], direct=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def delete(folder: Path) -> None:
    """Remove a folder and wait for the disk, so that the removal does not disturb what is measured next."""
    if folder.exists():
        forget(folder)
        shutil.rmtree(folder)
        os.sync()
