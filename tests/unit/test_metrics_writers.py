"""The file of record survives deaths and resumes, the console says what it should, and W&B never matters to the run."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics import tensorboard
from megatron_skywork.metrics.console import ConsoleWriter, step_line
from megatron_skywork.metrics.jsonl import JsonlWriter, strict
from megatron_skywork.metrics.scalars import evaluation_scalars, scalars
from megatron_skywork.metrics.wandb_follower import run_id
from megatron_skywork.metrics.writers import Writers, open_writers

ROOT = Path(__file__).resolve().parents[2]
STEP = {
    "step": 12,
    "loss": 2.345,
    "grad_norm": 1.234,
    "learning_rate": 3e-4,
    "tokens_per_second": 1234.4,
    "mfu": None,
    "seconds": {"step": 0.81, "data": 0.1},
    "skipped": False,
    "router": {"layers": [1, 2], "load": [[0.5, 0.5], [0.25, 0.75]], "drop_rate": [0.01, 0.014], "entropy": [0.6, math.nan]},
}


def make_config(**metrics: Any) -> Config:
    model = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    return Config.model_validate({"model": model, "train": {"steps": 200, "global_batch_size": 1}, "metrics": metrics})


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def write_run(path: Path, steps: range, resume_step: int | None = None, world_size: int = 1) -> None:
    writer = JsonlWriter(path, resume_step=resume_step)
    writer.header({"kind": "header", "world_size": world_size, "config": {"train": {"steps": 200}}})
    if resume_step is not None:
        writer.event({"kind": "event", "event": "resume", "step": resume_step})
    for step in steps:
        writer.step({"kind": "step", "step": step, "loss": float(step)})
        if step % 2 == 0:
            writer.evaluation({"kind": "eval", "step": step, "losses": {"valid": 1.0}})
            writer.event({"kind": "event", "event": "save", "step": step})
    writer.close()


class FullDisk:
    """Takes `room` bytes of a file, and then none until it has more."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(content[: self.room])
        self.room -= taken
        return taken

    def close(self) -> None:
        self.file.close()


def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=None)
    disk = writer._file = FullDisk(writer._file, 50)  # type: ignore[assignment]
    for step in range(1, 6):
        disk.room += 1000 if step == 4 else 0
        writer.step({"kind": "step", "step": step, "loss": 1.0})
        assert (len(path.read_bytes()) == 50) == (step in (2, 3))
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device)") == 1 and said.count("are written") == 1
    disk.room = 0
    writer.step({"kind": "step", "step": 6})
    writer.close()
    assert [record["step"] for record in read(path)] == [1, 2, 3, 4, 5]
    assert "the last 1 records are lost" in capsys.readouterr().err


def test_every_record_is_on_disk_when_its_call_returns(tmp_path: Path):
    writer = JsonlWriter(tmp_path / "new" / "metrics.jsonl", resume_step=None)
    writer.step({"kind": "step", "step": 1})
    assert read(writer.path) == [{"kind": "step", "step": 1}]


def test_non_finite_values_are_null_and_listed():
    clean = strict({"loss": math.nan, "grad_norm": math.inf, "mfu": None, "router": {"entropy": [0.5, -math.inf]}, "skipped": True})
    assert clean.pop("nonfinite") == ["loss", "grad_norm", "router.entropy.1"]
    assert clean == {"loss": None, "grad_norm": None, "mfu": None, "router": {"entropy": [0.5, None]}, "skipped": True}
    assert "nonfinite" not in strict({"loss": 1.0, "mfu": None})
    with pytest.raises(TypeError, match="router.load.0 is a Tensor"):
        strict({"router": {"load": [torch.ones(2)]}})


@pytest.mark.parametrize("torn", ['{"kind":"step","step":7,"lo', '{"kind":"step","st\x00', "17"])
def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path: Path, torn: str):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    JsonlWriter(path, resume_step=3).close()
    assert path.read_bytes() == whole


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 4))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    JsonlWriter(path, resume_step=3).close()
    assert [record["step"] for record in read(path) if record["kind"] == "step"] == [1, 2, 3]


