"""The report of several runs: seeds of one variant are one line, what differs is listed, the best is marked, and it stays one whole page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_samples import CONFIG, ROUTER, Page, step_record, write_run

from megatron_skywork.report.build import build_report
from megatron_skywork.report.key_figures import cells, columns, key_figures
from megatron_skywork.report.load import Run, load_run
from megatron_skywork.report.tables import color_keys, comparison_table, settings_table
from megatron_skywork.report.variants import Variant, differing_settings, run_names, variants

pytest.importorskip("megatron_skywork.report.style", reason="needs the extra `plot`", exc_type=ImportError)


def config_with(seed: int = 1, **settings: Any) -> dict[str, Any]:
    """The sample's settings with some changed, by dotted names written with two underscores."""
    config = copy.deepcopy(CONFIG)
    config["train"]["seed"] = seed
    for name, value in settings.items():
        *path, last = name.split("__")
        section = config
        for key in path:
            section = section[key]
        section[last] = value
    return config


def write(folder: Path, seed: int = 1, losses: tuple[float, ...] = (3.0, 2.0), router: dict[str, Any] | None = ROUTER, **settings: Any) -> Path:
    config = config_with(seed, run_dir=str(folder), **settings)
    return write_run(folder, [step_record(step, loss=loss, router=router) for step, loss in enumerate(losses, start=1)], config=config)


def loaded(*folders: Path) -> list[Run]:
    return [load_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]


# ---------------------------------------------------------------------------------------------------------------- variants


def test_names_are_as_long_as_it_takes_to_tell_folders_apart(tmp_path: Path):
    def named(*folders: str) -> list[str]:
        return run_names([tmp_path / folder for folder in folders])

    assert named("a", "b") == ["a", "b"]
    assert named("a/seed_1", "a/seed_2") == ["seed_1", "seed_2"]
    assert named("a/seed_1", "b/seed_1", "c") == ["a/seed_1", "b/seed_1", "c"]
    assert named("x/a/s1", "y/a/s1", "z") == ["x/a/s1", "y/a/s1", "z"]
    assert named("demo/train", "b") == ["demo/train", "b"]
    assert named("a", "a") == ["a (1)", "a (2)"]


def test_runs_that_differ_in_their_seed_are_one_variant(tmp_path: Path):
    folders = [write(tmp_path / name / f"seed_{seed}", seed, moe__gate_norm=name == "norm") for name in ("norm", "plain") for seed in (1, 2)]
    folders.append(write(tmp_path / "alone", 1, moe__topk=1))
    found = variants(loaded(*folders))
    assert [(variant.name, len(variant.runs), variant.label) for variant in found] == [
        ("norm", 2, "norm (2 seeds)"),
        ("plain", 2, "plain (2 seeds)"),
        ("alone", 1, "alone"),
    ]


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (("norm_1-seed1", "norm_1-seed2"), "norm_1"),
        (("seed_11/norm_1", "seed_12/norm_1"), "norm_1"),
        (("norm/s1/train", "norm/s2/train"), "norm"),
        (("seed_1", "seed_2"), "seed_1"),
    ],
)
def test_a_variant_is_called_what_its_folders_share(tmp_path: Path, folders: tuple[str, str], name: str):
    other = write(tmp_path / "other", 1, moe__topk=1)
    found = variants(loaded(*[write(tmp_path / folder, seed) for seed, folder in enumerate(folders)], other))
    assert [len(variant.runs) for variant in found] == [2, 1] and found[0].name == name


def test_the_same_settings_twice_are_runs_and_not_seeds(tmp_path: Path):
    found = variants(loaded(write(tmp_path / "a_1", 5), write(tmp_path / "a_2", 5)))
    assert [variant.label for variant in found] == ["a_1 (2 runs)"] or found[0].label.endswith("(2 runs)")


def test_a_variants_line_is_the_mean_and_the_range_of_its_runs(tmp_path: Path):
    runs = loaded(write(tmp_path / "s1", 1, (3.0, 2.0, 1.0)), write(tmp_path / "s2", 2, (5.0, 4.0)))
    (variant,) = variants(runs)
    curve = variant.curve(lambda run: (run.steps_S, run.series("loss")))
    assert curve is not None and curve.steps_S.tolist() == [1, 2, 3]
    assert curve.mean_S.tolist() == [4.0, 3.0, 1.0] and curve.low_S.tolist() == [3.0, 2.0, 1.0] and curve.high_S.tolist() == [5.0, 4.0, 1.0]
    assert variant.curve(lambda run: (run.steps_S, run.series("never"))) is None


