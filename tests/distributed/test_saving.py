"""Saves that are believed: in the background as in the foreground, told alike on all ranks when they fail, and never half of one that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, merged, records, release, train

from megatron_skywork.convert.check.inspect_folder import inspect_folder
from megatron_skywork.convert.check.verify_manifest import verify_folder
from megatron_skywork.convert.files.marker import write_marker

EP2 = {"parallel": {"ep": 2}, "train": {"steps": 4}, "checkpoint": {"every": 1, "keep": 2}}


def step_names(run_dir: Path) -> list[str]:
    """What lies in a run's folder of checkpoints, apart from the hint."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name != "latest")


def build(settings: dict[str, Any]) -> Any:
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.load import check_config
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    check_config(config, torch.distributed.get_world_size())
    return Training(config, parallel.start(config))


# ------------------------------------------------------------------------------------------------------------------------- background


def save_while_training(settings: dict[str, Any]) -> tuple[list[bool], float, float]:
    """Save after the first step, and hold the writers back until two more are done; says when the save had ended."""
    import threading

    from megatron_skywork.checkpoint import save as module

    training, gate, original = build(settings), threading.Event(), module.write_part

    def write_late(*args: Any) -> Any:
        gate.wait(60)
        return original(*args)

    module.write_part = write_late
    try:
        training.train_one_step()
        training.save()
        ended = []
        for _ in range(2):
            training.train_one_step()
            training.settle_save()
            ended.append(training.saved_step == 1)
        gate.set()
        training.settle_save(wait=True)
        ended.append(training.saved_step == 1)
    finally:
        module.write_part = original
    release(training)
    return ended


def save_at_once(settings: dict[str, Any]) -> None:
    """Save without the background: because it is turned off, or because the host has no memory for a copy."""
    from megatron_skywork.checkpoint import capture

    training, original = build(settings), capture.available_bytes
    if settings["checkpoint"]["background"]:
        capture.available_bytes = lambda: 1000
    try:
        training.train_one_step()
        training.save()
        while training.saved_step == 0:  # the first rank commits in the background
            training.settle_save()
        training.train_one_step()
    finally:
        capture.available_bytes = original
    release(training)


