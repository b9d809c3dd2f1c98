"""The report: what is read, what is concluded, and that its page is whole, harmless and needs nothing but a browser."""

from __future__ import annotations

import base64
import builtins
import importlib.util
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_skywork.errors import ConfigError, DataError
from megatron_skywork.report.build import build_report
from megatron_skywork.report.findings import findings, key_figures
from megatron_skywork.report.load import find_summary, load_run, nan_mean, window_of

style = pytest.importorskip("megatron_skywork.report.style", reason="needs the extra `plot`", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
ADAPTIVE = {"enabled": True, "sensitivity": 0.2, "maximum": 0.01, "momentum": 0.99}
CONFIG: dict[str, Any] = {
    "parallel": {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "cp": 1},
    "moe": {"num_experts": 4, "topk": 2, "capacity_factor": 1.1, "adaptive": ADAPTIVE},
    "optim": {"clip_grad": 1.0},
    "train": {"steps": 100},
}
ROUTER = {
    "layers": [1, 3],
    "load": [[0.25, 0.25, 0.25, 0.25], [0.47, 0.30, 0.225, 0.005]],
    "drop_rate": [0.01, 0.042],
    "coefficient": [0.005, 0.0099],
    "aux_loss": [0.0, 0.1],
    "entropy": [math.log(4), 0.5 * math.log(4)],
    "max1_over_max2": [1.01, 3.0],
}


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": step, "time": 1000.0 + step, "loss": 3.0 - 0.01 * step, "grad_norm": 1.5, "learning_rate": 1e-3 / step}
    record |= {"tokens": 4096 * step, "tokens_per_second": 2000.0, "tflops_per_device": 1.5, "mfu": 0.38, "skipped": False}
    record |= {"seconds": {"data": 0.01, "forward_backward": 1.0, "step": 1.1}, "router": ROUTER}
    return record | changes


def write_run(folder: Path, records: list[dict[str, Any]], config: dict[str, Any] | None = None, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = {"kind": "header", "config": config or CONFIG, "world_size": 8, "parameters": {"total": 373.1e6, "active": 214.6e6}, "device": "cpu"}
    header["formulas"] = {"mfu": "tflops_per_device / 312"}
    text = "".join(json.dumps(record) + "\n" for record in [header, *records])
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {finding.text: finding.level for finding in findings(load_run(folder))}


def found(folder: Path, pattern: str) -> str:
    """The level of the one finding that matches."""
    levels = [level for text, level in texts(folder).items() if re.search(pattern, text)]
    assert len(levels) == 1, (pattern, texts(folder))
    return levels[0]


class Page(HTMLParser):
    """What a browser would see: texts, tags, and everything that could load something."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.split(",", 1)[1], validate=True) for source in sources]


# ---------------------------------------------------------------------------------------------------------------- reading


def test_a_run_is_read_as_arrays(tmp_path: Path):
    records = [step_record(1), {"kind": "eval", "step": 1, "losses": {"valid": 3.0}}, step_record(2, loss=None, nonfinite=["loss"]), step_record(3, mfu=None)]
    run = load_run(write_run(tmp_path / "run", records, tail='{"kind":"step","st'))
    assert run.steps_S.tolist() == [1, 2, 3] and run.nonfinite_steps == [2]
    assert np.array_equal(run.series("loss"), [2.99, math.nan, 2.97], equal_nan=True)
    assert run.series("seconds.data").tolist() == [0.01] * 3 and np.isnan(run.series("never recorded")).all()
    assert run.evaluations["valid"][1].tolist() == [3.0] and run.setting("moe.adaptive.maximum") == 0.01 and run.setting("moe.no.such") is None
    assert run.router is not None and run.router.layers == [1, 3]
    assert run.router.max_over_mean_SL[0].tolist() == pytest.approx([1.0, 1.88])
    assert run.router.entropy_SL[0].tolist() == pytest.approx([1.0, 0.5])


def test_loads_are_of_the_last_records(tmp_path: Path):
    moved = {**ROUTER, "load": [[1.0, 0.0, 0.0, 0.0]] * 2}
    run = load_run(write_run(tmp_path, [step_record(step, router=moved if step <= 18 else ROUTER) for step in range(1, 21)]))
    assert run.window == window_of(20) == 2
    assert run.router is not None and run.router.load_LE.tolist() == ROUTER["load"]


def test_a_step_recorded_twice_counts_as_last_recorded(tmp_path: Path):
    run = load_run(write_run(tmp_path, [step_record(1), step_record(2, loss=9.0), step_record(2, loss=2.0)]))
    assert run.series("loss").tolist() == [2.99, 2.0]


@pytest.mark.parametrize(
    ("make", "message"), [(None, "no such folder"), ("folder", "has no metrics.jsonl"), ("empty", "no step record"), ("header", "no step record")]
)
def test_nothing_to_report_is_said(tmp_path: Path, make: str | None, message: str):
    folder = tmp_path / "run"
    if make is not None:
        folder.mkdir()
    if make == "empty":
        (folder / "metrics.jsonl").touch()
    if make == "header":
        write_run(folder, [])
    with pytest.raises(DataError, match=message):
        load_run(folder)


def test_nan_mean():
    assert nan_mean(np.array([1.0, math.nan, 3.0])) == 2.0 and math.isnan(nan_mean(np.array([math.nan])))
    assert np.array_equal(nan_mean(np.array([[1.0, math.nan], [3.0, math.nan]]), axis=0), [2.0, math.nan], equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------- findings


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
    assert found(folder, r"gate of layer 1 is almost flat") == "warn"
    assert found(folder, r"least so in layer 1, 1\.01 times") == "warn"
    assert found(folder, r"clipped at 100 % of the steps") == "note"
    assert found(folder, r"2,000 tokens per second, 1\.5 TFLOP/s per device, 38\.0 % of peak") == "note"
    assert found(folder, r"resumed once, from step 40") == "note"
    assert [finding.level for finding in findings(load_run(folder))][0] == "warn"


def test_findings_of_trouble(tmp_path: Path):
    records = [step_record(step, loss=2.0 + 0.01 * step, seconds={"data": 0.5, "step": 1.0}) for step in range(1, 51)]
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


def test_dead_experts_are_not_also_starved(tmp_path: Path):
    folder = write_run(tmp_path, [step_record(1, router={**ROUTER, "load": [[0.5, 0.5, 0.0, 0.0], [0.4, 0.3, 0.3, 0.0]]})])
    assert found(folder, r"^3 dead experts of 8: expert 2 of layer 1 \(0 %\), expert 3 of layer 1 .* receive less than 1 %") == "warn"
    assert not any("starved" in text or "in use" in text for text in texts(folder))
    assert key_figures(load_run(folder)).dead_experts == 3


def test_a_healthy_router_is_called_so(tmp_path: Path):
    healthy = {**ROUTER, "load": [[0.25] * 4, [0.3, 0.2, 0.3, 0.2]], "drop_rate": [0.0, 0.0], "entropy": [0.9, 0.9], "max1_over_max2": [2.0, 2.0]}
    folder = write_run(tmp_path, [step_record(step, router=healthy) for step in range(1, 5)])
    assert found(folder, r"Every one of the 8 experts is in use; the least, expert 1 of layer 3, receives 80 %") == "good"
    assert found(folder, r"Nothing was dropped: the capacity factor of 1\.1 was never reached") == "note"
    assert "warn" not in texts(folder).values()


# ---------------------------------------------------------------------------------------------------------------- drawing


def test_smoothing_keeps_the_level_and_the_median_ignores_spikes():
    values = np.full(200, 5.0)
    values[[0, 50]] = math.nan
    smooth = style.smoothed(values)
    assert smooth is not None and smooth == pytest.approx(np.full(200, 5.0))
    values[100] = 1000.0
    median = style.running_median(values)
    assert median is not None and median == pytest.approx(np.full(200, 5.0))
    assert style.smoothed(np.ones(59)) is None


def test_a_heatmap_has_few_columns_that_cover_all_steps():
    steps = np.arange(10, 10_010, 10)
    edges, means = style.binned(steps, np.stack([steps, np.full(1000, math.nan)], axis=1).astype(float))
    assert len(edges) == len(means) + 1 <= 121 and edges[0] == 5 and edges[-1] == 10_005
    assert np.all(np.diff(edges) > 0) and np.average(means[:, 0], weights=np.diff(edges)) == pytest.approx(steps.mean()) and np.isnan(means[:, 1]).all()


# ---------------------------------------------------------------------------------------------------------------- the page


def test_the_page_holds_every_figure_and_loads_nothing(tmp_path: Path):
    records = [step_record(step, router={**ROUTER, "coefficient": [0.01 / step, 0.005]}) for step in range(1, 71)]
    folder = write_run(tmp_path / "a run", [*records, {"kind": "eval", "step": 70, "losses": {"valid": 2.0}}])
    (folder / "run_status.json").write_text('{"status": "finished"}')
    report = build_report([folder])
    assert report.path == folder / "report.html"
    page = Page(report.path)
    pictures = sorted(path.name for path in (folder / "report").iterdir())
    expected = ["loss", "learning_rate", "grad_norm", "throughput", "phases", "expert_load", "load_balance", "drop_rate", "drop_rate_by_layer"]
    assert pictures == sorted(f"{name}.png" for name in [*expected, "coefficient", "coefficient_by_layer", "entropy", "max1_over_max2"])
    assert sorted(page.images()) == sorted(path.read_bytes() for path in report.figures) and len(report.figures) == 13
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 4000 for picture in page.images())
    for shown in (
        "a run",
        "finished",
        "373.1 M parameters, 214.6 M active",
        "PP 2 · TP 2 · EP 2 · DP 2",
        "8 × cpu",
        "70 of 100",
        "4 per layer, top-2",
        "tflops_per_device / 312",
    ):
        assert shown in page.text, shown
    assert len(re.findall(r"<tr><td>[13]</td>", page.source)) == 2
    loading = [(tag, name) for tag, attributes in page.tags for name in attributes if name in ("src", "href", "srcset", "action", "data", "background")]
    assert set(loading) == {("img", "src")}
    assert not {"script", "link", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page.source.replace("data:image/png;base64,", "").split("<main>")[0])
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def test_hostile_strings_are_shown_not_run(tmp_path: Path):
    config = {**CONFIG, "run_dir": HOSTILE}
    evaluation = {"kind": "eval", "step": 2, "losses": {HOSTILE: 2.0}}
    records = [step_record(1), step_record(2), {**evaluation, "step": 1, "losses": {HOSTILE: 3.0}}, evaluation]
    folder = write_run(tmp_path / "<b>run & co", records, config=config)
    header, *rest = (folder / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(header) | {"device": HOSTILE, "formulas": {HOSTILE: HOSTILE}}
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(changed), *rest]) + "\n")
    (folder / "run_status.json").write_text(json.dumps({"status": HOSTILE}))
    (folder / "config.yaml").write_text(HOSTILE)
    summary = {"stages": [{"name": HOSTILE, "seconds": 1}], "loss_before": {HOSTILE: 1.0}, "loss_after": {}, "generated": {"prompt": HOSTILE, "text": HOSTILE}}
    for folders in ([folder], [folder, folder]):
        page = Page(build_report(folders, tmp_path / "out.html", summary=summary).path)
        assert "script" not in {tag for tag, _ in page.tags}
        assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert sum(tag == "img" for tag, _ in page.tags) == len(page.images())
        assert page.text.count(HOSTILE) >= 6


def test_dense_runs_and_single_records_have_a_page(tmp_path: Path):
    dense = write_run(tmp_path / "dense", [step_record(step, router=None) for step in (1, 2)], config={"train": {"steps": 2}})
    single = write_run(tmp_path / "single", [step_record(1)])
    bare = write_run(tmp_path / "bare", [{"kind": "step", "step": 7, "loss": 1.0}], config={"moe": None})
    assert [path.stem for path in build_report([dense]).figures] == ["loss", "learning_rate", "grad_norm", "throughput", "phases"]
    assert "expert_load" in [path.stem for path in build_report([single]).figures]
    assert [path.stem for path in build_report([bare]).figures] == ["loss"]
    assert "Dead experts" not in Page(dense / "report.html").text


def test_several_runs_share_a_page(tmp_path: Path):
    folders = [write_run(tmp_path / name / "run", [step_record(step, loss=loss) for step in range(1, 4)]) for name, loss in (("norm", 2.125), ("plain", 2.375))]
    folders.append(write_run(tmp_path / "dense", [step_record(1, router=None)], config={"train": {"steps": 1}}))
    report = build_report(folders, tmp_path / "both.html")
    page = Page(report.path)
    for shown in ("3 runs compared", "norm/run", "plain/run", "dense", "2.125", "2.375"):
        assert shown in page.text, shown
    stems = [path.stem for path in report.figures]
    assert stems.count("loss") == 1 and {"expert_load_1", "expert_load_2"} <= set(stems) and "expert_load_3" not in stems
    assert all(path.parent == tmp_path / "both" for path in report.figures) and len(page.images()) == len(stems)
    assert build_report(folders).path == folders[0] / "comparison.html"


def test_the_demonstration_is_shown_from_either_place(tmp_path: Path):
    folder = write_run(tmp_path / "demo" / "run", [step_record(1)])
    assert find_summary(folder) is None
    summary: dict[str, Any] = {"stages": [{"name": "upcycle", "seconds": 12.5}, {"name": "train", "seconds": 150}]}
    summary |= {"loss_before": 2.9134, "loss_after": 2.0912, "largest_logit_difference": 1.9e-6, "resume_equal": True, "generated_text": "def main():"}
    (tmp_path / "demo" / "summary.json").write_text(json.dumps(summary))
    page = Page(build_report([folder]).path)
    for shown in ("demo/run", "upcycle", "2m 30s", "2.9134 → 2.0912", "at most 1.9e-06", "Resumed runequal to the uninterrupted one", "def main():"):
        assert shown in page.text, shown
    other = {"stages": [], "held_out_loss": {"before": 3.0, "after": 2.0}, "resume_equal": False, "generated": {"prompt": "def ", "text": "f(x)"}}
    page = Page(build_report([folder], tmp_path / "x.html", summary=other).path)
    for shown in ("3.0000 → 2.0000", "NOT equal", "def f(x)"):
        assert shown in page.text, shown
    assert "def main():" not in page.text


# ---------------------------------------------------------------------------------------------------------------- the tool


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_the_tool_writes_and_says_where(tmp_path: Path):
    folder = write_run(tmp_path / "x", [step_record(1), step_record(2)])
    result = tool(folder, "--json")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert Path(content["report"]).is_file() and len(content["figures"]) == 13 and content["runs"][0]["key_figures"]["dead_experts"] == 0


def test_the_tool_refuses_without_traceback(tmp_path: Path):
    missing = tool(tmp_path / "nowhere")
    assert missing.returncode == 3 and "no such folder" in missing.stderr and "Traceback" not in missing.stderr
    assert tool().returncode == 2


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_run(tmp_path, [step_record(1)])
    real_find, real_import = importlib.util.find_spec, builtins.__import__

    def no_import(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real_find(name, *rest))
    monkeypatch.setattr(builtins, "__import__", no_import)
    with pytest.raises(ConfigError, match=r"pip install 'megatron_skywork\[plot\]'"):
        build_report([folder])


def test_an_output_that_is_not_a_page_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        build_report([write_run(tmp_path / "x", [step_record(1)])], tmp_path / "x")
