"""The ablation's plan, its scheduler (with a stub in place of training), its arithmetic and its plots."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import ablation  # noqa: E402
import ablation_plots  # noqa: E402
import ablation_results  # noqa: E402
import ablation_runner  # noqa: E402
import train_tokenizer  # noqa: E402
from ablation_plan import CONFIGS, VARIANTS, Choice, Plan, PlannedRun, make_plan  # noqa: E402
from megatron_skywork.config.load import dump_config  # noqa: E402
from megatron_skywork.data.tokenizers import load_tokenizer  # noqa: E402
from megatron_skywork.errors import ConfigError, DataError  # noqa: E402

# What a run leaves, without training: `stub.py FOLDER CONFIG MODE`. A line in `order` tells when it began and ended.
STUB = """\
import json, os, signal, sys, time
folder, config, mode = sys.argv[1:]
os.makedirs(folder + "/checkpoints", exist_ok=True)
def status(word):
    with open(folder + "/run_status.json", "w") as file:
        json.dump({"status": word}, file)
def stop(*_):
    status("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
def note(word):
    with open(os.path.dirname(sys.argv[0]) + "/order", "a") as file:
        file.write(f"{word} {folder} {os.environ['OMP_NUM_THREADS']}\\n")
note("begin")
with open(config) as source, open(folder + "/config.yaml", "w") as target:
    target.write(source.read())
status("running")
if mode == "fail":
    sys.exit("the reason")
while mode == "pair" and open(os.path.dirname(sys.argv[0]) + "/order").read().count("begin") < 2:
    time.sleep(0.01)
if mode == "wait":
    time.sleep(600)
with open(folder + "/metrics.jsonl", "w") as file:
    file.write('{"kind": "step", "step": 3}\\n{"kind": "eval", "step": 3, "losses": {"held_out": 4.5}}\\n')
status("done")
note("end")
"""


def plan_in(folder: Path, **choice) -> Plan:
    return make_plan(Choice(**{"out": folder, "seeds": (1, 2), "steps": 3, **choice}))


def scheduler(folder: Path, modes: dict[str, str], jobs: int = 2) -> ablation_runner.Scheduler:
    """One that runs stubs; `modes` says for a run's name what its stub does."""
    (folder / "stub.py").write_text(STUB)

    def command(run: PlannedRun) -> list[str]:
        config = folder / f"{run.variant}-{run.seed}.yaml"
        config.write_text(dump_config(run.config))
        return [sys.executable, str(folder / "stub.py"), str(run.folder), str(config), modes.get(run.name, "train")]

    return ablation_runner.Scheduler(jobs, lambda slot: ablation_runner.cpu_environment(threads=slot + 1), folder / "logs", command)


@pytest.fixture(autouse=True)
def _quick_and_without_gpu(monkeypatch):
    monkeypatch.setattr(ablation_runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(ablation, "count_gpus", lambda: 0)


def test_variants_with_equal_settings_are_one_run():
    plan = make_plan(Choice())
    assert len(plan.runs) == 18
    assert plan.trained_as == {variant: variant for variant in VARIANTS} | {"fixed_1e-2": "lambda_1"}
    assert {run.variant for run in plan.runs[:6]} == set(VARIANTS) - {"fixed_1e-2"}  # seed by seed
    moe = {run.variant: run.config.moe for run in plan.runs}
    assert [moe[name].gate_norm for name in ("no_norm", "lambda_0.5", "lambda_1", "lambda_2")] == [False, True, True, True]
    assert [moe[name].gate_norm_scale for name in ("lambda_0.5", "lambda_1", "lambda_2", "adaptive")] == [0.5, 1.0, 2.0, 1.0]
    assert {name: moe[name].aux_coefficient for name in moe if moe[name].aux_coefficient != 0.01} == {"fixed_1e-3": 0.001}
    assert [name for name in moe if moe[name].adaptive.enabled] == ["adaptive"]
    # A part of the ablation leaves its runs where the whole looks for them.
    assert [run.config.run_dir for run in make_plan(Choice(only=("fixed_1e-2",), seeds=(7,))).runs] == ["runs/ablation/lambda_1/seed_7"]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_runs_fit_the_text_and_differ_in_their_variant_only(on_gpu):
    plan = make_plan(Choice(on_gpu=on_gpu))
    assert len({run.tokens for run in plan.runs}) == 1
    assert plan.runs[0].tokens < 2 * 3_700_000  # two passes over the text
    assert all(run.config.train.eval_every and run.config.data.valid for run in plan.runs)
    for variant in VARIANTS:
        assert set(yaml.safe_load((ROOT / CONFIGS / f"{variant}.yaml").read_text())) == {"moe"}
    words = plan.runs[0].words
    assert ("configs/ablation/gpu.yaml" in words) == on_gpu
    subprocess.run([sys.executable, "launch/pretrain_moe.py", *words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_wrong_choices_are_refused(capsys):
    with pytest.raises(ConfigError, match="no such variant; there are no_norm, lambda_0.5"):
        make_plan(Choice(only=("lambda_3",)))
    assert ablation.main(["--dry-run", "--set", "moe.gate_nrm=true"]) == 2
    assert "gate_nrm" in capsys.readouterr().err
    for words in (["--seeds", "1,1"], ["--seeds", "1,x"], ["--jobs", "0"], ["--steps", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            ablation.arguments(words)


def test_dry_run_lists_runs_and_time(capsys, tmp_path):
    assert ablation.main(["--dry-run", "--jobs", "2", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("to do") == 18
    assert "fixed_1e-2 has the settings of lambda_1" in text
    assert ablation.main(["--dry-run", "--json", "--seeds", "5", "--steps", "100", "--only", "adaptive", "--out", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(run["variant"], run["seed"], run["steps"], run["tokens"]) for run in plan["runs"]] == [("adaptive", 5, 100, 100 * 8 * 256)]
    assert "optim.warmup_steps=10" in plan["runs"][0]["command"]


def test_time_is_estimated_for_what_is_left():
    plan = make_plan(Choice(out=Path("runs/no_such_folder")))
    one = 900 * ablation.SECONDS_PER_STEP + ablation.SECONDS_PER_RUN
    assert ablation.estimate_seconds(plan, jobs=2) == pytest.approx(9 * one)
    assert ablation.estimate_seconds(plan, jobs=4) == pytest.approx(5 * one)
    assert ablation.default_jobs(gpus=0, runs=1) == 1
    assert ablation.default_jobs(gpus=3, runs=18) == 3


def test_runs_are_trained_so_many_at_a_time_and_finished_ones_are_kept(tmp_path, capsys):
    plan = plan_in(tmp_path, only=("no_norm", "lambda_1"))
    outcome = scheduler(tmp_path, {run.name: "pair" for run in plan.runs}).train(plan.runs)  # the first one goes on when there are two
    assert sorted(run.name for run in outcome.done) == ["lambda_1 seed 1", "lambda_1 seed 2", "no_norm seed 1", "no_norm seed 2"]
    assert not outcome.failed
    assert "[4/4]" in capsys.readouterr().err
    order = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    running, most = 0, 0
    for word, _, _ in order:
        running += 1 if word == "begin" else -1
        most = max(most, running)
    assert most == 2
    assert {threads for _, _, threads in order} == {"1", "2"}  # a slot is free again when its run has ended
    assert not (plan.runs[0].folder / "checkpoints").exists()
    scheduler(tmp_path, {}).train(plan.runs)
    assert len((tmp_path / "order").read_text().splitlines()) == len(order)
    assert "4 of 4 runs are there already" in capsys.readouterr().err


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, capsys):
    plan = plan_in(tmp_path, only=("no_norm", "lambda_1"))
    outcome = scheduler(tmp_path, {"no_norm seed 1": "fail"}, jobs=1).train(plan.runs)
    assert list(outcome.failed) == ["no_norm seed 1"]
    assert str(tmp_path / "logs/no_norm-seed_1.log") in outcome.failed["no_norm seed 1"]
    assert len(outcome.done) == 3
    assert "the reason" in capsys.readouterr().err
    assert ablation_results.markdown({"seeds": [1], "runs": [], "missing": ["no_norm seed 1"], "groups": []}).count("no_norm seed 1") == 1
    assert plan.runs[0].status() == "to go on with"


def test_a_run_with_other_settings_is_moved_not_lost(tmp_path):
    before = plan_in(tmp_path, only=("no_norm",), seeds=(1,))
    scheduler(tmp_path, {}).train(before.runs)
    plan = plan_in(tmp_path, only=("no_norm",), seeds=(1,), steps=4)
    assert plan.runs[0].status() == "other settings"
    scheduler(tmp_path, {}).train(plan.runs)
    assert plan.runs[0].status() == "done"
    assert (tmp_path / "no_norm/seed_1.old-1/run_status.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_ends_the_children_after_they_saved(tmp_path, number):
    plan = plan_in(tmp_path, only=("no_norm", "lambda_1"), seeds=(1,))
    waiting = scheduler(tmp_path, {run.name: "wait" for run in plan.runs})
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            waiting.train(plan.runs)
        except ablation_runner.Interrupted:
            os._exit(7)
        os._exit(1)
    for _ in range(5000):
        if all(ablation_runner.status_of(run.folder) == "running" for run in plan.runs):
            break
        time.sleep(0.02)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [ablation_runner.status_of(run.folder) for run in plan.runs] == ["stopped", "stopped"]
    assert [run.status() for run in plan.runs] == ["to go on with"] * 2


def write_run(run: PlannedRun, loss: float, drops: list[float]) -> None:
    """A finished run of 20 steps; the loss falls to `loss` in the last two."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    (run.folder / "run_status.json").write_text('{"status": "done"}')
    load = [[0.5, 0.5, 0.0, 0.0], [0.25] * 4, [0.25] * 4, [0.25] * 4]
    router = {
        "layers": [1, 2, 3, 4], "load": load, "drop_rate": drops, "coefficient": [0.01] * 4, "aux_loss": [1.0] * 4, "entropy": [1.0] * 4,
        "max1_over_max2": [1.0, 2.0, 3.0, 4.0], "max2_over_max3": [1.0, 1.0, 2.0, 1.0],
    }  # fmt: skip
    records = [{"kind": "header"}]
    for step in range(1, 21):
        value = loss if step > 18 else 9.0
        records.append({"kind": "step", "step": step, "loss": value, "tokens": 100 * step, "seconds": {"step": 0.5}, "router": router})
    records.append({"kind": "step", "step": 20, "loss": loss, "tokens": 2000, "seconds": {"step": 0.5}, "router": router})  # done twice
    records.append({"kind": "eval", "step": 20, "losses": {"held_out": loss + 1}, "router": {"expert_similarity": [0.1, 0.3], "changed_experts": [None, 0.5]}})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def finished(tmp_path: Path) -> Plan:
    """All variants, two seeds: lambda_0.5 is worse by 0.2, lambda_1 better by 0.1 and 0.3, lambda_2 better in one seed and worse in the other."""
    plan = plan_in(tmp_path)
    gains = {"lambda_0.5": (-0.2, -0.2), "lambda_1": (0.1, 0.3), "lambda_2": (0.1, -0.3)}
    for run in plan.runs:
        drop = 0.04 if run.variant == "adaptive" else 0.08
        write_run(run, 4.0 + run.seed - gains.get(run.variant, (0, 0))[run.seed - 1], [drop, drop, drop, 2 * drop])
    return plan


def test_figures_are_means_at_the_end_and_differences_are_taken_per_seed(tmp_path):
    results = ablation_results.collect(finished(tmp_path))
    figures = results["runs"][0]["figures"]
    assert figures["training_loss"] == pytest.approx(5.0)
    assert figures["held_out_loss"] == pytest.approx(6.0)
    assert (figures["max1_over_max2"], figures["max1_over_max2_third"]) == pytest.approx((2.5, 3.0))
    assert figures["drop_rate"] == pytest.approx(0.1)
    assert figures["load_variation"] == pytest.approx(0.25)  # one layer of four has std = mean
    assert (figures["dead_experts"], figures["expert_similarity"], figures["changed_experts"]) == pytest.approx((2.0, 0.2, 0.5))
    gate = {entry["variant"]: entry for entry in results["groups"][0]["variants"]}
    assert gate["no_norm"]["figures"]["training_loss"] == pytest.approx({"mean": 5.5, "std": 0.5**0.5, "seeds": 2})
    assert "differences" not in gate["no_norm"]
    better = gate["lambda_1"]["differences"]["training_loss"]
    assert (better["mean"], better["std"], better["agree"]) == pytest.approx((-0.2, 0.02**0.5, 2))
    assert gate["lambda_0.5"]["differences"]["training_loss"]["agree"] == 2
    mixed = gate["lambda_2"]["differences"]["training_loss"]
    assert (mixed["mean"], mixed["agree"], mixed["seeds"]) == pytest.approx((0.1, 1, 2))
    # The coefficients' reference reads the runs of lambda_1.
    coefficients = {entry["variant"]: entry for entry in results["groups"][1]["variants"]}
    assert coefficients["fixed_1e-2"]["figures"] == gate["lambda_1"]["figures"]
    assert coefficients["adaptive"]["differences"]["drop_rate"]["mean"] == pytest.approx(-0.05)


def test_results_are_tables_and_one_seed_has_no_spread(tmp_path):
    text = ablation_results.markdown(ablation_results.collect(finished(tmp_path)))
    assert "| training loss | 5.5000 ± 0.7071 | 5.7000 ± 0.7071 | 5.3000 ± 0.5657 | 5.6000 ± 0.9899 |" in text
    assert "-0.2000 ± 0.1414 (2 of 2)" in text
    assert "| dropped, % | equal | -5.00 ± 0.00 (2 of 2) |" in text
    alone = ablation_results.markdown(ablation_results.collect(plan_in(tmp_path, seeds=(2,), only=("no_norm", "lambda_1"))))
    assert "| training loss | 6.0000 | 5.7000 |" in alone
    assert "adaptive" not in alone


def test_unfinished_runs_are_left_out_and_named(tmp_path):
    plan = finished(tmp_path)
    (plan.runs[0].folder / "run_status.json").write_text('{"status": "failed"}')
    results = ablation_results.collect(plan)
    assert results["missing"] == ["no_norm seed 1"]
    assert results["groups"][0]["variants"][0]["figures"]["training_loss"]["seeds"] == 1
    assert results["groups"][0]["variants"][2]["differences"]["training_loss"]["seeds"] == 1
    assert "Not finished, and not in the tables: no_norm seed 1." in ablation_results.markdown(results)


def test_plots_are_drawn_from_the_results_file_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ablation_runner.write_json(tmp_path / "results.json", ablation_results.collect(finished(tmp_path)))
    assert ablation.main(["--out", str(tmp_path), "--plots", str(tmp_path / "plots")]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == [f"ablation_{name}.png" for name in ("adaptive", "coefficient", "drop_rate", "loss", "sharpness")]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert ablation.main(["--out", str(tmp_path / "nowhere"), "--plots", str(tmp_path)]) == 3
    assert "run it first" in capsys.readouterr().err


def test_the_report_s_curves_say_where_they_are_from():
    curves = json.loads(ablation_plots.REPORT_CURVES.read_text(encoding="utf-8"))
    assert "2406.06563" in curves["source"]
    assert curves["fig3_max1_over_max2/no_norm"]["value"][-1] < 1.01 < curves["fig3_max1_over_max2/lambda1"]["value"][-1]


def test_a_tokenizer_of_its_own(tmp_path):
    texts = [f"def function_{i}(argument):\n    return argument + {i * 37}\n" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for out in ("one", "two"):
        assert train_tokenizer.main(["--input", str(tmp_path / "a.jsonl"), "--vocab-size", "300", "--out", str(tmp_path / out)]) == 0
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 0)
    strange = "ὕδωρ \x00 <|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert len(tokenizer.encode(texts[0])) < len(texts[0]) / 2


def test_a_text_too_short_for_its_vocabulary_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n')
    assert train_tokenizer.main(["--input", str(tmp_path / "a.jsonl"), "--vocab-size", "2048", "--out", str(tmp_path)]) == 3
    assert "give more text" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(DataError, match="b.jsonl, line 2"):
        list(train_tokenizer.texts_of([tmp_path / "b.jsonl"], "text"))
