"""The hidden folder of a conversion: its journal, its lock, and every place at which a process can be killed while the folder gets its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_skywork.convert.files.marker import sealed
from megatron_skywork.convert.files.output_folder import check_replaceable, check_space, free_bytes
from megatron_skywork.convert.streaming.file_writer import FileRecord
from megatron_skywork.convert.streaming.staged import Staged
from megatron_skywork.errors import CheckpointError

OLD, NEW = sealed({"old": 3, "files": {"file": {}}}), "new"


def checkpoint(folder: Path, text: str = OLD) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


def written(out: Path, plan: str = "plan", overwrite: bool = False) -> Staged:
    """A staged folder with one finished file."""
    staged = Staged(out, plan, overwrite)
    staged.open()
    (staged.content / "file").write_text(NEW)
    staged.record("file", FileRecord(3, "hash"))
    return staged


def killed(staged: Staged) -> None:
    """What the kernel does for a process that dies."""
    staged.leave()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_absent_until_it_is_complete_and_leaves_nothing_beside_it(tmp_path: Path):
    staged = written(tmp_path / "a" / "out")
    assert names(tmp_path / "a") == [".out.partial"]
    staged.commit()
    assert names(tmp_path / "a") == ["out"] and (tmp_path / "a" / "out" / "file").read_text() == NEW


def test_the_journal_outlives_its_process(tmp_path: Path):
    staged = written(tmp_path / "out")
    staged.record("source/1-code/model.safetensors", FileRecord(7, "other"))
    killed(staged)
    again = Staged(tmp_path / "out", "plan")
    assert again.open()
    assert again.recorded("file") == FileRecord(3, "hash") and again.recorded("none") is None
    assert again.recorded("source/1-code/model.safetensors") == FileRecord(7, "other")
    assert (again.content / "file").read_text() == NEW


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"bytes": 3}', '{"bytes": "x", "sha256": ""}', "null"])
def test_a_damaged_entry_counts_as_none(text: str, tmp_path: Path):
    staged = written(tmp_path / "out")
    (tmp_path / ".out.partial" / "done" / "file").write_text(text)
    assert staged.recorded("file") is None


def test_another_plan_starts_anew(tmp_path: Path):
    killed(written(tmp_path / "out"))
    again = Staged(tmp_path / "out", "another plan")
    assert not again.open()
    assert again.recorded("file") is None and names(again.content) == []


@pytest.mark.parametrize("lost", ["plan", "content"])
def test_a_folder_that_was_killed_while_it_was_made_starts_anew(lost: str, tmp_path: Path):
    killed(written(tmp_path / "out"))
    path = tmp_path / ".out.partial" / lost
    path.unlink() if path.is_file() else (path / "file").unlink()
    if path.is_dir():
        path.rmdir()
    again = Staged(tmp_path / "out", "plan")
    assert not again.open()
    assert names(again.content) == [] and again.recorded("file") is None


def test_what_is_half_written_goes(tmp_path: Path):
    staged = written(tmp_path / "out")
    (staged.content / "half").write_text("ha")
    (staged.content / "hf").mkdir()
    (staged.content / "hf" / "config.json").write_text("{}")
    (staged.content / "complete.json").write_text("{}")
    staged.keep({"file", "not there yet"})
    assert names(staged.content) == ["file"]


# -------------------------------------------------------------------------------------------------------------------------------- lock


def test_one_process_writes_at_a_time(tmp_path: Path):
    first = written(tmp_path / "out")
    second = Staged(tmp_path / "out", "another plan")
    with pytest.raises(CheckpointError, match="another process is writing it now"):
        second.open()
    second.remove_if_taken()
    assert first.recorded("file") is not None and (first.content / "file").is_file(), "the one that is refused takes nothing away"
    first.leave()
    assert Staged(tmp_path / "out", "plan").open()


def test_the_lock_ends_with_its_process(tmp_path: Path):
    code = """
import os, sys
from megatron_skywork.convert.streaming.staged import Staged
Staged(sys.argv[1], "plan").open()
os._exit(9)
"""
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd=root).returncode == 9
    assert Staged(tmp_path / "out", "plan").open()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    written(tmp_path / "out").commit()
    assert names(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------------------------ what is there already


def test_only_a_checkpoint_is_replaced_and_only_when_asked(tmp_path: Path):
    with pytest.raises(CheckpointError, match="--overwrite"):
        Staged(checkpoint(tmp_path / "old"), "plan").open()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter").write_text("dear")
    with pytest.raises(CheckpointError, match="is no checkpoint folder"):
        Staged(tmp_path / "letters", "plan", True).open()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(CheckpointError, match="not a folder"):
            Staged(tmp_path / name, "plan", True).open()
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path):
    (tmp_path / "out").mkdir()
    written(tmp_path / "out").commit()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path: Path):
    checkpoint(tmp_path / "out")
    staged = written(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["manifest.json"]
    staged.commit()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


def test_who_comes_to_be_there_meanwhile_is_not_replaced(tmp_path: Path):
    staged = written(tmp_path / "out")
    checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        staged.commit()
    assert (tmp_path / "out" / "manifest.json").read_text() == OLD


def kill_at(call: int, staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit, and die at the given rename (from 0), or behind the last one."""
    plain, calls = os.rename, []

    class Killed(BaseException):
        pass

    def rename(source: Path, target: Path) -> None:
        if len(calls) == call:
            raise Killed
        calls.append(target)
        plain(source, target)

    def stop(self: Staged) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "rename", rename)
        patched.setattr(Staged, "remove", stop)
        staged.commit()
    killed(staged)


