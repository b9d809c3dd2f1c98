"""What children of the warm process do on a disk that fills up: a file takes the room at a chosen moment, so that it is the kernel that refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from convert_bodies import convert, make_dense
from run_bodies import run_command


def fill(filler: Path, left: int) -> None:
    """Take all room but so many bytes."""
    with open(filler, "wb", buffering=0) as file:
        free = os.statvfs(filler.parent)
        todo = max(free.f_bavail * free.f_frsize - left, 0)
        while todo > 0:
            todo -= file.write(bytes(min(todo, 1 << 16)))


def run_on_a_disk_that_fills(config: str, filler: str, left: int, full_at: int, free_at: int, unseen: bool) -> None:
    """A run that finds the disk full in the save of one step and emptied before that of another.

    Args:
        unseen: it fills up after the save has looked how much is free.
    """
    from megatron_skywork.checkpoint import save
    from megatron_skywork.train.training import Training

    plain_save, plain_check = Training.save, save.check_space_for_save

    def at_a_save(self: Any) -> None:
        if self.state.step == free_at and Path(filler).exists():
            self.settle_save(wait=True)
            Path(filler).unlink()
            _note_what_is_newest(Path(self.config.run_dir))
        if self.state.step == full_at and not unseen:
            self.settle_save(wait=True)
            fill(Path(filler), left)
        plain_save(self)

    def look_and_fill(folder: Path, tensor_bytes: int) -> None:
        plain_check(folder, 0 if Path(filler).exists() else tensor_bytes)
        if folder.name == f"step_{full_at:08d}":
            fill(Path(filler), left)

    Training.save = at_a_save
    if unseen:
        save.check_space_for_save = look_and_fill
    run_command(config)


def _note_what_is_newest(run_dir: Path) -> None:
    """Beside what this process says."""
    from megatron_skywork.checkpoint.verify import newest

    folder, _ = newest(run_dir)
    said = Path(os.readlink("/proc/self/fd/1"))
    said.with_suffix(".when-freed").write_text(folder.name if folder else "none")
    sys.stdout.flush()


def run_on_a_full_disk(config: str, filler: str, left: int) -> None:
    fill(Path(filler), left)
    run_command(config)


def naive_run_on_a_disk_that_fills(run_dir: str, steps: int, filler: str, left: int, full_at: int) -> None:
    """The naive run, whose disk is full when it saves one step."""
    import run_bodies

    plain = run_bodies.naive_save

    def save(run_dir: Path, step: int, weights: Any, moments: Any) -> None:
        if step == full_at:
            fill(Path(filler), left)
        plain(run_dir, step, weights, moments)

    run_bodies.naive_save = save
    run_bodies.naive_run(run_dir, steps)


def make_source(place: str) -> None:
    make_dense(Path(place, "dense"))


def convert_on_a_full_disk(root: str, out: str, filler: str, left: int, unseen: bool) -> None:
    """A conversion that finds no room, or finds it gone after it has looked."""
    from megatron_skywork.convert.streaming import run

    plain = run.check_space
    if unseen:
        run.check_space = lambda folder, needed: (plain(folder, needed), fill(Path(filler), left))[0]
    else:
        fill(Path(filler), left)
    raise SystemExit(convert(Path(root, "dense"), Path(out)))
