"""An output folder is absent or complete: everything is written into a hidden folder beside it, which is renamed when all is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from megatron_skywork.convert.marker import MARKER, fsync_folder
from megatron_skywork.errors import CheckpointError

_OURS = (MARKER, "manifest.json", "model.safetensors", "model.safetensors.index.json")


class Staging:
    """`with Staging(out, overwrite) as folder:` write into `folder`; at the end it becomes `out`, or, after an exception, nothing.

    Leftovers of a process that was killed are removed when the next one starts.

    Raises:
        CheckpointError: `out` exists and `overwrite` is false, or it holds something that is no checkpoint.
    """

    def __init__(self, out: Path | str, overwrite: bool = False):
        self.out = Path(os.path.abspath(out))
        self._overwrite = overwrite
        self._folder = self.out.parent / f".{self.out.name}.partial-{os.getpid()}"
        check_replaceable(self.out, overwrite)

    def __enter__(self) -> Path:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in self.out.parent.glob(f".{self.out.name}.partial-*"):
            if not _alive(leftover.name.rpartition("-")[2]):
                shutil.rmtree(leftover)
        self._folder.mkdir()
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self._folder)
            return
        old = self.out.parent / f".{self.out.name}.old-{os.getpid()}"
        if self.out.exists():
            check_replaceable(self.out, self._overwrite)
            os.rename(self.out, old)
        os.rename(self._folder, self.out)
        fsync_folder(self.out.parent)
        if old.exists():
            shutil.rmtree(old)


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse to write over what is there, unless it is a checkpoint folder and the user said so."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise CheckpointError(f"{out}: exists and is not a folder; choose another --out")
    if not any(out.iterdir()):
        out.rmdir()
        return
    if not overwrite:
        raise CheckpointError(f"{out}: exists; choose another --out, or give --overwrite")
    if not any((out / name).exists() for name in _OURS):
        raise CheckpointError(f"{out}: exists and is no checkpoint folder, so --overwrite does not apply to it; choose another --out")


def _alive(process: str) -> bool:
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
