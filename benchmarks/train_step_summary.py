"""From the raw times of benchmarks/train_step.py to figures, ratios and goals.

A ratio is one repetition's: both contenders took their turn within it, so what the machine did meanwhile is in both. Median and quartiles are over repetitions.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from costs import quartiles

from megatron_skywork.metrics.throughput import throughput

# Theirs over ours, on a GPU and on CPU; and the most that the features may add.
GOALS = {"core-local": (3.0, 1.3), "hf": (2.0, 1.3), "hf-eager": (2.0, 1.3)}
FEATURES_GOAL = 1.01
MFU_GOAL = 0.60
OURS, PLAIN, THEIRS = "skywork-on", "skywork-off", ("core-local", "core-te", "hf", "hf-eager", "hf-pure")


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """What the table shows: `rows`, one per case; `ratios`; `memory_ratios`; `mfu_goal` where it applies."""
    rows = [row_of(case, result) for case in result["cases"]]
    on_gpu = result["device"] != "cpu"
    times, memory = list(ratios(result, on_gpu)), list(memory_ratios(result["facts"]))
    return {"rows": rows, "ratios": times, "memory_ratios": memory, "mfu_goal": mfu_goal(result, rows, on_gpu)}


def seconds_of(case: dict[str, Any], clock: str) -> list[float]:
    """Seconds of a step in every repetition."""
    return [statistics.mean(block[clock]) for block in case["repetitions"]]


def row_of(case: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """One case: speed, memory, loss; or why there is nothing."""
    facts = result["facts"][case["contender"]]
    row: dict[str, Any] = {"contender": case["contender"], "router": case["router"], "failed": facts.get("failed")}
    seconds = seconds_of(case, result["clock"])
    if not seconds:
        return row
    peak, matmul = result["peak_tflops"], result["matmul"]["tflops"]
    low, middle, high = quartiles(seconds)
    speed = throughput(tokens=result["tokens_per_step"], seconds=middle, flops_per_token=result["flops_per_token"], num_devices=1, peak=peak)
    report = result["report_flops_per_token"] * speed.tokens_per_second / 1e12
    shape = result["workload"]["shape"]
    assignments = case.get("parts", {}).get("assignments")
    losses = [loss for block in case["warmup"] + case["repetitions"] for loss in block["loss"]]
    return row | {
        "step_seconds": middle, "step_seconds_p25": low, "step_seconds_p75": high, **asdict(speed), "report_tflops_per_device": report,
        "report_mfu": None if peak is None else report / peak, "of_matmul": speed.tflops_per_device / matmul,
        "peak_bytes": facts["peak_bytes"], "start_bytes": facts["start_bytes"], "first_loss": losses[0], "last_loss": losses[-1],
        "kept": assignments and assignments / (shape["seq_length"] * shape["micro_batch"] * shape["topk"]),
        "load_max_over_mean": case.get("parts", {}).get("load_max_over_mean"),
    }  # fmt: skip


def ratios(result: dict[str, Any], on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Features on over off, and others over ours, for each kind of router. With a real one the features drop tokens and save work; goals are for equal work."""
    cases = {(case["contender"], case["router"]): seconds_of(case, result["clock"]) for case in result["cases"]}
    for router in ("balanced", "real"):
        on, off = cases.get((OURS, router)), cases.get((PLAIN, router))
        if on and off:
            yield ratio("skywork-on / skywork-off", router, on, off, goal=FEATURES_GOAL if router == "balanced" else None, at_most=True)
        for name in THEIRS:
            theirs, goals = cases.get((name, router)), GOALS.get(name)
            for mine in (OURS, PLAIN):
                ours = cases.get((mine, router))
                if theirs and ours:
                    is_same_work = router == "balanced" or mine == PLAIN
                    goal = goals[0 if on_gpu else 1] if goals and is_same_work else None
                    yield ratio(f"{name} / {mine}", router, theirs, ours, goal=goal, at_most=False)


def ratio(name: str, router: str, upper: Sequence[float], lower: Sequence[float], *, goal: float | None, at_most: bool) -> dict[str, Any]:
    """Ratios of the repetitions that both have, and whether their median reaches the goal."""
    values = [a / b for a, b in zip(upper, lower, strict=False)]
    low, middle, high = quartiles(values)
    reached = None if goal is None else middle <= goal if at_most else middle >= goal
    return {"name": name, "router": router, "median": middle, "p25": low, "p75": high, "values": values, "goal": goal, "at_most": at_most, "reached": reached}


def memory_ratios(facts: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Our peak over theirs, which should not be above 1; and the same without what libraries took before the models were built."""
    for name in THEIRS:
        for mine in (OURS, PLAIN):
            ours, theirs = facts.get(mine, {}), facts.get(name, {})
            if ours.get("peak_bytes") and theirs.get("peak_bytes"):
                whole = ours["peak_bytes"] / theirs["peak_bytes"]
                own = (ours["peak_bytes"] - ours["start_bytes"]) / max(1, theirs["peak_bytes"] - theirs["start_bytes"])
                yield {"name": f"{mine} / {name}", "peak": whole, "above_start": own, "reached": whole <= 1}


def mfu_goal(result: dict[str, Any], rows: Sequence[dict[str, Any]], on_gpu: bool) -> dict[str, Any] | None:
    """The goal for Skywork-MoE's layer on one GPU whose peak is known."""
    shape = result["workload"]["shape"]
    is_layer = [shape[name] for name in ("hidden", "ffn", "heads", "experts", "topk", "seq_length")] == [4608, 12288, 36, 16, 2, 8192]
    best = [row for row in rows if row["contender"].startswith("skywork") and row["router"] == "real" and row.get("mfu") is not None]
    if not (on_gpu and is_layer and best):
        return None
    return {"goal": MFU_GOAL, **{row["contender"]: {"mfu": row["mfu"], "kept": row["kept"]} for row in best}}
