"""benchmarks/train_step.py on a tiny model: everyone takes part, the figures follow from the raw times, and time is charged where it is spent.

No time that passed is looked at: the one test of the clock has a clock of its own.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import train_step  # noqa: E402
import train_step_parts  # noqa: E402
import train_step_process  # noqa: E402
import train_step_summary  # noqa: E402

CPU_CASES = [("skywork-on", "real"), ("skywork-off", "real"), ("core-local", "real"), ("hf", "real"), ("hf-eager", "real"),
             ("skywork-on", "balanced"), ("skywork-off", "balanced"), ("core-local", "balanced")]  # fmt: skip


def bench(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *words], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    done = bench("--shape", "tiny", "--precision", "fp32", "--repetitions", "2", "--steps", "1", "--parts", "1", "--matmul-size", "64", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_everyone_takes_part_or_says_why_not(result: dict[str, Any]):
    rows = {(row["contender"], row["router"]): row for row in result["rows"]}
    assert [case for case in rows if "step_seconds" in rows[case]] == CPU_CASES
    assert all("Transformer Engine" in row["failed"] for (name, _), row in rows.items() if name.endswith("-te")) and len(rows) == len(CPU_CASES) + 4
    for name in {name for name, _ in CPU_CASES}:
        assert result["facts"][name]["parameters"] == result["parameters"], f"{name} trains another model"
        assert result["facts"][name]["peak_bytes"] > result["facts"][name]["start_bytes"] > 0


def test_they_do_the_same_work(result: dict[str, Any]):
    rows = {(row["contender"], row["router"]): row for row in result["rows"]}
    for case in CPU_CASES:
        auxiliary = 0.02 if case[0].startswith("hf") else 0.0
        assert rows[case]["first_loss"] - auxiliary == pytest.approx(math.log(512), abs=0.05), case
        assert case == ("skywork-on", "real") or rows[case]["kept"] == 1, case
        assert (rows[case]["load_max_over_mean"] == 1) == (case[1] == "balanced"), case
    assert 0.5 < rows["skywork-on", "real"]["kept"] < 1, "capacity 1.1 drops something of an uneven load"


def test_figures_follow_from_the_raw_times(result: dict[str, Any]):
    seconds = {}
    for case, row in zip(result["cases"], result["rows"], strict=True):
        if row["failed"]:
            continue
        seconds[case["contender"], case["router"]] = raw = [block["wall"][0] for block in case["repetitions"]]
        assert len(raw) == 2 and row["step_seconds"] == pytest.approx(statistics.median(raw))
        assert row["tokens_per_second"] == pytest.approx(128 / row["step_seconds"])
        assert row["tflops_per_device"] == pytest.approx(result["flops_per_token"] * row["tokens_per_second"] / 1e12)
        assert row["of_matmul"] == pytest.approx(row["tflops_per_device"] / result["matmul"]["tflops"]) and row["mfu"] is None
        assert sum(case["parts"]["shares"].values()) == pytest.approx(1) and set(case["parts"]["shares"]) == set(train_step_parts.PARTS)
        needed = {"attention", "router", "experts", "output and loss", "optimizer"}
        needed |= set() if case["contender"].startswith("hf") else {"dispatch", "communication"}
        assert all(case["parts"]["shares"][part] > 0 for part in needed), case
    found = {(ratio["name"], ratio["router"]): ratio for ratio in result["ratios"]}
    pairs = zip(seconds["hf", "real"], seconds["skywork-off", "real"], strict=True)
    assert found["hf / skywork-off", "real"]["values"] == pytest.approx([theirs / ours for theirs, ours in pairs])
    features = found["skywork-on / skywork-off", "balanced"]
    assert features["goal"] == 1.01 and features["reached"] == (features["median"] <= 1.01)
    assert found["skywork-on / skywork-off", "real"]["goal"] is None, "what drops tokens does less work"
    assert found["hf / skywork-on", "real"]["goal"] is None and found["hf / skywork-off", "real"]["goal"] == 1.3


def test_mfu_is_tflops_over_the_data_sheet_s_peak():
    shape = {"hidden": 4608, "ffn": 12288, "heads": 36, "experts": 16, "topk": 2, "seq_length": 8192, "micro_batch": 1}
    block = {"wall": [0.5, 0.7], "cpu": [1.0, 1.0], "loss": [9.0, 8.0]}
    result = {
        "device": "NVIDIA H100 80GB HBM3", "clock": "wall", "tokens_per_step": 8192, "flops_per_token": 3e10, "report_flops_per_token": 4e10,
        "peak_tflops": 989.4, "matmul": {"tflops": 800.0}, "workload": {"shape": shape}, "facts": {"skywork-on": {"peak_bytes": 2, "start_bytes": 1}},
        "cases": [{"contender": "skywork-on", "router": "real", "warmup": [block], "repetitions": [block]}],
    }  # fmt: skip
    summary = train_step_summary.summarize(result)
    tflops = 3e10 * 8192 / 0.6 / 1e12
    assert summary["rows"][0]["mfu"] == pytest.approx(tflops / 989.4) and summary["rows"][0]["of_matmul"] == pytest.approx(tflops / 800)
    assert summary["rows"][0]["report_mfu"] == pytest.approx(tflops / 989.4 * 4 / 3)
    assert summary["mfu_goal"] == {"goal": 0.6, "skywork-on": {"mfu": pytest.approx(tflops / 989.4), "kept": None}}


def test_time_is_charged_to_the_part_that_spends_it():
    """A layer whose modules move a clock by known amounts, each its own in forward and in backward."""
    import torch

    now = [0.0]

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, seconds: float, *tensors: torch.Tensor) -> torch.Tensor:
            ctx.seconds, ctx.count = seconds, len(tensors)
            now[0] += seconds
            return torch.stack(tensors).sum(dim=0)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
            now[0] += 2 * ctx.seconds
            return (None, *[grad.clone() for _ in range(ctx.count)])

    class Doing(torch.nn.Module):
        def __init__(self, seconds: float):
            super().__init__()
            self.seconds, self.num_experts = seconds, 2

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return Work.apply(self.seconds, *tensors)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention, self.router, self.experts = Doing(1), Doing(10), Doing(1000)
            self.token_dispatcher = SimpleNamespace(token_dispatch=lambda *tensors: (Work.apply(100, *tensors), tensors[1]), token_combine=lambda x: x)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + self.self_attention(Work.apply(0.25, hidden))
            probs = self.router(hidden)
            return hidden + self.token_dispatcher.token_combine(self.experts(*self.token_dispatcher.token_dispatch(hidden, probs)))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.nn.Sequential(Layer(), Layer())

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return Work.apply(10_000, self.decoder(Work.apply(0.5, hidden))).sum()

    model, clock = Model(), train_step_parts.PartsClock(lambda: now[0])
    owner = SimpleNamespace(step=lambda: now.__setitem__(0, now[0] + 7))
    with clock.watching(model, {"optimizer": [(owner, "step")]}):
        clock.start()
        model(torch.ones(3, requires_grad=True)).backward()
        owner.step()
        seconds = clock.stop()
    # Two layers, forward once and backward twice; the rest is before attention and before the decoder.
    inside = {"attention": 6, "router": 60, "dispatch": 600, "experts": 6000}
    assert seconds == {**inside, "output and loss": 30_000, "optimizer": 7, "communication": 0, "other": 3}
    clock.start()
    model(torch.ones(3, requires_grad=True)).backward()
    assert clock.stop()["attention"] == 0, "nothing is watched outside"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; sys.exit('killed for memory')", "ended with 1: killed for memory"),
        ("import time; time.sleep(60)", "no answer after 0.2 s"),
        ("print('{\"failed\": \"not installed\"}')", "not installed"),
    ],
)
def test_a_contender_that_fails_says_why(script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(train_step_process, "WORKER", worker)
    with train_step_process.Process({}, timeout=0.2 if "sleep" in script else 60) as process, pytest.raises(train_step_process.ProcessFailure, match=said):
        process.read()


def test_intervals_that_overlap_count_once():
    assert train_step_parts.union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_a_dry_run_says_what_would_be_run():
    done = bench("--shape", "skywork_layer", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads(done.stdout)
    experts, attention, router, output = 16 * 3 * 4608 * 12288, 4 * 4608**2, 16 * 4608, 8192 * 4608
    assert plan["parameters"] == experts + attention + router + 2 * output + 3 * 4608
    assert plan["flops_per_token"] == 6 * (experts / 8 + attention + router + output) + 6 * 4608 * 8192
    assert plan["expected_bytes"]["skywork-on"] > 18 * plan["parameters"] and plan["contenders"][-1] == "hf-pure"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--contenders", "skywork-on,apex"], "apex: there is skywork-on"),
        (["--shape", "huge"], "skywork_layer"),
        (["--precision", "fp8"], "bf16"),
        (["--layers", "0"], "--layers 0: must be 1 or more"),
        (["--repetitions", "0"], "must be 1 or more"),
        (["--sequence", "8"], "--sequence"),
    ],
)
def test_wrong_options_are_answered_at_once(words: list[str], said: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        train_step.parse(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--shape", "tiny", "--heads", "5"], "num_attention_heads=5"), (["--shape", "skywork_layer", "--layers", "1000"], "GiB are needed")],
)
def test_impossible_work_is_refused_with_a_sentence(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["train_step.py", *words])
    assert train_step.main() == 2
    assert said in capsys.readouterr().err