def test_only_settings_that_differ_are_listed(tmp_path: Path):
    folders = [write(tmp_path / f"a{seed}", seed) for seed in (7, 8)]
    folders += [write(tmp_path / "b", 7, moe__topk=1, optim__lr=0.1 + 0.2), write(tmp_path / "c", 7, moe__extra=[{"loss": "switch"}])]
    found = variants(loaded(*folders))
    assert differing_settings(found) == {
        "moe.topk": ["2", "1", "2"],
        "optim.lr": ["–", "0.3", "–"],
        "moe.extra": ["–", "–", '[{"loss": "switch"}]'],
        "train.seed": ["7, 8", "7", "7"],
    }


def test_seeds_are_listed_only_where_they_are_others(tmp_path: Path):
    folders = [write(tmp_path / f"{name}{seed}", seed, moe__topk=topk) for name, topk, seeds in (("a", 1, (7, 8)), ("b", 2, (8, 7))) for seed in seeds]
    assert list(differing_settings(variants(loaded(*folders)))) == ["moe.topk"]


def test_a_dense_run_beside_others_does_not_list_every_setting_of_experts(tmp_path: Path):
    folders = [write(tmp_path / "dense", router=None, moe=None), write(tmp_path / "a"), write(tmp_path / "b", moe__adaptive__maximum=0.02)]
    differing = differing_settings(variants(loaded(*folders)))
    assert differing == {"moe": ["unset", "set", "set"], "moe.adaptive.maximum": ["–", "0.01", "0.02"]}


# ---------------------------------------------------------------------------------------------------------------- key figures


def test_the_best_value_is_marked_and_what_seeds_do_not_tell_apart(tmp_path: Path):
    losses = {"a": (2.0, 2.2), "b": (2.1, 2.3), "c": (2.5, 2.6)}
    folders = [write(tmp_path / name / f"seed_{seed}", seed, (9.0, loss), optim__x=name) for name, pair in losses.items() for seed, loss in enumerate(pair)]
    runs = loaded(*folders)
    figures = {run.name: key_figures(run) for run in runs}
    by_name = {column.name: column for column in columns(list(figures.values()))}
    marked = cells(by_name["loss"], variants(runs), figures)
    assert [(cell.mark, cell.runs) for cell in marked if cell] == [("best", 2), ("tie", 2), ("", 2)]
    first = marked[0]
    assert first is not None and (first.mean, first.low, first.high) == (pytest.approx(2.1), 2.0, 2.2)
    assert {cell.mark for cell in cells(by_name["coefficient"], variants(runs), figures) if cell} == {""}, "no coefficient is better than another"
    assert {cell.mark for cell in cells(by_name["dropped"], variants(runs), figures) if cell} == {""}, "all are equal"


def test_a_run_that_has_just_begun_is_not_the_best(tmp_path: Path):
    lengths = {"long": (3.0,) * 20, "other": (4.0,) * 19, "begun": (1.0,) * 5}
    runs = loaded(*[write(tmp_path / name, losses=losses, moe__x=name) for name, losses in lengths.items()])
    figures = {run.name: key_figures(run) for run in runs}
    loss = columns(list(figures.values()))[0]
    assert [cell.mark for cell in cells(loss, variants(runs), figures) if cell] == ["best", "", ""]


def test_directions_of_better(tmp_path: Path):
    sharp = {**ROUTER, "max1_over_max2": [3.0, 3.0], "entropy": [0.1, 0.1], "drop_rate": [0.5, 0.5]}
    runs = loaded(write(tmp_path / "flat", moe__x=1), write(tmp_path / "sharp", router=sharp, moe__x=2))
    figures = {run.name: key_figures(run) for run in runs}
    best = {}
    for column in columns(list(figures.values())):
        best[column.name] = [cell.mark for cell in cells(column, variants(runs), figures) if cell]
    assert best["Max1/Max2"] == best["entropy"] == ["", "best"] and best["dropped"] == ["best", ""]
    assert "held-out" not in best and "similarity" not in best, "nobody recorded these"


def test_the_final_loss_is_the_mean_of_the_last_tenth(tmp_path: Path):
    figures = key_figures(load_run(write(tmp_path / "a", losses=tuple(float(step) for step in range(1, 1001)))))
    assert figures.last_loss == pytest.approx(np.mean(np.arange(901, 1001)))


