"""Predicted beside measured: what is compared with what, what is not, and what is said where nothing can be foreseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_samples import Page, step_record, write_run

from megatron_skywork.config.load import load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.describe_estimate import part_of
from megatron_skywork.plan.estimate import estimate
from megatron_skywork.plan.hardware import load_cluster, one_node
from megatron_skywork.plan.memory import stage_memory
from megatron_skywork.report.build import build_report
from megatron_skywork.report.load import load_run
from megatron_skywork.report.prediction import Comparison, compare, comparison_lines, shown

ROOT = Path(__file__).resolve().parents[2]
H100, GIB = "NVIDIA H100 80GB HBM3", 2**30
PIPELINE = {"seconds": 1.0, "bubble": 0.25, "busy_seconds": [0.8, 0.7], "memory_bytes": [3 * GIB, 2 * GIB]}


def settings(*overrides: str, world_size: int = 8) -> Config:
    return load_config([str(ROOT / "configs" / "tiny.yaml")], ["model.hidden_size=512", "parallel.pp=2", "train.micro_batch_size=1", *overrides], world_size)


def record(step: int, seconds: float = 2.0, **changes: Any) -> dict[str, Any]:
    whole = {"seconds": {"step": seconds}, "tokens_per_second": 800.0 / seconds, "mfu": 0.2, "memory_bytes": 3 * GIB, "pipeline": PIPELINE}
    return step_record(step, router=None, **{**whole, **changes})


def run_of(folder: Path, records: list[dict[str, Any]], config: Config, device: str, world_size: int = 8) -> Path:
    write_run(folder, records, config=config.model_dump(mode="json"))
    path = folder / "metrics.jsonl"
    header, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(header) | {"device": device, "world_size": world_size}), *rest]) + "\n")
    return folder


def rows(comparison: Comparison) -> dict[str, tuple[float | None, float | None]]:
    return {row.name: (row.predicted, row.measured) for row in comparison.rows}


def test_a_gpus_run_is_compared_by_the_devices_name(tmp_path: Path):
    """The first of several records, which compiles, does not count for speed; the largest peak of each stage counts for memory."""
    more = {**PIPELINE, "bubble": 0.15, "memory_bytes": [GIB, 4 * GIB]}
    records = [record(1, 50.0), record(2, 2.0), record(3, 4.0, pipeline=more, mfu=0.1)]
    config = settings()
    found = compare(load_run(run_of(tmp_path, records, config, H100)))
    node = one_node(H100, 8)
    assert node is not None
    foreseen = estimate(config, node)
    first, second = (stage.allocated for stage in stage_memory(config, 8))
    assert rows(found) == {
        "Step": (foreseen.step_seconds, 3.0), "Tokens per GPU and second": (foreseen.tokens_per_gpu_second, pytest.approx((400 + 200) / 2 / 8)),
        "MFU": (foreseen.mfu, pytest.approx(0.15)), "Bubble": (foreseen.bubble, pytest.approx(0.2)),
        "Peak memory of a rank, stage 1": (first, 3 * GIB), "Peak memory of a rank, stage 2": (second, 4 * GIB),
    }  # fmt: skip
    assert found.rows[0].ratio == pytest.approx(3.0 / foreseen.step_seconds)
    assert any("a node of H100-80G" in note for note in found.notes) and any("balanced router" in note for note in found.notes)


def test_a_cluster_file_decides_where_it_is_given(tmp_path: Path):
    config = settings("parallel.ep=4")
    run = load_run(run_of(tmp_path, [record(1)], config, H100))
    found = compare(run, "dgx_h200:16")
    assert found.rows[0].predicted == estimate(config, part_of(load_cluster("dgx_h200:16"), 8)).step_seconds != compare(run).rows[0].predicted
    with pytest.raises(ConfigError, match="dgx_h200:0|no such"):
        compare(run, "dgx_h200:0")
    wide = load_run(run_of(tmp_path / "wide", [record(1)], settings("train.global_batch_size=32", world_size=64), H100, world_size=64))
    with pytest.raises(ConfigError, match="has 16 GPUs, and the run has 64 ranks"):
        compare(wide, "dgx_h200:2")
    assert any("no rates of NVIDIA H100 80GB HBM3 and its network" in note for note in compare(wide).notes)


def test_a_cpus_memory_is_not_compared(tmp_path: Path):
    found = compare(load_run(run_of(tmp_path, [record(1), record(2)], settings(), "cpu")))
    assert all(row.ratio is None for row in found.rows) and rows(found)["Step"] == (None, 2.0)
    assert rows(found)["Peak memory of a rank, stage 1"] == (stage_memory(settings(), 8)[0].allocated, None)
    text = " ".join(found.notes)
    assert "no rates of this machine" in text and "python tools/calibrate.py --write FILE" in text and "resident set (here 3.0 GiB)" in text


def test_one_stage_has_neither_bubble_nor_stages(tmp_path: Path):
    records = [record(1, pipeline=None), record(2, pipeline=None, memory_bytes=5 * GIB)]
    found = compare(load_run(run_of(tmp_path, records, settings("parallel.pp=1"), H100)))
    assert list(rows(found)) == ["Step", "Tokens per GPU and second", "MFU", "Peak memory of a rank"]
    assert rows(found)["Peak memory of a rank"][1] == 5 * GIB


def test_a_run_of_before_the_bubble_was_recorded(tmp_path: Path):
    found = compare(load_run(run_of(tmp_path, [record(1, pipeline=None)], settings(), H100)))
    assert rows(found)["Bubble"][1] is None and any("this run did not record it" in note for note in found.notes)
    assert rows(found)["Peak memory of a rank, stage 2"][1] is None


def test_what_came_after_other_settings_is_left_out(tmp_path: Path):
    harmless = {"kind": "event", "event": "header_changed", "step": 2, "changed": {"config.train.stop_at_step": 9, "formulas.mfu": "x"}}
    telling = {"kind": "event", "event": "header_changed", "step": 3, "changed": {"world_size": 16, "config.parallel.pp": 4}}
    records = [record(1), record(2), harmless, record(3), telling, record(4, 100.0), record(5, 100.0, memory_bytes=9 * GIB)]
    found = compare(load_run(run_of(tmp_path, records, settings(), H100)))
    assert rows(found)["Step"][1] == 2.0 and found.notes[-1].startswith("Measured up to step 3;") and "world_size" in found.notes[-1]


def test_settings_that_cannot_be_read_foresee_nothing(tmp_path: Path):
    strange = load_run(write_run(tmp_path / "strange", [step_record(1)]))
    wrong = load_run(run_of(tmp_path / "wrong", [record(1)], settings(), H100, world_size=7))
    for run in (strange, wrong):
        found = compare(run)
        assert not found.rows and "holds no settings" in found.notes[0]


def test_figures_in_words():
    figures = [(0.9666, "seconds"), (29.678, "seconds"), (3 * GIB, "bytes"), (0.123, "share"), (1234.6, "tokens"), (None, "share")]
    assert [shown(*figure) for figure in figures] == ["0.967 s", "29.7 s", "3.0 GiB", "12.3 %", "1,235", "–"]
    assert comparison_lines(Comparison([], ["only this"])) == ["only this"]


# ---------------------------------------------------------------------------------------------------------------- the page and the tool


def test_the_page_and_the_tool_show_it(tmp_path: Path):
    pytest.importorskip("megatron_skywork.report.style", reason="needs the extra `plot`", exc_type=ImportError)
    folder = run_of(tmp_path / "run", [record(1), record(2)], settings(), "<b>H100 & co</b>")
    page = Page(build_report([folder]).path)
    assert "Predicted and measured" in page.text and "measured / predicted" in page.text and "no rates of <b>H100 & co</b>" in page.text
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(folder), "--cluster", "dgx_h100:1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    step = next(line for line in lines if line.split()[:1] == ["Step"])
    assert step.endswith(f"{compare(load_run(folder), 'dgx_h100:1').rows[0].ratio:.3f}") and "2 s" in step
    (described,) = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300).stdout)["runs"]
    assert described["prediction"]["rows"][0]["name"] == "Step" and described["prediction"]["notes"]
    refused = subprocess.run([*command[:-1], "dgx_z900"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "dgx_z900" in refused.stderr and "Traceback" not in refused.stderr


def test_a_page_without_a_prediction_has_no_such_section(tmp_path: Path):
    pytest.importorskip("megatron_skywork.report.style", reason="needs the extra `plot`", exc_type=ImportError)
    assert "Predicted and measured" not in Page(build_report([write_run(tmp_path / "x", [step_record(1)])]).path).text
