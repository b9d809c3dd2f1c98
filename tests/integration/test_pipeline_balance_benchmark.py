"""benchmarks/pipeline_balance.py in short: that it runs and proposes what its costs ask for, and that its clock of shared cores agrees with the planner's.

How near measured steps are to predicted ones is not looked at: a busy machine would decide it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from pipeline_balance_cores import replayed, step_seconds  # noqa: E402

from megatron_skywork.plan.simulation import PieceCost, simulate  # noqa: E402


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "pipeline_balance.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def passes(pieces: list[PieceCost], count: int) -> list[dict[str, list[float]]]:
    return [{"F": [piece.forward_seconds] * count, "B": [piece.backward_seconds] * count} for piece in pieces]


def test_with_a_core_per_stage_it_is_the_planners_clock() -> None:
    source = random.Random(3)
    for _ in range(30):
        stages, count = source.randint(2, 5), source.randint(1, 12)
        pieces = [PieceCost(source.uniform(1, 2), source.uniform(1, 4), send_seconds=source.uniform(0, 1)) for _ in range(stages)]
        sends = [piece.send_seconds for piece in pieces]
        expected = simulate(pieces, stages=stages, micro_batches=count).seconds
        assert replayed(passes(pieces, count), sends, stages) == pytest.approx(expected)


def test_fewer_cores_are_a_limit() -> None:
    """On one core nothing overlaps; on two, four stages take at least half of all their work, and the longest stage's."""
    pieces = [PieceCost(1.0, 2.0)] * 4
    assert step_seconds(pieces, 8, cores=1) == pytest.approx(4 * 8 * 3.0)
    assert 4 * 8 * 3.0 / 2 <= step_seconds(pieces, 8, cores=2) < 4 * 8 * 3.0 / 2 + 2 * 3 * 3.0
    lopsided = [PieceCost(1.0, 2.0)] * 3 + [PieceCost(5.0, 10.0)]
    assert step_seconds(lopsided, 8, cores=2) >= 8 * 15.0


def test_a_short_run_proposes_a_split_and_measures_both() -> None:
    words = ("--stages", "2", "--layers", "4", "--hidden", "64", "--vocab", "4096", "--tokens", "32", "--micro-batches", "3", "--steps", "2", "--json")
    done = bench(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    (entry,) = json.loads(done.stdout)["results"]
    assert entry["uniform"]["split"] == [2, 2] and sum(entry["planned"]["split"]) == 4
    for run in (entry["uniform"], entry["planned"]):
        assert len(run["seconds"]) == len(run["own_core_seconds"]) == 2 and min(run["seconds"]) > 0
        # Work done at once on several ranks cannot take longer than one after the other, nor than the busiest rank's alone.
        assert all(max(run["cpu_seconds"]) * 0.5 < seconds < 2 * sum(run["cpu_seconds"]) for seconds in run["own_core_seconds"])
    assert entry["planned"]["predicted_own_core"] <= entry["uniform"]["predicted_own_core"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--stages", "3", "--layers", "8"], "multiple"), (["--stages", "1"], "2 or more"), (["--steps", "0"], "1 or more")],
)
def test_wrong_words_are_answered_in_a_sentence(words: list[str], said: str) -> None:
    done = bench(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
