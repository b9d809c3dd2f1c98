"""Reading a run for the report: arrays with NaN where nothing was recorded, old runs without today's keys, long runs in little memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_samples import ROUTER, step_record, write_run

from megatron_skywork.errors import DataError
from megatron_skywork.report.averages import binned, nan_mean, running_median, smoothed, window_of
from megatron_skywork.report.load import load_run
from megatron_skywork.report.router_records import PER_LAYER, RouterReader


def test_a_run_is_read_as_arrays(tmp_path: Path):
    records = [step_record(1), {"kind": "eval", "step": 1, "losses": {"valid": 3.0}}, step_record(2, loss=None, nonfinite=["loss"]), step_record(3, mfu=None)]
    run = load_run(write_run(tmp_path / "run", records, tail='{"kind":"step","st'))
    assert run.steps_S.tolist() == [1, 2, 3] and run.nonfinite_steps == [2]
    assert np.array_equal(run.series("loss"), [2.99, math.nan, 2.97], equal_nan=True)
    assert run.series("seconds.data").tolist() == [0.01] * 3 and np.isnan(run.series("never recorded")).all()
    assert run.evaluations["valid"][1].tolist() == [3.0] and run.setting("moe.adaptive.maximum") == 0.01 and run.setting("moe.no.such") is None
    assert run.router is not None and run.router.layers == [1, 3]
    assert run.router.per_layer["load_max_over_mean"][0].tolist() == pytest.approx([1.0, 1.88])
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


def test_what_follows_from_the_load_is_computed_for_old_runs_and_read_from_new_ones(tmp_path: Path):
    old = load_run(write_run(tmp_path / "old", [step_record(1)])).router
    assert old is not None
    computed = {name: values[0].tolist() for name, values in old.per_layer.items()}
    relative = [4 * share for share in ROUTER["load"][1]]
    assert computed["load_variation"] == pytest.approx([0.0, float(np.std(relative))]) and computed["dead_experts"] == [0, 0]
    assert [computed[name][1] for name in ("load_p10", "load_p50", "load_p90")] == pytest.approx(np.percentile(relative, (10, 50, 90)))
    assert np.isnan(old.per_layer["max2_over_max3"]).all() and np.isnan(old.per_layer["z_loss"]).all() and old.evaluations is None and not old.extra_aux_losses
    more = {name: [7.0, 8.0] for name in PER_LAYER if name not in ROUTER} | {"dead_expert_ids": [[], [3]], "extra_aux_losses": {"switch_sequence": [1.5, None]}}
    new = load_run(write_run(tmp_path / "new", [step_record(1, router={**ROUTER, **more}), step_record(2)])).router
    assert new is not None
    assert all(values[0].tolist() == [7.0, 8.0] for name, values in new.per_layer.items() if name not in ROUTER)
    assert np.array_equal(new.extra_aux_losses["switch_sequence"], [[1.5, math.nan], [math.nan, math.nan]], equal_nan=True)


def test_what_was_recorded_counts_where_some_keys_are_missing(tmp_path: Path):
    router = load_run(write_run(tmp_path, [step_record(1, router={**ROUTER, "load_p10": [7.0, 8.0]})])).router
    assert router is not None and router.per_layer["load_p10"].tolist() == [[7.0, 8.0]] and router.per_layer["load_max_over_mean"][0, 1] == pytest.approx(1.88)


def test_lists_of_another_length_count_as_missing(tmp_path: Path):
    router = load_run(write_run(tmp_path, [step_record(1, router={**ROUTER, "drop_rate": [0.5], "z_loss": "none"}), step_record(2)])).router
    assert router is not None and np.isnan(router.per_layer["drop_rate"][0]).all() and router.per_layer["drop_rate"][1].tolist() == pytest.approx([0.01, 0.042])


def test_what_evaluations_say_of_experts(tmp_path: Path):
    def evaluation(step: int, changed: list[Any], similar: list[Any], layers: tuple[int, ...] = (1, 3)) -> dict[str, Any]:
        router = {"layers": list(layers), "changed_experts": changed, "expert_similarity": similar}
        return {"kind": "eval", "step": step, "losses": {"valid": 1.0}, "router": router}

    records = [evaluation(0, [None, None], [1.0, 0.9]), step_record(1), evaluation(1, [0.5, 0.25], [0.8, None]), evaluation(2, [0.1], [0.1], layers=(2,))]
    router = load_run(write_run(tmp_path, records)).router
    assert router is not None and router.evaluations is not None
    assert router.evaluations.steps_V.tolist() == [0, 1], "one before the first step counts, one of another model does not"
    assert np.array_equal(router.evaluations.changed_VL, [[math.nan, math.nan], [0.5, 0.25]], equal_nan=True)
    assert router.evaluations.similarity_VL == pytest.approx(np.array([[1.0, 0.9], [0.8, math.nan]]), nan_ok=True)


def test_loads_of_a_long_run_are_kept_as_means_of_stretches():
    reader = RouterReader()
    for step in range(1, 2001):
        share = step / 4000  # from 0 to one half
        reader.take_step(step, {"layers": [1], "load": [[share, 1 - share]]})
    router = reader.router()
    assert router is not None
    history = router.history
    widths = np.diff(history.edges)
    assert 100 < len(widths) <= 256 and history.edges[0] == 0.5 and history.edges[-1] == 2000.5 and (widths > 0).all()
    assert np.average(history.load_CLE[:, 0, 0], weights=widths) == pytest.approx(2001 / 8000)
    assert (np.diff(history.load_CLE[:, 0, 0]) > 0).all() and history.load_CLE.sum(axis=2) == pytest.approx(1.0)
    assert router.load_LE[0, 0] == pytest.approx((1801 + 2000) / 2 / 4000, abs=0.005), "the last tenth, to within a stretch"
    assert history.dead_CLE[0, 0, 0] == 1.0 and history.dead_CLE[-1, 0, 0] == 0.0


def test_loads_recorded_again_replace_what_came_before():
    reader = RouterReader()
    for step, share in ((1, 0.5), (2, 0.9), (3, 0.9), (2, 0.6)):
        reader.take_step(step, {"layers": [1], "load": [[share, 1 - share]]})
    router = reader.router()
    assert router is not None and router.history.load_CLE[:, 0, 0].tolist() == [0.5, 0.6]


def test_an_expert_is_dead_since_it_last_had_two_percent():
    reader = RouterReader()
    for step, shares in ((10, [0.5, 0.5]), (20, [0.02, 0.98]), (30, [0.001, 0.999]), (40, [0.009, 0.991]), (50, [0.001, 0.999])):
        reader.take_step(step, {"layers": [1], "load": [shares]})
    router = reader.router()
    assert router is not None and np.array_equal(router.dead_since_LE, [[30, math.nan]], equal_nan=True), "0.009 is 1.8 % of the even share"


def test_smoothing_keeps_the_level_and_the_median_ignores_spikes():
    values = np.full(200, 5.0)
    values[[0, 50]] = math.nan
    smooth = smoothed(values)
    assert smooth is not None and smooth == pytest.approx(np.full(200, 5.0))
    values[100] = 1000.0
    median = running_median(values)
    assert median is not None and median == pytest.approx(np.full(200, 5.0))
    assert smoothed(np.ones(59)) is None


def test_a_very_long_median_is_thinned_and_keeps_its_level():
    values = np.linspace(0.0, 1.0, 50_000)
    values[::1000] = 100.0
    median = running_median(values)
    assert median is not None and len(median) == len(values) and median[2000:-2000] == pytest.approx(np.linspace(0.0, 1.0, 50_000)[2000:-2000], abs=0.01)


def test_a_heatmap_has_few_columns_that_cover_all_steps():
    steps = np.arange(10, 10_010, 10)
    edges, means = binned(steps, np.stack([steps, np.full(1000, math.nan)], axis=1).astype(float))
    assert len(edges) == len(means) + 1 <= 121 and edges[0] == 5 and edges[-1] == 10_005
    assert np.all(np.diff(edges) > 0) and np.average(means[:, 0], weights=np.diff(edges)) == pytest.approx(steps.mean()) and np.isnan(means[:, 1]).all()


def test_an_evaluation_recorded_twice_counts_as_first_recorded(tmp_path: Path):
    """The second one's probe was compared with the first one's, a moment before."""
    evaluations = [{"kind": "eval", "step": 2, "losses": {}, "router": {"layers": [1, 3], "changed_experts": changed, "expert_similarity": [0.5, 0.5]}}
                   for changed in ([0.25, 0.5], [0.0, 0.0])]  # fmt: skip
    run = load_run(write_run(tmp_path, [step_record(1), step_record(2), *evaluations]))
    assert run.router is not None and run.router.evaluations is not None
    assert run.router.evaluations.changed_VL.tolist() == [[0.25, 0.5]]
