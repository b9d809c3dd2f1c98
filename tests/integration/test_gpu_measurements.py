"""The scripts that measure a GPU run on a CPU too, in small, and their cases are settings a run would take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from memory_cases import CASES, settings  # noqa: E402

from megatron_skywork.config.load import check_config  # noqa: E402
from megatron_skywork.config.schema import Config  # noqa: E402


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_calibrate_writes_points(tmp_path: Path) -> None:
    import yaml

    done = run("tools/calibrate.py", "--seconds", "0.01", "--only", "grouped_matmul,copy,launch,links", "--write", str(tmp_path / "machine.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = yaml.safe_load((tmp_path / "machine.yaml").read_text())
    assert found["device"] == "cpu" and found["rates"]["links"] == [] and found["rates"]["launch"][0]["seconds"] > 0
    assert all(point["tflops"] > 0 for point in found["rates"]["grouped_matmul"]) and len(found["rates"]["copy"]) == 4


def test_a_wrong_name_is_answered() -> None:
    done = run("tools/calibrate.py", "--only", "matmull")
    assert done.returncode == 2 and "matmull" in done.stderr and "grouped_matmul" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", CASES)
def test_every_memory_case_is_a_run(name: str) -> None:
    check_config(Config(**settings(name)), 1)


def test_what_was_measured_is_of_these_cases() -> None:
    measured = json.loads((ROOT / "docs" / "measurements" / "h200_memory.json").read_text())
    assert {case["case"]: case["settings"] for case in measured["cases"]} == CASES
