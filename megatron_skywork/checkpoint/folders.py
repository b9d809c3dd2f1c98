"""Where the checkpoints of a run lie, what a save that died leaves there, and which folders are kept.

    checkpoints/step_00001000/            a checkpoint: it gets this name by a rename, when everything in it is on the disk
    checkpoints/.step_00001000.partial/   one that is being written, or was when its writers died; it never counts
    checkpoints/.step_00001000.replaced/  a damaged one, in the moment in which a whole one takes its place
    checkpoints/latest                    the name of the newest, for people; nothing here reads it
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_skywork.convert.files.marker import MARKER, check_marker, is_complete
from megatron_skywork.errors import CheckpointError

LATEST = "latest"


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def staging_of(folder: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return folder.with_name(f".{folder.name}.partial")


def replaced_of(folder: Path) -> Path:
    """Where a checkpoint that another one replaces waits for its removal."""
    return folder.with_name(f".{folder.name}.replaced")


def step_folders(run_dir: Path) -> list[Path]:
    """Folders that have a checkpoint's name, oldest first, whatever is in them."""
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step_*") if folder.is_dir())


def complete_folders(run_dir: Path) -> list[Path]:
    """Folders with a completion marker, oldest first."""
    return [folder for folder in step_folders(run_dir) if is_complete(folder)]


def clear_leftovers(run_dir: Path) -> None:
    """Remove what saves that died have left behind; the one who holds the run may."""
    for path in (run_dir / "checkpoints").glob(".*"):
        if path.name.endswith((".partial", ".replaced")):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)


def retain(run_dir: Path, keep: int, saved: Path, verified: Collection[Path]) -> list[Path]:
    """Remove all but the newest `keep` folders up to `saved`, the one just written; the newest of `verified` stays, though newer ones fill the number.

    A folder of a later step was passed over as damaged when this run started; counted as one to keep, it could push out the good ones. So could a folder
    that has lost a file since.

    Args:
        verified: resolved paths of folders whose every byte was compared with its hash, at the start or after it was written.

    Returns:
        what was removed.

    Raises:
        OSError: something could not be removed, or not even looked at, and then nothing was.
    """
    whole = [folder for folder in complete_folders(run_dir) if folder == saved or (folder.name < saved.name and _has_its_files(folder))]
    known_good = [folder for folder in whole if folder.resolve() in verified]
    removed = [folder for folder in step_folders(run_dir) if folder not in whole[-keep:] + known_good[-1:]]
    for folder in removed:
        # The marker goes first: a removal that is interrupted must not leave a folder that looks whole.
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return removed


def _has_its_files(folder: Path) -> bool:
    try:
        check_marker(folder)
    except CheckpointError as damage:
        if isinstance(damage.__cause__, OSError):  # a disk that cannot be read now says nothing of what lies there
            raise damage.__cause__ from None
        return False
    return True