def test_a_resume_removes_what_it_will_record_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 8))
    write_run(path, range(5, 7), resume_step=4)
    records = read(path)
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [2, 4, 6]
    assert [(record["event"], record["step"]) for record in records if record["kind"] == "event"] == [("save", 2), ("save", 4), ("resume", 4), ("save", 6)]
    assert [record["kind"] for record in records].count("header") == 1 and records[0]["kind"] == "header"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"], "no temporary file is left"


def test_a_death_while_rewriting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 8))
    before = path.read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        JsonlWriter(path, resume_step=4)
    assert path.read_bytes() == before


def test_a_resume_with_another_layout_says_what_changed(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 3), world_size=1)
    write_run(path, range(3, 4), resume_step=2, world_size=4)
    changes = [record["changed"] for record in read(path) if record.get("event") == "header_changed"]
    assert changes == [{"world_size": 4}]


def test_a_new_run_keeps_the_old_record_aside(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(3):
        write_run(path, range(1, 3))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.old-1.jsonl", "metrics.old-2.jsonl"]
    assert [record["step"] for record in read(path) if record["kind"] == "step"] == [1, 2]


def test_a_resume_without_a_file_starts_one(tmp_path: Path):
    write_run(tmp_path / "metrics.jsonl", range(5, 6), resume_step=4)
    assert [record["kind"] for record in read(tmp_path / "metrics.jsonl")] == ["header", "event", "step"]


def console(stream: io.StringIO, *, steps: list[int]) -> str:
    seconds = iter(range(0, 10_000, 1))
    writer = ConsoleWriter(200, stream=stream, clock=lambda: float(next(seconds)))
    writer.header({"parameters": {"total": 373.1e6, "active": 195e6}, "world_size": 2, "device": "cpu"})
    for step in steps:
        writer.step({**STEP, "step": step})
    writer.evaluation({"step": 12, "losses": {"valid": 2.5, "code": None}})
    writer.event({"kind": "event", "event": "save", "step": 12, "time": 1.0, "seconds": 2})
    writer.close()
    return stream.getvalue()


def test_console_lines():
    lines = console(io.StringIO(), steps=[11, 12]).splitlines()
    assert lines[0] == "parameters 373.1 M (195 M active)  ranks 2  device cpu"
    assert lines[2] == "step 12/200  loss 2.3450  grad 1.23  lr 3.0e-04  drop 1.2 %  1,234 tok/s  0.81 s  eta 3m 08s"
    assert lines[3:] == ["evaluation at step 12  valid 2.5000  code none", "save at step 12  seconds=2"]
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)


def test_the_console_says_when_a_step_waits_for_data():
    for share, shown in ((0.02, False), (0.124, True)):
        assert ("0.81 s  waits 12 % for data" in step_line({**STEP, "data_wait_share": share}, 200)) is shown


def test_an_evaluation_prints_means_over_the_layers_that_have_a_value():
    stream = io.StringIO()
    writer = ConsoleWriter(200, stream=stream)
    router = {"layers": [1, 2], "changed_experts": [None, None], "expert_similarity": [1.0, 0.99]}
    writer.evaluation({"step": 0, "losses": {"valid": 2.5}, "router": router})
    writer.evaluation({"step": 9, "losses": {"valid": 2.5}, "router": {**router, "changed_experts": [0.25, 0.0]}})
    assert stream.getvalue().splitlines() == [
        "evaluation at step 0  valid 2.5000  similarity 0.995",
        "evaluation at step 9  valid 2.5000  experts changed 12.5 %  similarity 0.995",
    ]


def test_a_dense_skipped_step_prints_what_it_has():
    stream = io.StringIO()
    ConsoleWriter(10, stream=stream).step({"step": 10, "loss": None, "grad_norm": math.inf, "skipped": True})
    assert stream.getvalue() == "step 10/10  loss none  grad inf  skipped\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_keeps_the_last_line():
    text = console(Terminal(), steps=[100, 101, 199, 200])
    shown = [line.split("\x1b[2K")[-1] for line in text.split("\n")]
    assert [line.split("  ")[0] for line in shown if line.startswith("step")] == ["step 100/200", "step 200/200"]
    assert "\r\x1b[2K[##########..........] step 101/200" in text


