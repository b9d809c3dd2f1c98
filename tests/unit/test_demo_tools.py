"""The demo's stage runner, its text, and the comparison of runs: what decides whether a stage runs again, and what counts as equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import compare_runs  # noqa: E402
import demo_text  # noqa: E402
from megatron_skywork.errors import DataError  # noqa: E402
from stage_runner import Command, Runner, Stage, StageFailed, last_words  # noqa: E402


def append(path: Path, word: str) -> Command:
    return Command(["sh", "-c", f"echo {word} >> {path}"])


def run(tmp_path: Path, stages: list[Stage], seed: str = "1") -> list[bool]:
    """Run the stages; for each, whether it was reused."""
    runner = Runner(tmp_path / "demo", tmp_path, dict(os.environ), seed)
    runner.run_all(stages)
    return [record["reused"] for record in runner.records]


def two_stages(tmp_path: Path) -> list[Stage]:
    first = Stage("first", "says", [append(tmp_path / "a", "one")], reads=[Path("input")], makes=[Path("a")])
    return [first, Stage("second", "says", [append(tmp_path / "b", "two")], makes=[Path("b")], clears=[Path("b")])]


def test_a_finished_stage_is_not_run_again(tmp_path, capsys):
    (tmp_path / "input").write_text("1")
    assert run(tmp_path, two_stages(tmp_path)) == [False, False]
    assert run(tmp_path, two_stages(tmp_path)) == [True, True]
    assert (tmp_path / "a").read_text() == "one\n"
    assert capsys.readouterr().out.count("\n") == 4  # one line a stage


def test_changed_input_runs_the_stage_and_all_after_it(tmp_path):
    (tmp_path / "input").write_text("1")
    run(tmp_path, two_stages(tmp_path))
    (tmp_path / "input").write_text("2")
    assert run(tmp_path, two_stages(tmp_path)) == [False, False]
    assert (tmp_path / "a").read_text() == "one\none\n"
    assert (tmp_path / "b").read_text() == "two\n"  # cleared before
    assert run(tmp_path, two_stages(tmp_path), seed="2") == [False, False]


def test_a_missing_output_runs_the_stage_again(tmp_path):
    (tmp_path / "input").write_text("1")
    run(tmp_path, two_stages(tmp_path))
    (tmp_path / "b").unlink()
    assert run(tmp_path, two_stages(tmp_path)) == [True, False]


def test_a_failing_stage_shows_the_end_of_its_log_and_is_not_finished(tmp_path):
    stage = Stage("bad", "says", [Command(["sh", "-c", "echo the reason >&2; exit 5"])])
    for _ in range(2):
        with pytest.raises(StageFailed, match=r"exit code 5(.|\n)*the reason"):
            run(tmp_path, [stage])
    assert "$ sh -c" in (tmp_path / "demo/logs/bad.log").read_text()
    run(tmp_path, [Stage("bad", "says", [Command(["sh", "-c", "exit 5"], allowed=(0, 5))])])


def test_the_end_of_a_log_is_the_rank_s_not_torchrun_s():
    agent = "E1123 api.py:1002] failed (exitcode: 1) local_rank: 0 (pid: 7)\nTraceback\nChildFailedError"
    assert last_words(f"a\nerror: the reason\n{agent}") == ["a", "error: the reason"]
    assert last_words("\n".join(map(str, range(100))))[-1] == "99"


def test_a_stage_that_makes_nothing_is_noticed(tmp_path):
    with pytest.raises(StageFailed, match="did not write never"):
        run(tmp_path, [Stage("empty", "says", [Command(["true"])], makes=[Path("never")])])


def test_standard_output_goes_to_its_file(tmp_path):
    run(tmp_path, [Stage("json", "says", [Command(["sh", "-c", "echo '{}'; echo noise >&2"], stdout=Path("results/x.json"))])])
    assert (tmp_path / "results/x.json").read_text() == "{}\n"
    assert "noise" in (tmp_path / "demo/logs/json.log").read_text()


def library(folder: Path, num_modules: int) -> Path:
    for i in range(num_modules):
        path = folder / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Module {i}."""\n\n\ndef f():\n    """Says {i}."""\n')
    (folder / "test").mkdir()
    (folder / "test" / "left_out.py").write_text("x = 1\n")
    (folder / "broken.py").write_text("def (:\n")
    return folder


