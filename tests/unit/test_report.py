"""The report of one run: its page is whole, harmless and needs nothing but a browser."""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_samples import CONFIG, ROUTER, Page, step_record, write_run

from megatron_skywork.errors import ConfigError
from megatron_skywork.report.build import build_report
from megatron_skywork.report.load import find_summary

pytest.importorskip("megatron_skywork.report.style", reason="needs the extra `plot`", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_holds_every_figure_and_loads_nothing(tmp_path: Path):
    more: dict[str, Any] = {"max2_over_max3": [1.5, 1.2], "z_loss": [1.0, 2.0], "load": [[0.25] * 4, [0.5, 0.25, 0.25, 0.0]]}
    more["extra_aux_losses"] = {"switch_sequence": [1.0, 1.1]}
    records = [step_record(step, router={**ROUTER, **more, "coefficient": [0.01 / step, 0.005]}) for step in range(1, 71)]
    experts = {"layers": [1, 3], "changed_experts": [0.1, None], "expert_similarity": [0.9, 0.8]}
    folder = write_run(tmp_path / "a run", [*records, {"kind": "eval", "step": 70, "losses": {"valid": 2.0}, "router": experts}])
    (folder / "run_status.json").write_text('{"status": "finished"}')
    report = build_report([folder])
    assert report.path == folder / "report.html"
    page = Page(report.path)
    pictures = sorted(path.name for path in (folder / "report").iterdir())
    expected = ["loss", "learning_rate", "grad_norm", "throughput", "phases"]
    expected += ["expert_load", "load_moments", "load_of_worst_layers", "load_balance", "load_variation_by_layer", "load_percentiles", "dead_experts"]
    expected += ["drop_and_coefficient", "drop_rate_by_layer", "coefficient_by_layer", "max1_over_max2", "max2_over_max3", "entropy", "aux_loss", "z_loss"]
    expected += ["extra_switch_sequence", "changed_experts", "expert_similarity"]
    assert pictures == sorted(f"{name}.png" for name in expected)
    assert sorted(page.images()) == sorted(path.read_bytes() for path in report.figures) and len(report.figures) == len(expected)
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
    settings = {**CONFIG, HOSTILE: HOSTILE}
    other = write_run(tmp_path / "i><i>", [step_record(1)], config=settings)
    for folders in ([folder], [folder, other, write_run(tmp_path / "third", [step_record(1)], config={**CONFIG, HOSTILE: 1})]):
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
    assert "over_depth" not in [path.stem for path in build_report([single]).figures]
    assert "Dead experts" not in Page(dense / "report.html").text


def test_a_run_of_before_todays_keys_has_a_page_without_their_plots(tmp_path: Path):
    three = {name: [*values, values[0]] for name, values in ROUTER.items()} | {"layers": [1, 2, 3]}
    stems = {path.stem for path in build_report([write_run(tmp_path, [step_record(step, router=three) for step in range(1, 31)])]).figures}
    assert {"load_percentiles", "load_variation_by_layer", "load_moments", "over_depth"} <= stems
    assert not {"z_loss", "max2_over_max3", "changed_experts", "expert_similarity", "dead_experts", "coefficient_by_layer"} & stems


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
    assert Path(content["report"]).is_file() and len(content["figures"]) == len(list((folder / "report").iterdir())) > 10
    figures = content["runs"][0]["key_figures"]
    assert figures["dead_experts"] == 0 and figures["coefficient"] == pytest.approx(0.00745) and figures["expert_similarity"] is None


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
