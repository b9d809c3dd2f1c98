"""benchmarks/scaling.py in short: that it runs, that counted and analytic bytes agree, and how wrong words are answered. No time is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_layouts_send_what_the_plan_says():
    done = bench("--layouts", "1", "2:ep=2", "--hidden", "64", "--tokens", "32", "--sequences", "1", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    alone, pair = json.loads(done.stdout)["results"]
    assert [row["what"] for row in alone["by_collective"]] == ["single numbers"] and alone["sequences"] == 1 and pair["sequences"] == 2
    assert len(pair["seconds"]) == 1
    *kinds, rest = pair["by_collective"]
    assert {(row["group"], row["operation"]) for row in kinds} >= {("ep", "all_to_all"), ("dp_cp", "reduce_scatter"), ("tp_dp_cp", "all_reduce")}
    assert all(row["exact"] for row in kinds) and 0 < rest["real"] < 100


def test_what_grows_with_the_world():
    done = bench("--growth", "--worlds", "4", "64", "--real-worlds", "2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["results"]
    few, many = found["mocked"]
    for name in ("start_calls", "step_calls", "log_calls"):
        assert few[name] == many[name] > 0, name
    assert few["log_calls"] == 3 and few["groups"]["member"] == many["groups"]["member"]
    assert [entry["indices_cut"] for entry in found["real"]] == [1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layouts", "four"], "4:ep=2"),
        (["--layouts", "2:dp=2"], "degrees: tp, pp, vpp, ep, etp"),
        (["--layouts", "4:ep=3"], "parallel.ep=3"),
        (["--hidden", "100"], "multiple of 64"),
        (["--steps", "0"], "1 or more"),
        (["--growth", "--worlds", "3"], "even"),
    ],
)
def test_wrong_words_are_answered_in_a_sentence(words: list[str], said: str):
    done = bench(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