def test_killed_before_the_first_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint(tmp_path / "out")
    kill_at(0, written(tmp_path / "out", overwrite=True), monkeypatch)
    assert (tmp_path / "out" / "manifest.json").read_text() == OLD
    again = Staged(tmp_path / "out", "plan", True)
    assert again.open() and again.recorded("file") is not None
    again.commit()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("plan", ["plan", "another plan"])
def test_killed_between_the_renames_the_old_checkpoint_comes_back(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint(tmp_path / "out")
    kill_at(1, written(tmp_path / "out", overwrite=True), monkeypatch)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="--overwrite"):
        Staged(tmp_path / "out", plan).open()
    assert (tmp_path / "out" / "manifest.json").read_text() == OLD
    again = Staged(tmp_path / "out", plan, True)
    assert again.open() == (plan == "plan")
    again.remove_if_taken()  # a refusal
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "manifest.json").read_text() == OLD


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_behind_the_last_rename_the_new_checkpoint_stays(replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if replaced:
        checkpoint(tmp_path / "out")
    kill_at(2, written(tmp_path / "out", overwrite=replaced), monkeypatch)
    assert names(tmp_path) == [".out.partial", "out"]
    with pytest.raises(CheckpointError, match="exists"):
        Staged(tmp_path / "out", "plan").check_out()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"], "what is left is cleared away by whoever comes next"


def test_the_same_command_over_its_own_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint(tmp_path / "out")
    kill_at(2, written(tmp_path / "out", overwrite=True), monkeypatch)
    (tmp_path / "out" / "manifest.json").write_text(OLD)
    again = Staged(tmp_path / "out", "plan", True)
    assert not again.open() and again.content.is_dir()


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    staged = written(tmp_path / "out")
    (staged.content / "hf").mkdir()
    (staged.content / "hf" / "config.json").write_text("{}")
    synced: list[str] = []
    plain_sync, plain_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        plain_sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        assert {str(path) for path in [staged.content, *staged.content.rglob("*")]} <= set(synced)
        synced.clear()
        plain_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    staged.commit()
    assert str(tmp_path) in synced, "and the rename itself, after it"


# -------------------------------------------------------------------------------------------------------------------------------- space


def test_a_place_that_cannot_be_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    places: list[Callable[[], Path]] = [lambda: tmp_path / "file" / "out", lambda: tmp_path / ("x" * 250), lambda: tmp_path / ("x" * 300)]
    for place in places:
        with pytest.raises(CheckpointError, match="cannot be written there"):
            Staged(place(), "plan").open()
        assert free_bytes(place()) > 0
    assert names(tmp_path) == ["file"]


def test_space_is_asked_of_the_disk_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    asked: list[str] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(str(path)) or usage._replace(free=5 << 30))
    check_space(tmp_path / "not" / "yet", 5 << 30)
    with pytest.raises(CheckpointError, match=r"needs 6\.0 GiB, and 5\.0 GiB are free"):
        check_space(tmp_path / "not" / "yet", 6 << 30)
    assert asked == [str(tmp_path)] * 2


@pytest.mark.parametrize("by", ["complete.json", "manifest.json"])
def test_only_what_a_conversion_wrote_is_replaced(by: str, tmp_path: Path):
    """Its marker or its sealed manifest lists the files; a name alone says nothing, and whatever is not listed is not deleted."""
    out = tmp_path / "out"
    (out / "hf").mkdir(parents=True)
    for name in ("weights", "hf/config.json"):
        (out / name).write_text("x")
    listed = {"weights": 1, "hf/config.json": 1}
    (out / by).write_text(json.dumps(listed) if by == "complete.json" else sealed({"files": listed}))
    check_replaceable(out, True)
    with pytest.raises(CheckpointError, match="--overwrite"):
        check_replaceable(out, False)
    (out / "hf" / "thesis.tex").write_text("do not lose")
    with pytest.raises(CheckpointError, match="hf/thesis.tex, which no conversion wrote"):
        check_replaceable(out, True)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"name": "a web application"}', '{"files": {"thesis.tex": 1}}'])
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_file_that_only_has_the_name_of_one_of_ours_opens_no_folder(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    (tmp_path / "thesis.tex").write_text("do not lose")
    with pytest.raises(CheckpointError, match="does not apply to it"):
        check_replaceable(tmp_path, True)


def test_an_empty_folder_stays_until_it_is_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    check_replaceable(tmp_path / "out", False)
    assert names(tmp_path) == ["out"]
    written(tmp_path / "out").commit()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]
