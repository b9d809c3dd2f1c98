"""Where a result goes: what may be replaced there, and whether it fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_skywork.convert.files.marker import MARKER
from megatron_skywork.convert.progress import human
from megatron_skywork.errors import CheckpointError

_OURS = (MARKER, "manifest.json", "model.safetensors", "model.safetensors.index.json")


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse to write over what is there, unless it is a checkpoint folder and the user said so.

    Raises:
        CheckpointError: `out` exists and `overwrite` is false, or it holds something that is no checkpoint.
    """
    if not os.path.lexists(out):
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


def free_bytes(out: Path) -> int:
    """Free space on the disk where `out` will lie."""
    return shutil.disk_usage(next(folder for folder in [out.absolute(), *out.absolute().parents] if os.path.isdir(folder))).free


def check_space(out: Path, needed_bytes: int) -> None:
    """Refuse what does not fit.

    Raises:
        CheckpointError: names both numbers.
    """
    free = free_bytes(out)
    if needed_bytes > free:
        raise CheckpointError(f"{out}: needs {human(needed_bytes)}, and {human(free)} are free on that disk; free some, or choose another --out")
