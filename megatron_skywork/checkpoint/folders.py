"""Where the checkpoints of a run lie, which of them is the newest that is whole, and which are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_skywork.convert.files.marker import check_marker, is_complete
from megatron_skywork.errors import CheckpointError


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_folders(run_dir: Path) -> list[Path]:
    """Folders with a completion marker, oldest first."""
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step_*") if is_complete(folder))


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest folder whose files are all there in full size, and a line about each newer one that was passed over."""
    passed_over = []
    for folder in reversed(complete_folders(run_dir)):
        try:
            check_marker(folder)
        except CheckpointError as damage:
            passed_over.append(str(damage))
            continue
        return folder, passed_over
    return None, passed_over


def retain(run_dir: Path, keep: int, saved: Path) -> list[Path]:
    """Remove all but the newest `keep` complete folders up to `saved`, the one just written, and what died saves left behind.

    A folder of a later step was passed over as damaged when this run started; counted as one to keep, it could push out the good ones.
    """
    complete = [folder for folder in complete_folders(run_dir) if folder.name <= saved.name]
    removed = [folder for folder in (run_dir / "checkpoints").glob("step_*") if folder not in complete[-keep:]]
    for folder in removed:
        # The marker goes first: a removal that is interrupted must not leave a folder that looks whole.
        (folder / "complete.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
    return removed