def test_text_is_split_the_same_every_time_and_a_module_stays_on_one_side(tmp_path):
    folder = library(tmp_path / "lib", 400)
    documents = list(demo_text.standard_library(folder))
    assert len(documents) == 800
    counts = demo_text.write(iter(documents), tmp_path / "out", 0.05, min_bytes=1)
    assert counts["train_documents"] + counts["valid_documents"] == 800
    assert 0.02 < counts["valid_documents"] / 800 < 0.09
    valid = [json.loads(line)["text"] for line in (tmp_path / "out/valid.jsonl").read_text().splitlines()]
    assert len(valid) % 2 == 0
    assert sum(text.startswith('"""Module') for text in valid) == len(valid) / 2
    again = tmp_path / "again"
    demo_text.write(demo_text.standard_library(folder), again, 0.05, min_bytes=1)
    assert (again / "valid.jsonl").read_bytes() == (tmp_path / "out/valid.jsonl").read_bytes()


def test_too_little_text_is_refused(tmp_path):
    documents = list(demo_text.standard_library(library(tmp_path / "lib", 40)))
    with pytest.raises(DataError, match=r"8\.0 MB are wanted"):
        demo_text.write(iter(documents), tmp_path / "out", 0.05, min_bytes=8_000_000)
    with pytest.raises(DataError, match="valid part"):
        demo_text.write(iter(documents), tmp_path / "out", 1e-9, min_bytes=1)


def write_run(folder: Path, losses: dict[int, float], tensors: bytes = b"x") -> Path:
    (folder / "checkpoints/step_00000002").mkdir(parents=True)
    (folder / "checkpoints/step_00000002/__0_0.distcp").write_bytes(tensors)
    records = [{"kind": "header"}, *({"kind": "step", "step": s, "loss": x, "grad_norm": 1.0} for s, x in losses.items())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def compare(*words: object) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, ROOT / "tools/compare_runs.py", *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_equal_runs_are_equal_and_the_last_bit_counts(tmp_path):
    a = write_run(tmp_path / "a", {1: 2.5, 2: 2.25, 3: 2.0})
    b = write_run(tmp_path / "b", {1: 2.5, 2: 2.25})
    code, out, _ = compare(a, b, "--checkpoint-step", 2, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["equal"]
    assert result["steps"] == [1, 2]
    c = write_run(tmp_path / "c", {1: 2.5, 2: 2.2500000000000004})
    code, out, _ = compare(a, c, "--json")
    assert code == 1
    assert json.loads(out)["differing_steps"] == [2]
    assert compare(a, c, "--tolerance", 1e-9)[0] == 0
    d = write_run(tmp_path / "d", {1: 2.5, 2: 2.25}, tensors=b"y")
    code, out, _ = compare(a, d, "--checkpoint-step", 2)
    assert code == 1
    assert "different: __0_0.distcp" in out


def test_equal_settings_are_equal_however_they_were_pickled(tmp_path):
    import torch

    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        torch.distributed.checkpoint.save({"weight": torch.ones(2)}, checkpoint_id=str(folder), no_dist=True)
    betas = (0.9, 0.95)
    torch.save([{"betas": betas}, {"betas": betas}], folders[0] / "common.pt")
    torch.save([{"betas": tuple([0.9, 0.95])}, {"betas": tuple([0.9, 0.95])}], folders[1] / "common.pt")
    assert (folders[0] / "common.pt").read_bytes() != (folders[1] / "common.pt").read_bytes()
    assert not compare_runs.compare_checkpoints(*folders)["differing_items"]
    torch.save([{"betas": (0.9, 0.96)}, {"betas": betas}], folders[1] / "common.pt")
    assert compare_runs.compare_checkpoints(*folders)["differing_items"] == ["common.pt"]


def test_a_step_done_twice_counts_as_done_last(tmp_path):
    run_dir = write_run(tmp_path / "a", {1: 2.5})
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "step": 1, "loss": 7.0}\n')
    assert compare_runs.steps_of(run_dir)[1]["loss"] == 7.0


def test_nothing_to_compare_is_said(tmp_path):
    a, b = write_run(tmp_path / "a", {1: 2.5}), write_run(tmp_path / "b", {5: 2.5})
    code, _, err = compare(a, b)
    assert code == 3
    assert "their last steps are 1 and 5" in err
    code, _, err = compare(a, tmp_path / "nowhere")
    assert code == 3
    assert "metrics.jsonl does not exist" in err


def test_a_missing_number_is_a_difference():
    steps = compare_runs.compare_steps({1: {"loss": 1.0}}, {1: {}}, 1, None, ("loss",), 0.0)
    assert steps["differing_steps"] == [1]
    nan = compare_runs.compare_steps({1: {"loss": float("nan")}}, {1: {"loss": 1.0}}, 1, None, ("loss",), 0.0)
    assert nan["differing_steps"] == [1]
