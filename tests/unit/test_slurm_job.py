"""What a SLURM job does next, for every way a start can end; and what is submitted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import slurm_job  # noqa: E402
import submit  # noqa: E402
from slurm_job import what_follows  # noqa: E402

TINY = str(ROOT / "configs" / "tiny.yaml")


def follows(status: str | None, code: int | None, **changed) -> str:
    facts = {"job_state": "RUNNING", "told_to_stop": False, "stalled": 0, "limit": 3, "step": 7, **changed}
    return str(what_follows({} if status is None else {"status": status, "exit_code": code}, **facts))


@pytest.mark.parametrize(("status", "code", "expected"), [
    ("done", 0, "end 0"), ("stopped", 0, "end 0"), ("stopped", 75, "requeue"), ("failed", 2, "end 2"), ("failed", 3, "end 3"),
    ("failed", 1, "again"), ("running", None, "again"), (None, None, "again"),
])
def test_the_run_decides_what_follows(status: str | None, code: int | None, expected: str):
    assert follows(status, code) == expected


def test_without_progress_only_so_many_starts():
    for status, code in (("stopped", 75), ("failed", 1), (None, None)):
        assert follows(status, code, stalled=2) != "end 1"
        assert follows(status, code, stalled=3) == "end 1"
        assert follows(status, code, stalled=9, limit=10) != "end 1"
    assert follows("done", 0, stalled=3) == "end 0" and follows("failed", 3, stalled=3) == "end 3"
    why = what_follows({"status": "failed", "exit_code": 1, "reason": "rank 3 hangs"}, "RUNNING", False, 3, 3, 7).why
    assert "3 starts in a row left the run's last saved step at 7" in why and "(rank 3 hangs)" in why


def test_a_cancelled_job_stays_so_and_one_whose_time_is_over_does_not_start_here():
    assert follows("stopped", 75, job_state="CANCELLED") == "end 0"
    assert follows("failed", 1, job_state="COMPLETING") == "end 1"
    assert follows("failed", 1, told_to_stop=True) == "requeue"


def job(command: str, tmp_path: Path, *words: str) -> int:
    options = {"begin": [], "next": ["--job-state", "RUNNING"]}[command]
    return slurm_job.main([command, "--logs", str(tmp_path), *options, "--config", TINY, f"run_dir={tmp_path}", "launch.max_stalled_starts=2", *words])


def save(run_dir: Path, step: int, complete: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "complete.json").write_text("{}")


def test_starts_are_bounded_by_progress_and_not_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(1, 9):  # progress each time: no limit
        assert job("begin", tmp_path) == 0 and capsys.readouterr().out == f"{number}\n"
        save(tmp_path, 10 * number)
        assert job("next", tmp_path) == 0 and capsys.readouterr().out == "again\n"
    assert job("begin", tmp_path) == 0
    save(tmp_path, 85, complete=False)  # a save that was not finished is no progress
    assert job("next", tmp_path) == 0
    assert job("begin", tmp_path) == 0
    capsys.readouterr()
    assert job("next", tmp_path) == 0 and capsys.readouterr().out == "end 1\n"
    assert job("begin", tmp_path) == 1  # a script that was killed before it could ask is stopped here
    assert "2 starts in a row left the run's last saved step at 80" in capsys.readouterr().err


def test_what_was_said_before_the_start_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run_status.json").write_text(json.dumps({"status": "stopped", "exit_code": 75}))
    assert job("begin", tmp_path) == 0
    capsys.readouterr()
    assert job("next", tmp_path) == 0 and capsys.readouterr().out == "again\n"
    (tmp_path / "run_status.json").write_text(json.dumps({"status": "stopped", "exit_code": 75, "updated": 1}))
    assert job("next", tmp_path) == 0 and capsys.readouterr().out == "requeue\n"


def test_a_run_of_another_job_in_the_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert job("begin", tmp_path) == 0
    (tmp_path / "run_status.json").write_text(json.dumps({"status": "stopped", "exit_code": 75}))  # the other run's words
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"job": "another", "process": 7, "host": "first-host"}))
    capsys.readouterr()
    assert job("next", tmp_path) == 0
    said = capsys.readouterr()
    assert said.out == "end 3\n" and "in use by process 7 on host first-host" in said.err
    os.utime(lock, (0, 0))  # dead for long
    assert job("next", tmp_path) == 0 and capsys.readouterr().out == "requeue\n"
    lock.write_text(json.dumps({"job": tmp_path.name}))
    assert job("next", tmp_path) == 0 and capsys.readouterr().out == "requeue\n"


def test_a_start_behind_a_torn_line_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "starts.jsonl").write_text('{"start": 1, "st')
    assert job("begin", tmp_path) == 0 and capsys.readouterr().out == "1\n"
    assert job("next", tmp_path) == 0 and capsys.readouterr().out == "again\n"


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert submit.main(["--config", TINY, "--dry-run", "--json", "parallel.gpus_per_node=2", "train.global_batch_size=16", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_asks_for_what_the_settings_say(capsys: pytest.CaptureFixture[str]):
    options = "launch.sbatch={partition: gpu, time: '1:00:00', exclusive: true}"
    plan = planned(capsys, "--nodes", "2", "launch.spare_nodes=1", "launch.grace_seconds=120", options)
    assert plan["world_size"] == 4 and plan["environment"] == {}
    ours = ["sbatch", "--parsable", "--nodes=3", "--signal=USR2@120", "--job-name=tiny", "--gpus-per-node=2"]
    assert plan["command"][:9] == [*ours, "--partition=gpu", "--time=1:00:00", "--exclusive"]
    assert plan["command"][9:11] == ["launch/pretrain_moe.sbatch", "configs/tiny.yaml"] and "launch.spare_nodes=1" in plan["command"]
    contained = planned(capsys, "launch.nodes=2", "launch.request_gpus=false", "launch.container={image: a.sqsh, mounts: ['/data:/data', '/models:/m']}")
    assert contained["environment"] == {"CONTAINER_IMAGE": "a.sqsh", "CONTAINER_MOUNTS": "/data:/data,/models:/m", "CONTAINER_RUNTIME": "pyxis"}
    assert "launch/pretrain_moe_container.sbatch" in contained["command"] and not any(word.startswith("--gpus") for word in contained["command"])


def test_the_example_of_a_cluster_goes_with_a_run_s_own_file(capsys: pytest.CaptureFixture[str]):
    configs = ["--config", str(ROOT / "configs" / "skywork_moe_146b.yaml"), "--config", str(ROOT / "configs" / "clusters" / "example.yaml")]
    assert submit.main([*configs, "--nodes", "192", "--dry-run"]) == 0
    assert "1536 ranks on 192 nodes and 2 spare" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "sentence"), [
    (["--nodes", "2", "parallel.ep=3"], "parallel.ep=3"),
    ([], "launch.nodes is not set"),
    (["--nodes", "1", "launch.sbatch={nodes: 4}"], "launch.sbatch.nodes=4: the scripts set --nodes themselves (launch.nodes, launch.spare_nodes)"),
    (["--nodes", "1", "launch.sbatch={time: 1:30:00}"], "base-60"),
    (["--nodes", "1", "launch.sbatch={-x: 4}"], "launch.sbatch.-x=4: an option of sbatch by its long name"),
    (["--nodes", "1", "launch.environment={'A B': x}"], "launch.environment.A B: letters, digits and _"),
])
def test_a_wrong_setting_is_refused_before_it_is_submitted(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert submit.main(["--config", TINY, *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("configuration error: 1 problem\n") and sentence in output.err, output.err


def test_settings_are_safe_words_for_a_shell(capsys: pytest.CaptureFixture[str]):
    assert slurm_job.main(["settings", "--num-nodes", "3", "--config", TINY, "launch.spare_nodes=1", "parallel.gpus_per_node=1",
                           "run_dir='a b; $(x)'", "launch.environment={A: \"it's\"}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["run_dir='a b; $(x)'", "num_nodes=2"] and lines[-1] == "export A='it'\"'\"'s'"
