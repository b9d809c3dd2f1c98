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
from megatron_skywork.plan.hardware import load_cluster  # noqa: E402
from megatron_skywork.plan.kernels import Kernels  # noqa: E402


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_calibrate_writes_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    done = run("tools/calibrate.py", "--seconds", "0.01", "--write", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    cluster = load_cluster(str(path))
    assert (cluster.name, cluster.gpu.name, cluster.world_size) == ("machine", "cpu", 1)
    rates = cluster.rates
    assert (len(rates.matmul), len(rates.grouped_matmul), len(rates.attention), len(rates.copy_), rates.links) == (15, 6, 5, 4, [])
    assert "calibrate.py" in rates.measured["command"] and rates.launch[0].seconds > 0
    kernels = Kernels(cluster.gpu, rates, "bf16")
    times = [kernels.matmul(256, 256, 256), kernels.grouped_matmul(4, 256, 64, 64), kernels.attention(1, 64, 4, 4, 64, backward=True), kernels.memory(1e6)]
    assert all(0 < seconds < 1 for seconds in times)


def test_calibrate_measures_links_under_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    words = ["--nproc-per-node", "2", "tools/calibrate.py", "--seconds", "0.01", "--only", "matmul,copy,links", "--json", "--write", str(path)]
    done = run("-m", "torch.distributed.run", "--standalone", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    cluster = load_cluster(str(path))
    assert (cluster.nodes, cluster.gpus_per_node, cluster.inside.name) == (1, 2, "measured")
    assert len(cluster.rates.links) == 9 and 1e6 < cluster.inside.bytes_per_second < 1e12
    assert cluster.rates.measured["command"].startswith("torchrun --nnodes 1 --nproc-per-node 2 tools/calibrate.py")


def test_a_wrong_name_is_answered() -> None:
    done = run("tools/calibrate.py", "--only", "matmull")
    assert done.returncode == 2 and "matmull" in done.stderr and "grouped_matmul" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", CASES)
def test_every_memory_case_is_a_run(name: str) -> None:
    check_config(Config(**settings(name)), 1)


def test_what_was_measured_is_of_these_cases() -> None:
    measured = json.loads((ROOT / "docs" / "measurements" / "h200_memory.json").read_text())
    assert {case["case"]: case["settings"] for case in measured["cases"]} == CASES
