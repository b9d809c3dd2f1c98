"""An output folder that is absent or complete, and whose making can be interrupted anywhere: a hidden folder beside it, with a journal of finished files.

    .OUT.partial/lock       held by the process that writes; the kernel lets go of it when the process dies, however it dies
    .OUT.partial/plan       what is being made from what, as a hash; another plan starts anew
    .OUT.partial/done/NAME  the journal: size and SHA-256 of a file that is on the disk
    .OUT.partial/content/   what becomes OUT, by one rename
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_skywork.convert.files.marker import fsync
from megatron_skywork.convert.files.output_folder import check_replaceable
from megatron_skywork.convert.streaming.file_writer import FileRecord
from megatron_skywork.errors import CheckpointError


class Staged:
    """The hidden folder of an output.

    Args:
        out: folder to make.
        plan: hash of everything that decides what is written.
        overwrite: whether `out` may be a checkpoint that is replaced.
    """

    def __init__(self, out: Path | str, plan: str, overwrite: bool = False):
        self.out, self._plan, self._overwrite = Path(os.path.abspath(out)), plan, overwrite
        self._folder = self.out.parent / f".{self.out.name}.partial"
        self.content, self._done = self._folder / "content", self._folder / "done"
        self._lock: int | None = None

    def open(self) -> bool:
        """Take the folder, empty unless an interrupted conversion with the same plan left it; returns whether one did.

        Raises:
            CheckpointError: `out` exists and must not be replaced, or another process is writing it.
        """
        self.check_out()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.out}: cannot be written there ({error.strerror}); choose another --out") from error
        self._take_lock()
        plan = self._folder / "plan"
        resumed = self.content.is_dir() and plan.is_file() and plan.read_text(encoding="utf-8") == self._plan
        if not resumed:
            for part in (plan, self.content, self._done):
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
            self.content.mkdir()
            self._done.mkdir()
            _write_durably(plan, self._plan)
        return resumed

    def check_out(self) -> None:
        """Refuse to write over what is there, once the end of a conversion that was killed between two renames is made good.

        Raises:
            CheckpointError: as `open`.
        """
        if os.path.isdir(self._folder):
            self._take_lock()
            if (self._folder / "old").exists() and not self.out.exists():
                os.rename(self._folder / "old", self.out)
            elif self.out.exists() and not self.content.exists():
                self.remove()
            self.leave()
        check_replaceable(self.out, self._overwrite)

    def _take_lock(self) -> None:
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.leave()
            raise CheckpointError(f"{self.out}: another process is writing it now; wait for it, or choose another --out") from error
        except OSError:
            pass  # a file system without locks: two writers of one plan write the same bytes

    def keep(self, names: Collection[str]) -> None:
        """Delete whatever else an interrupted conversion left in `content`: files that were half written, and what lies beside the weights."""
        for path in self.content.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def recorded(self, name: str) -> FileRecord | None:
        """A file of `content` (or of the source, by another name) that was finished before.

        Raises:
            OSError: the journal cannot be read, which does not say that the file was not finished.
        """
        try:
            entry = json.loads((self._done / _flat(name)).read_text(encoding="utf-8"))
            return FileRecord(int(entry["bytes"]), str(entry["sha256"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def record(self, name: str, made: FileRecord) -> None:
        """Note that a file is whole and on the disk."""
        _write_durably(self._done / _flat(name), json.dumps({"bytes": made.num_bytes, "sha256": made.sha256}))

    def commit(self) -> None:
        """`content` becomes `out`, by a rename, once all of it is on the disk; what was there goes."""
        check_replaceable(self.out, self._overwrite)
        for path in [*self.content.rglob("*"), self.content]:
            fsync(path)
        old = self._folder / "old"
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(self.content, self.out)
        fsync(self.out.parent)
        self.remove()

    def remove_if_taken(self) -> None:
        """As `remove`, unless the folder is another process's."""
        if self._lock is not None:
            self.remove()

    def remove(self) -> None:
        """Nothing is left beside the output."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.leave()

    def leave(self) -> None:
        """Let go of the lock; what is there waits for the same command."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _flat(name: str) -> str:
    return name.replace("/", "%")


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
