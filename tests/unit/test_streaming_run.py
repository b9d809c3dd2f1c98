"""Conversions that are disturbed: by other numbers of workers, full disks, damaged sources, an interrupt; and what a second attempt makes of it."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_folders import MODEL, random_tensors, write_hf

from megatron_skywork.convert.check.verify_manifest import verify_folder
from megatron_skywork.convert.export_hf import export_hf
from megatron_skywork.convert.files.hf_files import HfReader
from megatron_skywork.convert.files.marker import list_files, sealed
from megatron_skywork.convert.import_hf import import_hf
from megatron_skywork.convert.reshard import reshard
from megatron_skywork.convert.streaming import file_writer, run
from megatron_skywork.convert.streaming.file_writer import FileWriter
from megatron_skywork.convert.streaming.ranks import PeerFailed, Ranks
from megatron_skywork.convert.streaming.run import Options
from megatron_skywork.convert.upcycling.options import UpcycleOptions
from megatron_skywork.convert.upcycling.upcycle import Output, upcycle
from megatron_skywork.errors import CheckpointError

FILE_BYTES = 3000
GRANULAR = UpcycleOptions(num_experts=8, topk=4, granularity=2, shared_expert_ffn=8)
METHODS = {
    "noise": UpcycleOptions(num_experts=4, noise=0.1),
    "drop": UpcycleOptions(num_experts=4, drop_ratio=0.5),
    "granular": UpcycleOptions(num_experts=8, topk=4, granularity=2, shared_expert_ffn=8, noise=0.2, router_init="orthogonal"),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("dense") / "dense", random_tensors(MODEL, None), MODEL, None, "llama", shards=2)


@pytest.fixture(autouse=True)
def nothing_left_running():
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads


def make(dense: Path, out: Path, method: UpcycleOptions = GRANULAR, form: str = "mcore", **options: Any) -> dict[str, Any]:
    accept = options.pop("accept", None)
    return upcycle(dense, out, method, Output(form, file_bytes=FILE_BYTES), Options(**options), accept)


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def journal(out: Path) -> set[str]:
    return {path.name for path in (out.parent / f".{out.name}.partial" / "done").iterdir()}


def times(out: Path) -> dict[str, int]:
    """When each finished file was written."""
    folder = out.parent / f".{out.name}.partial" / "content"
    return {name: (folder / name).stat().st_mtime_ns for name in journal(out) if (folder / name).is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_at(monkeypatch: pytest.MonkeyPatch, file: int, error: Callable[[], BaseException]) -> None:
    """The file that is finished as the given one (from 0) fails, and all after it."""
    plain, finished = FileWriter.finish, []

    def finish(self: FileWriter) -> file_writer.FileRecord:
        finished.append(self)
        if len(finished) > file:
            raise error()
        return plain(self)

    monkeypatch.setattr(FileWriter, "finish", finish)


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__0_3.distcp")


# ------------------------------------------------------------------------------------------------------------------------------ workers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["mcore", "hf"])
def test_any_number_of_workers_writes_the_same_bytes(form: str, method: str, dense: Path, tmp_path: Path):
    for workers in (1, 2, 5):
        made = make(dense, tmp_path / str(workers), METHODS[method], form, workers=workers)
        assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / str(workers)).glob("*.distcp" if form == "mcore" else "*.safetensors"))
    expected = content(tmp_path / "1")
    assert len(expected) > 10 and content(tmp_path / "2") == expected and content(tmp_path / "5") == expected
    assert verify_folder(tmp_path / "1", [str(dense)], io.StringIO(), True)["passed"]


def test_import_export_and_reshard_with_any_number_of_workers(dense: Path, tmp_path: Path):
    for workers in (1, 5):
        base, options = tmp_path / str(workers), Options(workers=workers)
        import_hf(dense, base / "ours", options, FILE_BYTES)
        export_hf(tmp_path / "1" / "ours", base / "hf", options=options, shard_bytes=FILE_BYTES)
        reshard(tmp_path / "1" / "ours", base / "cut", 2, options=options, file_bytes=FILE_BYTES)
    assert content(tmp_path / "5") == content(tmp_path / "1")


def test_torch_keeps_its_threads(dense: Path, tmp_path: Path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        make(dense, tmp_path / "out", workers=2, accept=lambda folder: {"threads": torch.get_num_threads()})
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("finished", [0, 1, 5])
def test_a_full_disk_keeps_what_is_finished(finished: int, workers: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    make(dense, tmp_path / "whole")
    with monkeypatch.context() as patched:
        fail_at(patched, finished, no_space)
        with pytest.raises(OSError, match="No space left"):
            make(dense, out, workers=workers)
    assert not out.exists()
    before = times(out)
    assert len(before) == finished
    written: list[str] = []
    plain = FileWriter.__init__
    monkeypatch.setattr(FileWriter, "__init__", lambda self, path, *args: written.append(path.name) or plain(self, path, *args))
    told = io.StringIO()
    assert make(dense, out, workers=workers, progress=told)["resumed_files"] == finished
    assert not set(written) & set(before) and (f"going on, {finished} of" in told.getvalue()) == (finished > 0)
    assert content(out) == content(tmp_path / "whole") and names(tmp_path) == ["out", "whole"]
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_too_little_room_for_the_rest_keeps_what_is_finished(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Who meets a full disk tries again, and has not always freed enough."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        fail_at(patched, 4, no_space)
        with pytest.raises(OSError):
            make(dense, out)
    before = times(out)
    partial = tmp_path / ".out.partial" / "content"
    total = make(dense, tmp_path / "whole")["bytes"]
    rest = total - sum((partial / name).stat().st_size for name in before)
    usage = shutil.disk_usage(tmp_path)
    for free in (rest - 1, rest):
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
            if free < rest:
                with pytest.raises(CheckpointError, match="free some"):
                    make(dense, out)
                assert times(out) == before and set(names(partial)) == set(before), "half-written files make room"
            else:
                assert make(dense, out)["resumed_files"] == 4


def test_no_room_from_the_start_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1000 B are free"):
        make(dense, tmp_path / "out")
    assert names(tmp_path) == []


def interrupted(dense: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with monkeypatch.context() as patched:
        fail_at(patched, 3, no_space)
        with pytest.raises(OSError):
            make(dense, out, **options)
    assert len(times(out)) == 3


def test_another_plan_starts_anew(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    out = tmp_path / "out"
    others: list[Callable[[], dict[str, Any]]] = [
        lambda: make(source, out, UpcycleOptions(num_experts=8, topk=4, granularity=2, shared_expert_ffn=8, seed=5)),
        lambda: make(source, out, form="hf"),
        lambda: make(dense, out),  # another place, though its files have the same names, sizes and times
        lambda: upcycle(source, out, GRANULAR, Output(file_bytes=FILE_BYTES + 2000)),
        lambda: (os.utime(source / "model-00001-of-00002.safetensors", (1, 1)), make(source, out))[1],
    ]
    for other in others:
        interrupted(source, out, monkeypatch)
        assert other()["resumed_files"] == 0
        shutil.rmtree(out)
    interrupted(source, out, monkeypatch)
    assert make(source, out)["resumed_files"] == 3, "and the same one goes on"


def test_routers_of_other_rows_start_anew(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rows depend on how many tokens of a text were read, which is no setting of the mixture."""
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("text")
    options = UpcycleOptions(num_experts=4, router_init="text", router_texts=(str(text),))

    def attempt(value: float) -> dict[str, Any]:
        rows = {layer: torch.full((4, 16), value) for layer in range(2)}
        return upcycle(dense, out, options, Output(file_bytes=FILE_BYTES), routers=lambda moe: rows)

    for value, resumed in ((2.0, 0), (1.0, 3)):
        with monkeypatch.context() as patched:
            fail_at(patched, 3, no_space)
            with pytest.raises(OSError):
                attempt(1.0)
        assert attempt(value)["resumed_files"] == resumed
        shutil.rmtree(out)


