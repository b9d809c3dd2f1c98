"""Which checkpoints are kept, what dead saves leave behind, and whether there is room: rules over names and sizes, without a single tensor."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from megatron_skywork.checkpoint import space
from megatron_skywork.checkpoint.folders import clear_leftovers, complete_folders, folder_of, retain
from megatron_skywork.config.schema import Config
from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.errors import CheckpointError

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 100}


def make(run_dir: Path, *steps: int) -> list[Path]:
    folders = [folder_of(run_dir, step) for step in steps]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("weights")
        write_marker(folder)
    return folders


def left(run_dir: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in sorted((run_dir / "checkpoints").glob("step_*"))]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folders = make(tmp_path, 2, 4, 6, 8)
    assert retain(tmp_path, 2, folders[3], {folders[3].resolve()}) == folders[:2]
    assert left(tmp_path) == [6, 8]


def test_the_last_verified_folder_stays_though_newer_ones_fill_the_number(tmp_path: Path) -> None:
    folders = make(tmp_path, 2, 4, 6, 8)
    retain(tmp_path, 1, folders[3], {folders[0].resolve(), folders[1].resolve()})
    assert left(tmp_path) == [4, 8]
    retain(tmp_path, 1, folders[3], {folders[1].resolve(), folders[3].resolve()})
    assert left(tmp_path) == [8]


def test_folders_that_are_not_whole_do_not_count(tmp_path: Path) -> None:
    folders = make(tmp_path, 2, 4, 6, 8, 9)
    (folders[1] / "complete.json").unlink()
    (folders[2] / "weights").write_text("cut")
    retain(tmp_path, 2, folders[3], ())
    assert left(tmp_path) == [2, 8], "4 has no marker, 6 a file that was cut off, and 9 belongs to a time that was given up"


def test_a_disk_that_cannot_be_read_now_costs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = make(tmp_path, 2, 4, 6)
    plain = Path.read_text

    def read(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "complete.json" and path.parent in unreadable:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)
    unreadable = {folders[1]}
    with pytest.raises(OSError, match="Input/output error"):
        retain(tmp_path, 1, folders[2], {folders[1].resolve()})
    assert left(tmp_path) == [2, 4, 6]
    unreadable = {folders[2]}
    retain(tmp_path, 1, folders[2], ())
    assert left(tmp_path) == [6], "the one just written stays, whatever the disk says of it now"


def test_leftovers_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    (folder,) = make(tmp_path, 2)
    for name in (".step_00000004.partial", ".step_00000002.replaced", ".someone_else"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "file").write_text("")
    for name in (".latest.tmp", "latest"):
        (folder.parent / name).write_text("")
    assert complete_folders(tmp_path) == [folder]
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".someone_else", "latest", folder.name]
    clear_leftovers(tmp_path / "no run there")


def configured(run_dir: Path, steps: int = 100, **checkpoint: Any) -> Config:
    return Config(**{"run_dir": str(run_dir), "model": MODEL, "data": {"mock": True, "seq_length": 16},
                     "train": {"steps": steps, "global_batch_size": 8, "micro_batch_size": 1}, "checkpoint": checkpoint})  # fmt: skip


@pytest.mark.parametrize(
    "settings, there, step, at_once",
    [
        ({"every": 10, "keep": 2}, [], 0, 3),
        ({"every": 10, "keep": 2}, [10, 20], 20, 1),  # two lie there, so one more
        ({"every": 10, "keep": 2}, [10, 20], 100, 0),  # nothing is left to do
        ({"every": 0, "keep": 2}, [], 0, 1),
        ({"every": 50, "keep": 4}, [], 0, 2),
    ],
)
def test_room_is_needed_for_what_lies_there_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], there: list[int], step: int, at_once: int
) -> None:
    make(tmp_path, *there)
    config = configured(tmp_path, **settings)
    needed = at_once * space.estimated_bytes(config)
    monkeypatch.setattr(space, "free_bytes", lambda folder: needed)
    assert space.problem_before_training(config, step) is None
    monkeypatch.setattr(space, "free_bytes", lambda folder: needed - 1)
    problem = space.problem_before_training(config, step)
    if at_once:
        assert problem is not None and "checkpoint.keep" in problem and str(tmp_path) in problem
    else:
        monkeypatch.setattr(space, "free_bytes", lambda folder: 0)
        assert space.problem_before_training(config, step) is None


def test_a_save_that_cannot_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda folder: 5 << 30)
    space.check_space_for_save(tmp_path, 4 << 30)
    with pytest.raises(CheckpointError, match=r"needs 6\.1 GiB, and 5\.0 GiB are free"):
        space.check_space_for_save(tmp_path, 6 << 30)
