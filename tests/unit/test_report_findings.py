"""What the report concludes: each sentence names the right layer, expert, step and number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_samples import CONFIG, ROUTER, step_record, write_run

from megatron_skywork.report.findings import findings
from megatron_skywork.report.key_figures import key_figures
from megatron_skywork.report.load import load_run


def texts(folder: Path) -> dict[str, str]:
    return {finding.text: finding.level for finding in findings(load_run(folder))}


def found(folder: Path, pattern: str) -> str:
    """The level of the one finding that matches."""
    levels = [level for text, level in texts(folder).items() if re.search(pattern, text)]
    assert len(levels) == 1, (pattern, texts(folder))
    return levels[0]


def test_findings_name_the_layers_and_experts(tmp_path: Path):
    evaluations = [{"kind": "eval", "step": step, "losses": {"valid": loss}} for step, loss in ((1, 3.0), (50, 2.5), (100, 2.6))]
    folder = write_run(tmp_path, [step_record(step) for step in range(1, 101)] + evaluations + [{"kind": "event", "event": "resume", "step": 40}])
    assert found(folder, r"^Training loss fell from 2\.945 to 2\.045 over 100 steps") == "good"
    assert found(folder, r"Held-out loss on valid fell from 3\.000 to 2\.600") == "good"
    assert found(folder, r"valid was lowest at step 50 \(2\.500\)") == "warn"
    assert found(folder, r"^1 starved expert of 8: expert 3 of layer 3 \(2 %\) receives less than 10 %") == "warn"
    assert found(folder, r"Layer 3 drops most: 4\.20 % .* against 2\.60 % on average") == "note"
    assert found(folder, r"least even in layer 3: .* 1\.88 times the even share \(mean over layers 1\.44\)") == "note"
    assert found(folder, r"between 0\.0050 \(layer 1\) and 0\.0099 \(layer 3\)\. 1 layer is at the maximum of 0\.01.* 100 steps 37 %") == "note"
    assert found(folder, r"gate of layer 1 \(100 %\) is almost flat") == "warn"
    assert found(folder, r"least so in layer 1, 1\.01 times") == "warn"
    assert found(folder, r"clipped at 100 % of the steps") == "note"
    assert found(folder, r"2,000 tokens per second, 1\.5 TFLOP/s per device, 38\.0 % of peak") == "note"
    assert found(folder, r"resumed once, from step 40") == "note"
    assert [finding.level for finding in findings(load_run(folder))][0] == "warn"


def test_findings_of_trouble(tmp_path: Path):
    records = [step_record(step, loss=2.0 + 0.01 * step, seconds={"data": 0.5, "step": 1.0}, data_wait_share=0.5) for step in range(1, 51)]
    records[29] |= {"grad_norm": 60.0}
    records[39] |= {"loss": None, "skipped": True, "nonfinite": ["loss"]}
    folder = write_run(tmp_path, records)
    for pattern in (
        "loss rose from",
        "not finite were recorded at 1 step: 40",
        "skipped 1 recorded step",
        "spiked to 60.0 at step 30, 40 times",
        "data takes 50 % of a step",
    ):
        assert found(folder, pattern) == "warn", pattern


def test_findings_of_wrong_numbers(tmp_path: Path):
    spike = {"loss": 9.0, "median": 2.5, "score": 30.0, "samples": [160, 167]}
    suspect = {"rank": 5, "host": "node2", "outvoted": True, "num_tensors": 1, "first": ["norm"]}
    events = [
        {"event": "nonfinite", "step": 3, "samples": [16, 23], "what": ["loss"], "ranks": [7, 2], "sources": []},
        {"event": "nonfinite", "step": 4, "samples": [24, 31], "what": ["loss"], "ranks": [7], "sources": []},
        {"event": "spike", "step": 12, **spike, "loss": 4.0, "score": 8.0, "answer": "its update was left out"},
        {"event": "rewind", "step": 16, "folder": "x", "passed_over": [128, 167], "spike": {"step": 21, **spike}, "number": 1},
        {"event": "replicas", "step": 40, "suspects": [suspect, {**suspect, "rank": 1, "outvoted": False}]},
    ]
    folder = write_run(tmp_path, [step_record(step) for step in range(1, 41)] + [{"kind": "event", **event} for event in events])
    assert found(folder, r"not finite came from rank 7 in 2 steps, and from 1 other rank no more often") == "warn"
    assert found(folder, r"spiked at 2 steps: 12 and 21; most at step 21, to 9\.000 from a median of 2\.500\. Updates left out: 1\.") == "warn"
    assert found(folder, r"After the spike of step 21 the run went back to step 16, and passed over samples 128 to 167\.") == "note"
    assert found(folder, r"Copies of parameters differed at step 40: rank 5 on node2\.") == "warn"


def test_dead_experts_are_not_also_starved(tmp_path: Path):
    folder = write_run(tmp_path, [step_record(1, router={**ROUTER, "load": [[0.5, 0.5, 0.0, 0.0], [0.4, 0.3, 0.3, 0.0]]})])
    assert found(folder, r"^3 dead experts of 8: expert 2 of layer 1 \(0 %, from the start\), expert 3 of layer 1 .* receive less than 1 %") == "warn"
    assert not any("starved" in text or "in use" in text for text in texts(folder))
    assert key_figures(load_run(folder)).dead_experts == 3


def test_a_healthy_router_is_called_so(tmp_path: Path):
    healthy = {**ROUTER, "load": [[0.25] * 4, [0.3, 0.2, 0.3, 0.2]], "drop_rate": [0.0, 0.0], "entropy": [0.9, 0.9], "max1_over_max2": [2.0, 2.0]}
    folder = write_run(tmp_path, [step_record(step, router=healthy) for step in range(1, 5)])
    assert found(folder, r"Every one of the 8 experts is in use; the least, expert 1 of layer 3, receives 80 %") == "good"
    assert found(folder, r"Nothing was dropped: the capacity factor of 1\.1 was never reached") == "note"
    assert "warn" not in texts(folder).values()


def routed(steps: int, of: dict[str, Any] | None = None, **series: Any) -> list[dict[str, Any]]:
    """Step records whose router lists are functions of the part of the run that is over."""
    records = []
    for step in range(1, steps + 1):
        changed = {name: values(step / steps) if callable(values) else values for name, values in series.items()}
        records.append(step_record(step, router={**ROUTER, **(of or {}), **changed}))
    return records


def evaluated(step: int, changed: list[Any], similar: list[Any]) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "losses": {}, "router": {"layers": [1, 3], "changed_experts": changed, "expert_similarity": similar}}


def test_a_dead_expert_is_named_with_its_step_and_its_layers_coefficient(tmp_path: Path):
    def load(part: float) -> list[list[float]]:
        dying = 0.25 if part < 0.5 else 0.0
        return [[0.25] * 4, [0.5 - dying, dying, 0.25, 0.25]]

    folder = write_run(tmp_path, routed(100, load=load, coefficient=lambda part: [0.005, 0.01 - 0.006 * part]))
    assert found(folder, r"^1 dead expert of 8: expert 1 of layer 3 \(0 %, since step 50\) receives less than 1 %") == "warn"
    assert not any("came back" in text for text in texts(folder))
    assert found(folder, r"^1 dead expert .* coefficient of layer 3 went from 0\.0097 to 0\.0043 meanwhile") == "warn"


def test_an_expert_that_came_back_is_not_dead(tmp_path: Path):
    folder = write_run(tmp_path, routed(100, load=lambda part: [[0.25] * 4, [0.0, 0.5, 0.25, 0.25] if part <= 0.3 else [0.25] * 4]))
    assert found(folder, r"1 expert was dead for a while and came back: expert 0 of layer 3 \(last dead about step 30\)") == "note"
    assert not any("dead expert" in text for text in texts(folder))


@pytest.mark.parametrize(
    ("drop", "coefficient", "said"),
    [
        (0.04, [0.01, 0.0082], r"fell from 0\.0099 to 0\.0083 and has arrived where its drop rate leads it, at 0\.0080 \(0\.2 x 4\.00 %\)"),
        (0.01, [0.01, 0.006], r"fell from 0\.0098 to 0\.0062 and is still on its way down to 0\.0020 \(0\.2 x 1 %\)"),
        (0.04, [0.001, 0.004], r"rose from 0\.0012 to 0\.0039 and is still on its way up to 0\.0080"),
        (0.12, [0.01, 0.01], r"stayed at 0\.0100: it is at the maximum, where 0\.2 x 12\.0 % would be 0\.0240\.$"),
        (0.12, [0.01, 0.0094], r"fell from 0\.0100 to 0\.0094: it is near the maximum, where 0\.2 x 12\.0 % would be 0\.0240\.$"),
    ],
)
def test_what_the_coefficient_did_about_the_drops(tmp_path: Path, drop: float, coefficient: list[float], said: str):
    first, last = coefficient
    folder = write_run(tmp_path, routed(100, drop_rate=[drop, 0.001], coefficient=lambda part: [first + part * (last - first), 0.005]))
    assert found(folder, rf"^Layer 1 drops most: .*Its adaptive coefficient {said}") in ("note", "warn")


@pytest.mark.parametrize(("last", "said"), [(0.005, r"is fixed at 0\.005"), (0.001, r"went from 0\.00478 to 0\.00118 on schedule")])
def test_a_coefficient_that_answers_nothing_is_called_so(tmp_path: Path, last: float, said: str):
    config = {**CONFIG, "moe": {**CONFIG["moe"], "adaptive": {"enabled": False}}}
    folder = write_run(tmp_path, routed(100, coefficient=lambda part: [0.0, round(0.005 + part * (last - 0.005), 9)]), config=config)
    assert found(folder, rf"^Layer 3 drops most: .*Its auxiliary coefficient {said}: nothing answers the drops") == "note"
    assert not any(text.startswith("Adaptive") for text in texts(folder))


def test_gates_that_are_saturated_or_getting_sharper(tmp_path: Path):
    folder = write_run(tmp_path, routed(100, entropy=[0.7, 0.05], max1_over_max2=lambda part: [1.0 + part, 1000.0 * part]))
    assert found(folder, r"The gate of layer 3 \(4 %\) is saturated: .* below 15 % of the largest possible") == "warn"
    assert found(folder, r"The gate of layer 3 is saturated: its first choice is 955 times as probable") == "warn"
    assert found(folder, r"on average 478\.\d\d times as probable as the second \(2\d\.\d\d at the start\); least so in layer 1, 1\.96 times\.$") == "note"


def test_experts_that_grow_apart_and_tokens_that_settle(tmp_path: Path):
    evaluations = [evaluated(1, [None, None], [1.0, 1.0]), evaluated(2, [0.5, 0.3], [0.9, 0.9]), evaluated(3, [0.1, 0.2], [0.5, 0.7])]
    folder = write_run(tmp_path, [step_record(1), *evaluations])
    assert found(folder, r"Expert similarity fell from 1\.000 at step 1 to 0\.600 at step 3; most alike are those of layer 3, at 0\.700") == "good"
    assert found(folder, r"evaluation at step 3, 15\.0 % of the probe's tokens .* most in layer 3 \(20\.0 %\); at step 2 it was 40\.0 %") == "note"
    assert key_figures(load_run(folder)).expert_similarity == pytest.approx(0.6)


def test_experts_that_stay_copies_are_a_warning(tmp_path: Path):
    folder = write_run(tmp_path, [step_record(1), evaluated(1, [None, None], [1.0, 1.0]), evaluated(2, [0.0, 0.0], [0.997, 1.0])])
    assert found(folder, r"Expert similarity fell from 1\.000 .* still copies") == "warn"