def test_the_background_writes_what_the_foreground_writes(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, EP2, {"train": {"precision": "bf16"}, "model": {"hidden_dropout": 0.1}})
    ended = ranks.run(2, save_while_training, merged(settings, {"run_dir": str(tmp_path / "back")}))
    assert ended == [[False, False, True]] * 2
    for name, background in (("front", False), ("small", True)):
        ranks.run(2, save_at_once, merged(settings, {"run_dir": str(tmp_path / name), "checkpoint": {"background": background}}))
    back, front, small = (tmp_path / name / "checkpoints" / "step_00000001" for name in ("back", "front", "small"))
    names = sorted(path.name for path in front.iterdir())
    assert sorted(path.name for path in back.iterdir()) == names and {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt"} <= set(names)
    for name in names:
        if name not in ("config.yaml", "manifest.json", "complete.json"):  # they know where they lie
            assert (back / name).read_bytes() == (front / name).read_bytes() == (small / name).read_bytes(), name
    event = records(tmp_path / "back", "event")[-1]
    assert event["event"] == "save" and event["step"] == 1 and 0 < event["stalled_seconds"] < event["seconds"]
    # One manifest for all that this project writes: the tools of conversions read it.
    found = verify_folder(front)
    assert found["passed"] and found["kind"] == "training", found["problems"]
    described = inspect_folder(front)
    assert described["method"] == "training" and described["step"] == 1 and "recorded sizes" in described["manifest"]


def end_in_an_error(settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Leave a run whose save is being written; says what was there before and after, and which threads are left."""
    import threading

    import torch

    from megatron_skywork.checkpoint import save as module

    training, original = build(settings), module.write_part
    checkpoints = Path(settings["run_dir"]) / "checkpoints"

    def write_when_stopped(folder: Any, captured: Any, stopped: threading.Event, read_back: bool) -> Any:
        if captured.file_name.startswith("__0_"):
            (folder / "half").write_text("")
        stopped.wait()
        return original(folder, captured, stopped, read_back)

    module.write_part = write_when_stopped
    try:
        training.train_one_step()
        training.save()
        torch.distributed.barrier()
        before = sorted(path.name for path in checkpoints.iterdir())
    finally:
        module.write_part = original
    release(training)
    torch.distributed.barrier()
    return before, sorted(path.name for path in checkpoints.iterdir()), [thread.name for thread in threading.enumerate() if "checkpoint" in thread.name]


def test_a_save_that_is_not_finished_at_the_end_is_taken_back(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, EP2, {"run_dir": str(tmp_path)})
    ranks.run(2, train, merged(settings, {"train": {"stop_at_step": 2}}))
    before, after, threads = ranks.run(2, end_in_an_error, settings)[0]
    assert before == [".step_00000003.partial", "latest", "step_00000001", "step_00000002"]
    assert after == ["latest", "step_00000001", "step_00000002"] and not threads


# --------------------------------------------------------------------------------------------------------------------------- failures


def run_with_failures(settings: dict[str, Any], failing_rank: int, failing_steps: list[int]) -> str | None:
    """A whole run in which one rank must not write more than some bytes into a file, for the saves of some steps; returns the error that ended it."""
    import contextlib
    import resource

    import torch

    from megatron_skywork.checkpoint import save as module
    from megatron_skywork.config.schema import Config
    from megatron_skywork.errors import CheckpointError
    from megatron_skywork.train import run

    original = module.write_part

    def write_limited(folder: Any, *args: Any) -> Any:
        step = int(folder.name.split("_")[1].split(".")[0])
        if torch.distributed.get_rank() != failing_rank or step not in failing_steps:
            return original(folder, *args)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            return original(folder, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    module.write_part = write_limited
    try:
        with contextlib.redirect_stderr(open(f"{settings['run_dir']}-{torch.distributed.get_rank()}.err", "w")):  # noqa: SIM115
            run.run_training(Config(**settings))
    except CheckpointError as failure:
        return str(failure)
    finally:
        module.write_part = original
    return None


def test_a_failed_save_is_told_to_all_ranks_and_the_policy_followed(ranks: RankPool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = merged(BASE, EP2, {"run_dir": str(run_dir), "checkpoint": {"keep": 1, "on_save_error": "continue"}})
    assert ranks.run(2, run_with_failures, settings, 1, [2, 3]) == [None, None]
    events = [(event["event"], event["step"]) for event in records(run_dir, "event")]
    assert events == [("save", 1), ("save_failed", 2), ("save_failed", 3), ("save", 4), ("stop", 4)]
    reason = next(event["reason"] for event in records(run_dir, "event") if event["event"] == "save_failed")
    assert reason.startswith("rank 1 on ") and "File too large" in reason and "__1_0.distcp" in reason
    for rank in range(2):
        said = Path(f"{run_dir}-{rank}.err").read_text()
        assert said.count("could not be saved") == 2 and reason in said and "that of step 1" in said
    assert step_names(run_dir) == ["step_00000004"] and not (run_dir / "run.lock").exists()

    # The end must be saved, whatever the policy: it is tried once more, and what fails then is no success.
    more = merged(settings, {"train": {"steps": 5}})
    failures = ranks.run(2, run_with_failures, more, 1, [5])
    assert failures[0] == failures[1] and failures[0] is not None and "step_00000005: could not be saved: rank 1" in failures[0]
    status = json.loads((run_dir / "run_status.json").read_text())
    assert status["status"] == "failed" and status["exit_code"] == 3
    assert step_names(run_dir) == ["step_00000004"] and not (run_dir / "run.lock").exists()

    stopping = merged(more, {"train": {"steps": 8}, "checkpoint": {"on_save_error": "stop"}})
    failures = ranks.run(2, run_with_failures, stopping, 0, [6])
    assert failures[0] == failures[1] and failures[0] is not None and "rank 0 on" in failures[0]
    assert step_names(run_dir) == ["step_00000005"]
    assert ranks.run(2, run_with_failures, stopping, 0, []) == [None, None]
    assert step_names(run_dir) == ["step_00000008"]


def save_on_bad_disks(settings: dict[str, Any]) -> dict[str, str]:
    """Saves on a disk that is full, cannot be written, or gives back other bytes; returns why each failed, by what was wrong."""
    from megatron_skywork.checkpoint import space, write
    from megatron_skywork.errors import CheckpointError

    training, found = build(settings), {}
    checkpoints = Path(settings["run_dir"]) / "checkpoints"

    def attempt(name: str) -> None:
        try:
            training.save()
            training.settle_save(wait=True)
            found[name] = "saved"
        except CheckpointError as failure:
            found[name] = str(failure)
        found[name + ", leaves"] = " ".join(sorted(path.name for path in checkpoints.iterdir())) if checkpoints.is_dir() else ""

    original_free, original_write = space.free_bytes, write._write

    def write_and_damage(path: Path, *args: Any) -> Any:
        made = original_write(path, *args)
        if path.name.startswith("__1_"):
            with open(path, "r+b") as file:
                file.seek(100)
                file.write(b"\xff")
        return made

    try:
        if training.place.is_first_rank:
            checkpoints.write_text("in the way")
        attempt("a file in the way")
        if training.place.is_first_rank:
            checkpoints.unlink()
        space.free_bytes = lambda folder: 1000
        attempt("full")
        space.free_bytes = original_free
        write._write = write_and_damage
        attempt("other bytes")
    finally:
        space.free_bytes, write._write = original_free, original_write
    attempt("good")
    release(training)
    return found


def test_why_a_save_failed_is_said_alike(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, save_on_bad_disks, merged(BASE, EP2, {"run_dir": str(tmp_path / "run"), "checkpoint": {"background": False}}))
    assert first == second
    assert "Not a directory" in first["a file in the way"] or "File exists" in first["a file in the way"]
    assert "1000 B are free" in first["full"] and first["full, leaves"] == ""
    assert "rank 1 on" in first["other bytes"] and "gave back other bytes" in first["other bytes"] and first["other bytes, leaves"] == ""
    assert first["good"] == "saved" and first["good, leaves"] == "latest step_00000000"


def die_in_a_save(settings: dict[str, Any], step: int) -> None:
    """Train on; a rank is killed when half of its file is written."""
    import os
    import signal

    import torch

    from megatron_skywork.checkpoint import save as module

    original = module.write_part

    def write_half(folder: Any, captured: Any, *args: Any) -> Any:
        if torch.distributed.get_rank() != 1 or f"{step:08d}" not in folder.name:
            return original(folder, captured, *args)
        while len(captured.items) > 3:
            captured.items.pop()
        original(folder, captured, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    module.write_part = write_half
    train(settings)


def test_a_rank_that_is_killed_in_a_save_costs_that_save(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, EP2, {"run_dir": str(tmp_path)})
    with pytest.raises(AssertionError, match="died|reset by peer|closed"):
        ranks.run(2, die_in_a_save, settings, 3)
    assert step_names(tmp_path) == [".step_00000003.partial", "step_00000001", "step_00000002"]
    ranks.run(2, train, merged(settings, {"checkpoint": {"every": 0}}))
    resumed = next(event for event in records(tmp_path, "event") if event["event"] == "resume")
    assert resumed["step"] == 2 and step_names(tmp_path) == ["step_00000002", "step_00000004"]


# --------------------------------------------------------------------------------------------------------------- which one is resumed from


def find_damage(run_dir: str, folder: str) -> dict[str, list[Any]]:
    """Damage every file of a folder in several ways, one at a time; says what the ranks then take for the newest checkpoint, and why."""
    import torch

    from megatron_skywork.checkpoint import verify

    hashed: list[str] = []
    original = verify.sha256_of

    def watched(path: Path, progress: Any = None) -> str:
        hashed.append(path.name)
        return original(path, progress)

    def look(name: str) -> None:
        torch.distributed.barrier()
        newest, passed_over = verify.newest(Path(run_dir))
        found[name] = [newest.name if newest else None, passed_over]
        torch.distributed.barrier()

    found: dict[str, list[Any]] = {}
    is_first = torch.distributed.get_rank() == 0
    verify.sha256_of = watched
    try:
        look("nothing")
    finally:
        verify.sha256_of = original
    found["hashed here"] = sorted(hashed)
    for path in sorted(path for path in Path(folder).iterdir() if not path.name.startswith(".nfs")):
        whole = path.read_bytes()
        torch.distributed.barrier()
        for how, at in (("middle", len(whole) // 2), ("last", len(whole) - 1)):
            if is_first:
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            look(f"{path.name} {how}")
        for how, content in (("short", whole[:-1]), ("missing", None)):
            if is_first:
                path.unlink() if content is None else path.write_bytes(content)
            look(f"{path.name} {how}")
        if is_first:
            path.write_bytes(whole)
        torch.distributed.barrier()
    return found


def test_the_newest_folder_that_verifies_wins(ranks: RankPool, tmp_path: Path) -> None:
    settings = merged(BASE, EP2, {"run_dir": str(tmp_path), "train": {"steps": 2}})
    ranks.run(2, train, settings)
    newest = tmp_path / "checkpoints" / "step_00000002"
    (newest / ".nfs0001").write_text("")  # what lies there beside a checkpoint does not damage it
    first, second = ranks.run(2, find_damage, str(tmp_path), str(newest))
    hashed = first.pop("hashed here"), second.pop("hashed here")
    assert first == second and first.pop("nothing") == ["step_00000002", []]
    # All files are hashed, none of them by two ranks.
    assert sorted(hashed[0] + hashed[1]) == sorted(path.name for path in newest.iterdir() if path.name not in ("manifest.json", "complete.json", ".nfs0001"))
    assert {"__0_0.distcp", "__1_0.distcp"} & set(hashed[0]) and {"__0_0.distcp", "__1_0.distcp"} & set(hashed[1])
    assert len(first) == 4 * 9
    for name, (taken, passed_over) in first.items():
        assert taken == "step_00000001" and len(passed_over) == 1, (name, taken, passed_over)
        assert "step_00000002" in passed_over[0] and (name.split()[0] in passed_over[0] or name.startswith("complete.json")), (name, passed_over)


def newest_of(run_dir: str) -> str | None:
    from megatron_skywork.checkpoint.verify import newest

    found, _ = newest(Path(run_dir))
    return None if found is None else found.name


def test_a_folder_from_before_there_were_manifests_counts_by_its_sizes(ranks: RankPool, tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(b"weights")
        write_marker(folder)
    assert ranks.run(2, newest_of, str(tmp_path)) == ["step_00000002"] * 2
    (folder / "__0_0.distcp").write_bytes(b"weight")
    assert ranks.run(2, newest_of, str(tmp_path)) == ["step_00000001"] * 2


def save_in_a_hurry(settings: dict[str, Any]) -> list[list[str]]:
    training, found = build(settings), []
    for save in (training.save, lambda: training.save_last(in_a_hurry=True), training.save):
        training.train_one_step()
        save()
        training.settle_save(wait=True)
        found.append(step_names(Path(settings["run_dir"])))
    release(training)
    return found


def test_what_was_not_read_back_pushes_nothing_out(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(1, save_in_a_hurry, merged(BASE, {"run_dir": str(tmp_path), "checkpoint": {"keep": 1}}))[0]
    assert found == [["step_00000001"], ["step_00000001", "step_00000002"], ["step_00000003"]]


def test_a_run_that_cannot_save_hears_it_before_its_first_step(ranks: RankPool, tmp_path: Path) -> None:
    refused = ranks.run(2, start_on_a_full_disk, merged(BASE, EP2, {"run_dir": str(tmp_path)}))
    assert refused[0] == refused[1] and "1000 B are free" in refused[0] and "checkpoint.keep=2" in refused[0]


def start_on_a_full_disk(settings: dict[str, Any]) -> str:
    import torch

    from megatron_skywork.checkpoint import space
    from megatron_skywork.errors import CheckpointError

    original = space.free_bytes
    space.free_bytes = lambda folder: 1000 if torch.distributed.get_rank() == 0 else 1 << 60
    try:
        build(settings)
    except CheckpointError as refusal:
        return str(refusal)
    finally:
        space.free_bytes = original
    return "started"