# ---------------------------------------------------------------------------------------------------------------- the page


def test_several_runs_share_a_page(tmp_path: Path):
    folders = [write_run(tmp_path / name / "run", [step_record(step, loss=loss) for step in range(1, 4)]) for name, loss in (("norm", 2.125), ("plain", 2.375))]
    folders[1] = write_run(folders[1], [step_record(step, loss=2.375) for step in range(1, 4)], config=config_with(moe__topk=1))
    folders.append(write_run(tmp_path / "dense", [step_record(1, router=None)], config={"train": {"steps": 1}}))
    report = build_report(folders, tmp_path / "both.html")
    page = Page(report.path)
    for shown in ("3 runs compared", "norm/run", "plain/run", "dense", "2.1250 ★", "2.3750", "What differs", "moe.topk", "At a glance"):
        assert shown in page.text, shown
    stems = [path.stem for path in report.figures]
    assert stems.count("loss") == 1 and {"expert_load_1", "expert_load_2", "at_a_glance", "drop_rate", "coefficient", "max1_over_max2"} <= set(stems)
    assert "expert_load_3" not in stems and len(stems) == len(set(stems))
    assert all(path.parent == tmp_path / "both" for path in report.figures) and len(page.images()) == len(stems)
    assert build_report(folders).path == folders[0] / "comparison.html"


def test_names_and_settings_are_text_in_every_table(tmp_path: Path):
    hostile = "<i>x</i>"
    runs = loaded(write(tmp_path / "a"), write(tmp_path / "b", moe__topk=1))
    figures = {run.name: key_figures(run) for run in runs}
    found = [Variant(hostile, [run]) for run in runs]
    looks = [("#123456", 0), ("#123456", 1)]
    tables = [color_keys(found, looks), comparison_table(found, columns(list(figures.values())), figures, looks)]
    tables += [settings_table(found * times, {hostile: [hostile] * 2 * times}) for times in (1, 5)]
    assert all("<i>" not in table and "&lt;i&gt;" in table for table in tables)


def test_many_runs_are_grouped_and_folded(tmp_path: Path):
    evaluations = {"layers": [1, 3], "changed_experts": [0.1, 0.2], "expert_similarity": [0.9, 0.8]}
    folders = []
    for number in range(12):
        for seed in (1, 2) if number == 0 else (1,):
            folder = write(tmp_path / f"v{number:02d}" / f"s{seed}", seed, (3.0, 2.0 + number), moe__aux_coefficient=0.001 * number)
            record = {"kind": "eval", "step": 2, "losses": {"valid": 2.0 + number}, "router": evaluations}
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            folders.append(folder)
    report = build_report(folders, tmp_path / "many.html")
    page = Page(report.path)
    assert "13 runs compared, 12 variants" in page.text and "v00 (2 seeds)" in page.text and "2.0000 ★" in page.text
    stems = [path.stem for path in report.figures]
    assert {"held_out_1", "expert_similarity", "changed_experts", "expert_load_by_variant"} <= set(stems)
    assert not [stem for stem in stems if re.fullmatch(r"expert_load_\d+", stem)]
    folded = [attributes for tag, attributes in page.tags if tag == "details" and attributes.get("class") == "card"]
    assert len(folded) == 2 * 13, "each run and, within, its configuration"
    styles = {attributes["style"] for tag, attributes in page.tags if attributes.get("class") == "key"}
    assert len(styles) == 12, "every variant has its own colour and dashes"


def test_every_picture_says_its_numbers_in_words(tmp_path: Path):
    folders = [write(tmp_path / "a"), write(tmp_path / "b", losses=(3.0, 2.5), moe__topk=1)]
    page = Page(build_report(folders, tmp_path / "x.html").path)
    described = {attributes["alt"]: None for tag, attributes in page.tags if tag == "img"}
    assert "Loss. At the end lowest in a (2), highest in b (2.5)." in described
    single = Page(build_report([folders[0]], tmp_path / "y.html").path)
    described = {attributes["alt"]: None for tag, attributes in single.tags if tag == "img"}
    assert any(text and text.startswith("What is dropped") or text and "Drop rate: Mean over layers 2.60 %" in text for text in described)
    assert all(len(text or "") > 4 for text in described)


def test_a_lone_seed_is_called_with_its_variant():
    assert run_names(["runs/ablation/adaptive/seed_1"]) == ["adaptive/seed_1"]