def test_a_finished_file_that_was_changed_is_written_again(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    make(dense, tmp_path / "whole")
    interrupted(dense, out, monkeypatch)
    first, second, _ = sorted(times(out))
    os.truncate(tmp_path / ".out.partial" / "content" / first, 10)
    (tmp_path / ".out.partial" / "content" / second).unlink()
    assert make(dense, out)["resumed_files"] == 1
    assert content(out) == content(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------------- refusals, and what is no refusal


def test_a_damaged_source_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    plain = HfReader.read

    def read(self: HfReader, name: str) -> torch.Tensor:
        if name == "model.norm.weight":
            for path in source.glob("*.safetensors"):
                os.truncate(path, 3000)
        return plain(self, name)

    monkeypatch.setattr(HfReader, "read", read)
    with pytest.raises(CheckpointError, match="ends at byte"):
        make(source, tmp_path / "out", workers=1)
    assert names(tmp_path) == ["source"]


def test_a_source_that_cannot_be_read_now_keeps_what_is_finished(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An error of a network file system ends; it says nothing against the source."""

    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    plain = HfReader.read

    def read(self: HfReader, name: str) -> torch.Tensor:
        if name == "model.norm.weight":
            monkeypatch.setattr(os, "preadv", fail)
        return plain(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(HfReader, "read", read)
        with pytest.raises(CheckpointError, match="cannot be read .Input/output error"):
            make(dense, tmp_path / "out", workers=1)
    kept = len(times(tmp_path / "out"))
    monkeypatch.undo()
    assert kept > 3 and make(dense, tmp_path / "out")["resumed_files"] == kept


def test_a_refused_result_leaves_nothing_and_an_error_in_the_comparison_keeps_the_files(dense: Path, tmp_path: Path):
    seen: list[list[str]] = []

    def accept(error: BaseException) -> Callable[[Path], dict[str, Any]]:
        def look(folder: Path) -> dict[str, Any]:
            seen.append(names(folder))
            assert verify_folder(folder, None, io.StringIO(), False)["passed"], "what is compared is the whole checkpoint"
            raise error

        return look

    with pytest.raises(CheckpointError, match="differs"):
        make(dense, tmp_path / "out", accept=accept(CheckpointError("differs")))
    assert names(tmp_path) == [] and "complete.json" in seen[0]
    with pytest.raises(KeyboardInterrupt):
        make(dense, tmp_path / "out", accept=accept(KeyboardInterrupt()))
    assert names(tmp_path) == [".out.partial"]
    made = make(dense, tmp_path / "out", accept=lambda folder: {"looked": True})
    assert made["verify"] == {"looked": True} and made["resumed_files"] == len(list((tmp_path / "out").glob("*.distcp")))
    make(dense, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole"), "nothing of the first attempt's small files is left, nor listed"
    assert verify_folder(tmp_path / "out", [str(dense)], io.StringIO(), True)["passed"]


def test_the_folder_that_is_read_is_not_replaced(dense: Path, tmp_path: Path):
    source = tmp_path / "models" / "source"
    shutil.copytree(dense, source)
    for folder in (source, tmp_path / "models"):
        (folder / "manifest.json").write_text(sealed({"files": dict.fromkeys(list_files(folder), {})}))
    import_hf(source, tmp_path / "ours")
    before = content(tmp_path)
    for out in (source, tmp_path / "models"):
        with pytest.raises(CheckpointError, match="which is read"):
            make(source, out, overwrite=True)
    with pytest.raises(CheckpointError, match="which is read"):
        reshard(tmp_path / "ours", tmp_path / "ours", options=Options(overwrite=True))
    assert content(tmp_path) == before


def test_an_interrupt_stops_the_other_workers(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those that write stop at their next block, those that wait never begin."""
    written: list[str] = []
    plain = FileWriter.__init__
    monkeypatch.setattr(FileWriter, "__init__", lambda self, path, *args: written.append(path.name) or plain(self, path, *args))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_skywork.convert.streaming.run.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(dense, tmp_path / "out", workers=1)
    assert len(written) <= 3
    monkeypatch.undo()
    make(dense, tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_an_interrupt_while_work_is_handed_out_stops_it_too(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted(run.ThreadPoolExecutor):  # type: ignore[name-defined]
        def submit(self, function: Any, *args: Any) -> Any:
            if function is run._hash_source:
                raise KeyboardInterrupt
            return super().submit(function, *args)

    monkeypatch.setattr(run, "ThreadPoolExecutor", Interrupted)
    plain = FileWriter.finish
    monkeypatch.setattr(FileWriter, "finish", lambda self: time.sleep(0.05) or plain(self))
    with pytest.raises(KeyboardInterrupt):
        make(dense, tmp_path / "out", workers=1)
    assert len(times(tmp_path / "out")) <= 2
    assert len(names(tmp_path / ".out.partial" / "content")) <= 3, "what waits is not even begun"


def test_what_failed_is_told_and_not_that_others_stopped(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first file is stopped because the second one failed."""
    plain = FileWriter.write

    def write(self: FileWriter, buffer: Any) -> None:
        if self._path.name == "__0_1.distcp":
            raise no_space()
        assert self._stopped is not None and self._stopped.wait(10)
        plain(self, buffer)

    monkeypatch.setattr(FileWriter, "write", write)
    with pytest.raises(OSError, match="No space left"):
        make(dense, tmp_path / "out", workers=2)


def test_a_rank_that_ends_is_a_sentence_and_no_refusal(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def closed(*args: Any, **options: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "barrier", closed)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", closed)
    with pytest.raises(PeerFailed, match="another rank ended"):
        make(dense, tmp_path / "out", ranks=Ranks(0, 2))
    assert names(tmp_path) == [".out.partial"]
    with pytest.raises(PeerFailed):
        Ranks(1, 2).from_first(lambda: None)

    def fail() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        Ranks(0, 2).from_first(fail)