def test_writers_serve_rank_0_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    silent = open_writers(make_config(), tmp_path, resume_step=None)
    silent.header({})
    silent.step(STEP)
    silent.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    writers = open_writers(make_config(), tmp_path, resume_step=None)
    writers.header({"world_size": 1})
    writers.step(STEP)
    writers.evaluation({"step": 12, "losses": {"valid": 2.0}})
    writers.event("save", 12, path="x")
    writers.close()
    records = read(tmp_path / "metrics.jsonl")
    assert [record["kind"] for record in records] == ["header", "step", "eval", "event"] and all(record["time"] > 0 for record in records)
    assert records[1]["nonfinite"] == ["router.entropy.1"] and records[3]["path"] == "x"
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_one_writer_that_fails_to_close_does_not_keep_others_open(tmp_path: Path):
    class Broken(JsonlWriter):
        def close(self) -> None:
            super().close()
            raise OSError("disk full")

    first, second = Broken(tmp_path / "a.jsonl", resume_step=None), JsonlWriter(tmp_path / "b.jsonl", resume_step=None)
    with pytest.raises(OSError, match="disk full"):
        Writers([first, second]).close()
    assert second._file.closed


def test_scalars_of_a_record():
    values = dict(scalars({**STEP, "skipped": True, "router": {**STEP["router"], "entropy": [None, 0.5]}}))
    assert values["loss"] == 2.345 and values["seconds/data"] == 0.1 and values["skipped"] == 1.0
    assert values["router/drop_rate/mean"] == pytest.approx(0.012) and values["router/load_max_over_mean/layer_002"] == pytest.approx(1.5)
    assert values["router/entropy/mean"] == 0.5 and "router/entropy/layer_001" not in values
    assert not {"step", "mfu", "router/layers/mean"} & values.keys()


def test_scalars_of_experts_and_of_several_losses():
    more = {"load_p10": [0.5, 0.1], "load_max_over_mean": [1.0, 1.25], "dead_experts": [0, 3], "dead_expert_ids": [[], [0, 2, 5]]}
    router = {**STEP["router"], **more, "extra_aux_losses": {"switch_sequence": [1.0, None]}}
    values = dict(scalars({**STEP, "router": router}))
    assert values["router/load_p10/mean"] == pytest.approx(0.3) and values["router/load_p10/layer_002"] == 0.1
    assert values["router/load_max_over_mean/layer_002"] == 1.25, "what is recorded is not computed again"
    assert values["router/dead_experts/total"] == 3 and values["router/dead_experts/mean"] == 1.5
    assert values["router/extra_aux_losses/switch_sequence/mean"] == 1.0 and "router/extra_aux_losses/switch_sequence/layer_002" not in values
    assert not any(name.startswith(("router/dead_expert_ids", "router/load/")) for name in values) and all(type(value) is float for value in values.values())


def test_scalars_of_an_evaluation():
    router = {"layers": [1, 3], "changed_experts": [None, None], "expert_similarity": [0.9, 0.7]}
    values = dict(evaluation_scalars({"kind": "eval", "step": 4, "losses": {"valid": 2.0, "code": None}, "router": router}))
    expected = {"evaluation/valid": 2.0, "evaluation_router/expert_similarity/mean": 0.8}
    expected |= {"evaluation_router/expert_similarity/layer_001": 0.9, "evaluation_router/expert_similarity/layer_003": 0.7}
    assert values == pytest.approx(expected)
    assert dict(evaluation_scalars({"step": 4, "losses": {"valid": 2.0}})) == {"evaluation/valid": 2.0}


def test_tensorboard_missing_is_a_config_error_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"metrics.tensorboard=true.*pip install"):
        open_writers(make_config(tensorboard=True), tmp_path, resume_step=None)


