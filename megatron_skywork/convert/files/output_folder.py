"""Where a result goes: what may be replaced there, and whether it fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_skywork.convert.files.checkpoint_folder import MANIFEST
from megatron_skywork.convert.files.marker import MARKER, list_files, seal_holds
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.progress import human
from megatron_skywork.errors import CheckpointError

_SHOWN = 5


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse to write over what is there, unless the user said so and every file of it was written by a conversion: its manifest or marker lists them all.

    Raises:
        CheckpointError: `out` exists and `overwrite` is false, or it holds something that no conversion wrote.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise CheckpointError(f"{out}: exists and is not a folder; choose another --out")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{out}: exists; choose another --out, or give --overwrite")
    written = _written_by_us(out)
    if written is None:
        raise CheckpointError(f"{out}: exists and is no checkpoint folder of this project, so --overwrite does not apply to it; choose another --out")
    others = [name for name in list_files(out) if name not in written]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise CheckpointError(
            f"{out}: holds {', '.join(others[:_SHOWN])}{more}, which no conversion wrote and --overwrite would delete; move it, or choose another --out"
        )


def _written_by_us(out: Path) -> set[str] | None:
    """Names that the folder's marker and sealed manifest list, with theirs; None where there is neither."""
    found: set[str] = set()
    try:
        if (out / MARKER).is_file():
            found |= {MARKER, *json_object(out / MARKER)}
        if (out / MANIFEST).is_file():
            content, text = json_object(out / MANIFEST), (out / MANIFEST).read_text(encoding="utf-8")
            if seal_holds(text, content) and isinstance(content.get("files"), dict):
                found |= {MANIFEST, *content["files"]}
    except (CheckpointError, UnicodeDecodeError):  # damaged, so it says nothing
        return None
    return found or None


def check_outside(out: Path | str, source: Path) -> None:
    """Refuse to write into the folder that is read.

    Raises:
        CheckpointError: `out` lies below `source`.
    """
    if source.is_dir() and Path(out).resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{out}: lies in {source}, which is read; choose another --out")


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
