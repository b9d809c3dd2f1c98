"""benchmarks/upcycle.py on a tiny model: that it runs, compares what it says it compares, and notices a wrong mixture. No time is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--hidden", "64", "--ffn", "96", "--heads", "4", "--vocab", "100", "--layers", "1", "--num-experts", "4"]
WRONG = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import upcycle_dense
from safetensors.torch import load_file, save_file
code = upcycle_dense.main(sys.argv[1:])
out = Path(sys.argv[sys.argv.index("--out") + 1])
if code == 0 and "--dry-run" not in sys.argv:
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.2.w2.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", metadata={{"format": "pt"}})
sys.exit(code)
"""


def bench(tmp_path: Path, *more: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "benchmarks" / "upcycle.py"), "--folder", str(tmp_path), *TINY, "--workers", "1", "--repetitions", "1", "--json", *more]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_the_benchmark_runs_and_holds_the_experts_against_the_dense_model(tmp_path: Path):
    done = bench(tmp_path, "--formats", "mcore,hf", "--no-direct", "--memory-layers", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [case["format"] for case in found["pairs"]] == ["mcore", "hf"] and [run["layers"] for run in found["memory"]] == [1, 1]
    for case in found["pairs"]:
        assert case["bytes"] > found["source_bytes"] and case["tool_seconds"] > 0 and case["plain_seconds"] > 0
        assert case["ratio"]["median"] == pytest.approx(case["plain_seconds"] / case["tool_seconds"], abs=1e-4)
    check = found["pairs"][1]["check"]
    assert check["experts_equal"] == check["experts"] == 12 and check["others_equal"]
    assert list(tmp_path.iterdir()) == [], "nothing is left on the disk"


def test_a_wrong_mixture_fails_the_benchmark(tmp_path: Path):
    tool = tmp_path / "wrong.py"
    tool.write_text(WRONG.format(tools=str(ROOT / "tools")))
    done = bench(tmp_path, "--formats", "hf", "--no-direct", "--tool", str(tool))
    assert done.returncode == 1 and json.loads(done.stdout)["pairs"][0]["check"]["experts_equal"] == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--formats", "gguf"], "mcore, hf"), (["--workers", "0"], "below 1"), (["--layers", "0"], "1 or more"), (["--mergekit", "no-such"], "no-such")],
)
def test_wrong_arguments_are_answered_at_once(words: list[str], said: str, tmp_path: Path):
    done = bench(tmp_path, *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