def test_tensorboard_events_are_written(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = open_writers(make_config(tensorboard=True), tmp_path, resume_step=None)
    writers.step(STEP)
    writers.evaluation({"step": 12, "losses": {"valid": 2.0}, "router": {"layers": [1], "changed_experts": [0.25]}})
    writers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("loss")[0].value == pytest.approx(2.345) and events.Scalars("evaluation/valid")[0].step == 12
    assert events.Scalars("evaluation_router/changed_experts/layer_001")[0].value == pytest.approx(0.25)


def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path: Path):
    pytest.importorskip("tensorboard")
    script = """
import resource, sys
from pathlib import Path
from megatron_skywork.metrics.tensorboard import TensorBoardWriter
writer = TensorBoardWriter(Path(sys.argv[1]), resume_step=None)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow beyond it, as on a disk that is full
for step in range(1, 3000):
    writer.step({"kind": "step", "step": step, "loss": 1.0, "router": {"layers": [1]}})
    writer.event({"event": "save", "step": step})
writer.close()
print("went on")
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert done.stderr.count("the run goes on without TensorBoard") == 1, done.stderr


def test_wandb_id_is_kept(tmp_path: Path):
    assert run_id(tmp_path) == run_id(tmp_path) == (tmp_path / "wandb_id.txt").read_text().strip()


WANDB_RUN = """
import sys
from megatron_skywork.config.schema import Config
from megatron_skywork.metrics import wandb_follower
from megatron_skywork.metrics.writers import open_writers
wandb_follower.INIT_SECONDS = 2.0
config = Config.model_validate_json(sys.argv[1])
writers = open_writers(config, sys.argv[2], resume_step=None)
writers.header({"config": config.model_dump(), "world_size": 1})
for step in range(1, 4):
    writers.step({"step": step, "loss": 1.0 / step, "router": {"layers": [1], "drop_rate": [0.25]}})
writers.close()
assert "wandb" not in sys.modules
print("run is done")
"""


def run_with_wandb(folder: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WANDB_RUN, make_config(wandb=mode).model_dump_json(), str(folder)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    ours = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "WANDB_ERROR_REPORTING": "false"}  # it would report its errors to its makers
    return subprocess.run(command, env={**inherited, **ours, **environment}, capture_output=True, text=True, timeout=300)


def test_an_unreachable_wandb_is_one_warning(tmp_path: Path):
    pytest.importorskip("wandb")
    result = run_with_wandb(tmp_path, "online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    assert result.returncode == 0 and result.stdout.endswith("run is done\n"), result.stderr
    assert len(result.stderr.splitlines()) == 1 and "W&B" in result.stderr, result.stderr
    assert len(read(tmp_path / "metrics.jsonl")) == 4


def test_an_offline_wandb_records_the_run(tmp_path: Path):
    pytest.importorskip("wandb")
    result = run_with_wandb(tmp_path, "offline")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    (recorded,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    assert (tmp_path / "wandb_id.txt").read_text().strip() in recorded.name
    assert content.count(b"router/drop_rate/layer_001") >= 3 and b"global_batch_size" in content


def test_a_missing_wandb_is_one_warning(tmp_path: Path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "wandb.py").write_text("raise ImportError('no wandb here')")
    result = run_with_wandb(tmp_path / "run", "offline", PYTHONPATH=os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)]))
    assert result.returncode == 0 and "pip install" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("end", "code"), [("os._exit(9)", "9"), ("os.kill(os.getpid(), 9)", "-9")])
def test_a_helper_that_dies_without_a_word_is_one_warning(tmp_path: Path, end: str, code: str):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "wandb.py").write_text(f"import os\n{end}\n")
    result = run_with_wandb(tmp_path / "run", "offline", PYTHONPATH=os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)]))
    assert result.returncode == 0 and f"died (exit code {code})" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_wandb_that_exits_is_one_warning(tmp_path: Path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "wandb.py").write_text("import sys\nsys.exit('not today')\n")
    result = run_with_wandb(tmp_path / "run", "offline", PYTHONPATH=os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)]))
    assert result.returncode == 0 and "SystemExit: not today" in result.stderr and len(result.stderr.splitlines()) == 1
