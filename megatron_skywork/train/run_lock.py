"""One run at a time in a run's folder: two would write over each other's checkpoints and records, and each would look healthy.

`run.lock` says who holds the folder: host, process, SLURM job, and a sign of life that the owner renews. It is made by a link, which one of two processes wins
on every file system, NFS included; locks of the kernel are not relied on, because many shared file systems ignore them. A dead owner is recognized by

* its process being gone, where it ran on this machine (the process' start time tells a number that was given to another process since);
* the SLURM job it belonged to being ours: a job that was requeued runs nowhere else;
* a sign of life older than `STALE_SECONDS`, everywhere else; so long a second run waits and looks. The age is taken from the file system's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_skywork import lifeline
from megatron_skywork.data.file_lock import exclusive
from megatron_skywork.errors import EXIT_REFUSED, CheckpointError, ConfigError, UserError
from megatron_skywork.train import signals

FILE_NAME = "run.lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
_ATTEMPTS = 5


class RunLock:
    """Holds a run's folder on the first rank, for all.

    Args:
        run_dir: made if needed.
        is_first_rank: false on the ranks that only want to know.
    """

    def __init__(self, run_dir: Path, is_first_rank: bool):
        self._path, self._is_first_rank = run_dir / FILE_NAME, is_first_rank
        self._mine: dict[str, Any] = {}
        self._refusal: UserError | None = None
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._renew, name="run lock", daemon=True)

    def take(self) -> bool:
        """Hold the folder from now on, before anything is written there. The first rank does, at once; the others hear of it in `agree`.

        Returns:
            false where the folder is another run's; there must be no writing, and `agree` says so.
        """
        if self._is_first_rank:
            try:
                self._take()
            except UserError as refusal:
                self._refusal = refusal
            else:
                self._beat.start()
        return self._refusal is None

    def agree(self) -> None:
        """Hear whether the folder is ours. Every rank calls it, as soon as ranks can talk.

        Raises:
            CheckpointError: on every rank; another run holds the folder, and is alive.
            ConfigError: on every rank; the folder cannot be written.
        """
        from megatron_skywork.checkpoint.together import from_first  # torch, which `take` does not wait for

        from_first(self._raise)

    def _raise(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def release(self) -> None:
        """Let go of it; another run's lock is left alone."""
        self._ended.set()
        if self._beat.is_alive():
            self._beat.join()
        if self._mine and _read(self._path) == self._mine:
            self._path.unlink(missing_ok=True)
        self._mine = {}

    def _take(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(self._path.with_name(f".{FILE_NAME}.taking")):  # one after another, where the kernel's locks do work
                self._mine = self._won()
            _clear_leftovers(self._path)
        except OSError as failure:
            where = f"run_dir={self._path.parent}"
            raise ConfigError(f"{where}: cannot be written ({failure.strerror}: {failure.filename}); choose a folder that can") from failure

    def _won(self) -> dict[str, Any]:
        me = identity()
        for _ in range(_ATTEMPTS):
            if _publish(self._path, me):
                return me
            owner, age = _read(self._path), _age_seconds(self._path)
            if owner is None or age is None:
                continue  # let go of in this moment
            if not is_dead(owner, age, me) and not self._falls_silent(owner, me):
                raise CheckpointError(
                    f"{self._path.parent}: is in use by process {owner.get('process')} on host {owner.get('host')}. Wait for that run or stop it, "
                    "or choose another run_dir"
                )
            self._remove(owner)
        raise CheckpointError(f"{self._path}: other runs take and leave this folder all the time; start one of them")

    def _falls_silent(self, owner: dict[str, Any], me: dict[str, Any]) -> bool:
        """Watch an owner on another machine until it gives a sign of life, or gave none for too long."""
        if owner.get("machine") == me["machine"]:
            return False
        print(f"{self._path}: looking whether process {owner.get('process')} on host {owner.get('host')} is alive, for up to {STALE_SECONDS:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        last_sign = _modified(self._path)
        while (age := _age_seconds(self._path)) is not None and age <= STALE_SECONDS:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            if signals.is_held():
                signals.release()  # nothing is begun that a signal would have to wait for: the process ends by it
            if _modified(self._path) != last_sign:
                return _read(self._path) is None  # let go of; or it lives, or another one was faster
        return True

    def _remove(self, owner: dict[str, Any]) -> None:
        """Take a dead owner's lock away. By a rename, so that of two who see it dead one gets it; what turns out to be another one's is put back."""
        taken = self._path.with_name(f".{FILE_NAME}.{uuid.uuid4().hex}.tmp")
        try:
            os.rename(self._path, taken)
        except FileNotFoundError:
            return
        if _read(taken) != owner:
            with contextlib.suppress(FileExistsError):
                os.link(taken, self._path)
        taken.unlink()

    def _renew(self) -> None:
        """The sign of life. Whoever finds the lock in another's hands was thought dead (a machine that stood still), and must not write any more."""
        while not self._ended.wait(BEAT_SECONDS):
            try:
                found = _read(self._path)
                if found == self._mine:
                    os.utime(self._path)
                elif found is None:
                    _publish(self._path, self._mine)  # somebody removed it by hand
            except OSError:  # the file system is away for now; the next beat tells
                continue
            if found is not None and found != self._mine:
                print(f"error: {self._path.parent}: was taken over by process {found.get('process')} on host {found.get('host')}; this run ends here, unsaved",
                      file=sys.stderr, flush=True)  # fmt: skip
                os._exit(EXIT_REFUSED)


def is_dead(owner: dict[str, Any], age_seconds: float, me: dict[str, Any]) -> bool:
    """Whether the owner of a lock has ended.

    Args:
        owner, me: as `identity` gives them.
        age_seconds: of its last sign of life.
    """
    if owner.get("job") is not None and owner["job"] == me["job"] and owner.get("restarts") != me["restarts"]:
        return True
    if owner.get("machine") == me["machine"]:
        return lifeline.birth(owner.get("process", 0)) != owner.get("process_start")
    return age_seconds > STALE_SECONDS


def identity() -> dict[str, Any]:
    """This process, so that others can tell whether it lives."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_start": lifeline.birth(os.getpid()),
        "machine": _machine(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": time.time(),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str | None:
    """What is the same for processes that see each other's numbers: a boot of a machine, and a namespace of process numbers (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: only the sign of life counts
        return f"{socket.gethostname()} {uuid.uuid4().hex}"


def _publish(path: Path, content: dict[str, Any]) -> bool:
    """Make the lock file, with its content, unless there is one."""
    temporary = path.with_name(f".{FILE_NAME}.{content['token']}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _create(path, temporary.read_bytes())
    finally:
        temporary.unlink()


def _clear_leftovers(path: Path) -> None:
    """What processes left that were killed while they looked at the lock; another one's that is looking now is too young."""
    for leftover in path.parent.glob(f".{FILE_NAME}.*.tmp"):
        age = _age_seconds(leftover)
        if age is not None and age > STALE_SECONDS:
            leftover.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    os.write(descriptor, content)
    os.close(descriptor)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """A lock's content; None where there is no lock, {} for one that cannot be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _age_seconds(path: Path) -> float | None:
    """How old a file is by the clock of the file system it lies on; None where it is gone."""
    now = path.with_name(f".{FILE_NAME}.{uuid.uuid4().hex}.tmp")
    now.touch()
    try:
        modified = _modified(path)
        return None if modified is None else now.stat().st_mtime - modified
    finally:
        now.unlink()
