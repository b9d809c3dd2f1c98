"""docs/measurements/published_runs.yaml and the table that benchmarks/planning.py makes of it, with an estimate that is made up."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import planning  # noqa: E402

from megatron_skywork.config.load import check_config  # noqa: E402
from megatron_skywork.errors import ConfigError  # noqa: E402
from megatron_skywork.plan.hardware import Sustained  # noqa: E402
from megatron_skywork.plan.parameters import count_parameters  # noqa: E402
from megatron_skywork.plan.stages import batch  # noqa: E402

RUNS = planning.load_runs()
BY_ID = {run.id: run for run in RUNS}


# ---------------------------------------------------------------------------------------------------------------------------- the data


def test_names_are_unique_and_every_group_is_there():
    assert len(BY_ID) == len(RUNS) == 177
    assert {run.group for run in RUNS} == {
        "skywork", "korthikanti", "narayanan", "hagemann", "zero-bubble", "bloom", "llama3", "nemo", "folding", "folding-context", "upcycling", "zoo",
    }  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.id)
def test_a_row_is_valid_for_its_world_size_and_has_a_source(run):
    check_config(run.config, run.gpus)
    title, _, place = run.source.partition("; ")
    assert ("arXiv" in title or "/" in title) and place
    assert stated(run) and all(run.differs) and all(run.assumed.values())


def stated(run) -> dict[str, float]:
    return planning.stated_speeds(run)


@pytest.mark.parametrize("run", [run for run in RUNS if len(stated(run)) > 1], ids=lambda run: run.id)
def test_figures_of_a_row_agree(run):
    """Step time, TFLOP/s and MFU of one row are the same speed, which also checks shape, batch, vocabulary and convention."""
    first, *others = stated(run).values()
    assert others == pytest.approx([first] * len(others), rel=0.02)


def test_a_setting_that_is_assumed_exists():
    for run in RUNS:
        for key in run.assumed:
            section, _, name = key.partition(".")
            if section not in ("published", "cluster", "gradient_bytes"):
                assert name in type(getattr(run.config, section)).model_fields, (run.id, key)


@pytest.mark.parametrize(("name", "billions"), [
    # the sizes that the sources print
    ("narayanan-1.7b", 1.7), ("narayanan-3.6b", 3.6), ("narayanan-7.5b", 7.5), ("narayanan-18b", 18.4), ("narayanan-39b", 39.1), ("narayanan-76b", 76.1),
    ("narayanan-145b", 145.6), ("narayanan-310b", 310.1), ("narayanan-530b", 529.6), ("narayanan-1t", 1008.0), ("skywork-moe-146b", 146.4),
    ("zero-bubble-1.5b-1f1b-m24", 1.5), ("zero-bubble-6.2b-1f1b-m24", 6.2), ("bloom-176b-h112-tp4-pp12-mb2", 176.2), ("nemo-grok1-314b-512", 314.0),
    ("nemo-nemotron4-340b-256", 340.0), ("llama3-405b-8192-8k", 405.0), ("nemo-llama3-70b-64", 70.6), ("zoo-qwen3-235b-256", 235.1),
    ("folding-qwen2-57b-64", 57.4), ("folding-mixtral-8x22b-128", 140.6), ("mcore-mixtral-8x7b-64", 46.7), ("hagemann-65b-2k-tp2-pp4-mb1", 66.9),
])  # fmt: skip
def test_models_have_their_published_sizes(name, billions):
    """Within 4 %: sources round, leave out positions and biases, or count the embedding once."""
    assert count_parameters(BY_ID[name].config).total / 1e9 == pytest.approx(billions, rel=0.04)


@pytest.mark.parametrize(("name", "micro_batches"), [
    # gradient accumulation as the sources print it, or the batch of one replica
    ("nemo-llama3-8b-8", 32), ("nemo-llama3-70b-64", 64), ("nemo-llama3-405b-512", 64), ("nemo-nemotron4-15b-64", 4), ("nemo-nemotron4-340b-256", 16),
    ("nemo-gpt3-175b-128", 64), ("nemo-nemotron4-340b-gb200-128-b32", 8), ("nemo-llama3-405b-gb200-128", 32), ("nemo-grok1-314b-gb200-128", 8),
    ("zero-bubble-28.3b-zb1p-m256", 256), ("llama3-405b-8192-8k", 32), ("llama3-405b-16384-128k", 16), ("zoo-qwen3-235b-256", 128),
    ("bridge-qwen3-235b-gb200-256", 256), ("skywork-moe-146b", 120), ("korthikanti-530b-selective", 280),
])  # fmt: skip
def test_batches_are_cut_as_published(name, micro_batches):
    run = BY_ID[name]
    assert batch(run.config, run.gpus).micro_batches == micro_batches


# --------------------------------------------------------------------------------------------------------------------------- speeds


def test_speed_from_what_is_given():
    # 64 sequences of 2048 tokens in 13.75 s on 64 GPUs
    assert planning.speed(BY_ID["korthikanti-175b-selective"]) == pytest.approx(64 * 2048 / 13.75 / 64)
    # 14.5 samples of 1024 tokens would be 14,848; ZB-1p at 24 micro-batches has 12.9
    assert planning.speed(BY_ID["zero-bubble-1.5b-zb1p-m24"]) == pytest.approx(12.9 * 1024)
    # Narayanan et al., equation 3: 96 B s l h^2 (1 + s / 6h + V / 16lh) for B sequences of s tokens
    layers, hidden, length, vocabulary = 96, 16384, 2048, 51200
    per_token = 96 * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden))
    assert planning.speed(BY_ID["narayanan-310b"]) == pytest.approx(155e12 / per_token, rel=2e-4)  # the FFN's width is rounded to a multiple of tp
    # where several are given, the first one is taken: 690 tokens/s, whatever MFU that is
    assert planning.speed(BY_ID["skywork-moe-146b"]) == 690


def test_conventions_by_hand():
    """Llama 3 8B at 8192 tokens as NVIDIA's notes work it out: 12 L h^2 (1 + 8/32 + s/h) + 18 L f h + 6 V h = 57.91 GFLOP a token."""
    config = BY_ID["nemo-llama3-8b-8"].config
    by_hand = 20_937_965_568 + 33_822_867_456 + 3_152_019_456
    assert planning.CONVENTIONS["matmul, full attention"](config) == pytest.approx(by_hand, rel=1e-12)
    assert planning.CONVENTIONS["matmul, causal attention"](config) == by_hand - 6 * 32 * 4096 * 8192
    assert planning.CONVENTIONS["all parameters, full attention"](config) == by_hand + 6 * (128256 * 4096 + 65 * 4096)  # the look-up and the norms
    layers = by_hand - 3_152_019_456
    assert planning.CONVENTIONS["matmul, full attention, recomputed"](config) == pytest.approx(layers * 4 / 3 + 3_152_019_456, rel=1e-12)


def test_the_38_percent_of_skywork_moe():
    """No common count gives it; the nearest is the one in which every slot of capacity 1.1 counts."""
    lines = list(planning.formula_table([BY_ID["skywork-moe-146b"]]))
    assert lines[-1].split(" | ")[2:] == ["32.3 %", "34.9 %", "35.3 %", "37.7 %", "46.4 %", "all parameters and capacity, full attention |"]


def test_memory_is_taken_as_printed():
    assert planning.memory_bytes(BY_ID["skywork-13b-dp256-tp1-pp2"]) == pytest.approx(77.1e9)
    assert planning.memory_bytes(BY_ID["nemo-llama3-8b-8"]) == 70833405952
    assert planning.memory_bytes(BY_ID["narayanan-1t"]) is None


# ---------------------------------------------------------------------------------------------------------------------------- the table


def made_up(speed: float, *gigabytes: float):
    """An estimate that says the same of everything."""

    def estimate(config, cluster, *, schedule=None):
        estimate.asked.append((cluster.name, schedule))
        parts = {"products": 0.8, "tp": 0.1, "waiting": 0.1, "optimizer": 0.0, "gradients and parameters": 0.0}
        memory = [SimpleNamespace(total=size * 1e9, gradients=size * 1e8) for size in gigabytes]
        return SimpleNamespace(tokens_per_gpu_second=speed, step_seconds=1.0, parts=parts, memory=memory)

    estimate.asked = []
    return estimate


def compared(ids, estimate):
    return [planning.compare(BY_ID[name], estimate, lambda run: SimpleNamespace(name=run.cluster, gpu=SimpleNamespace(memory_bytes=79e9))) for name in ids]


def test_a_row_is_compared():
    estimate = made_up(2000.0, 70.0, 80.0)
    row, other = compared(["skywork-13b-dp256-tp1-pp2", "zero-bubble-6.2b-zb1p-m24"], estimate)
    assert estimate.asked == [("hgx_a800:64", None), ("dgx_a100:1", "zero-bubble")]
    assert row["speed_error"] == pytest.approx(2000 / 1873 - 1) and row["memory_error"] == pytest.approx(80.0 / 77.1 - 1)
    assert row["memory_bytes"] == 80e9  # of the fullest stage
    assert other["speed_error"] == pytest.approx(2000 / (3.88 * 1024) - 1)
    json.dumps([row, other])


def test_gradients_that_are_not_fp32_are_allowed_for():
    """A tenth of the made-up memory is gradients: half of it goes with bf16, as much again and half of it comes with bf16 beside fp32."""
    rows = compared(["skywork-13b-dp256-tp1-pp2", "nemo-llama3-8b-8", "bloom-176b-h112-tp4-pp12-mb2"], made_up(2000.0, 70.0, 80.0))
    assert [row["memory_bytes"] for row in rows] == pytest.approx([80e9, 76e9, 84e9])
    assert [row["fits"] for row in rows] == [False, True, False]
    assert ["memory_error" in row for row in rows] == [True, True, False]  # BLOOM's run kept more than its gradients
    assert [group["too_big"] for group in planning.summary(rows)] == [1, 0, 1, 2, 2]


def test_errors_by_group():
    rows = compared(["skywork-13b-dp256-tp1-pp2", "skywork-moe-146b", "korthikanti-1t-selective"], made_up(1000.0, 60.0))
    groups = {group["group"]: group for group in planning.summary(rows)}
    errors = [1000 / 1873 - 1, 1000 / 690 - 1, 1000 / (512 * 2048 / 71.49 / 512) - 1]
    assert groups["skywork"]["speed_mean_absolute"] == pytest.approx((abs(errors[0]) + errors[1]) / 2)
    assert groups["skywork"]["speed_mean"] == pytest.approx((errors[0] + errors[1]) / 2) and groups["skywork"]["speed_worst"] == pytest.approx(errors[0])
    assert groups["skywork"]["memory_rows"] == 1 and groups["korthikanti"]["memory_rows"] == 0
    assert groups["all"]["speed_rows"] == 3 and groups["all, shape, layout and batch published"]["rows"] == 2  # Skywork-MoE's split is not published


def test_a_prediction_that_fails_is_a_line_of_the_table():
    def refuses(config, cluster, *, schedule=None):
        raise ConfigError("no such GPU")

    rows = compared(["korthikanti-1t-selective"], refuses) + compared(["korthikanti-22b-selective"], made_up(7000.0, 1.0))
    lines = list(planning.table(rows))
    assert lines[2] == "| korthikanti-1t-selective | 512 | step time | 29 | no such GPU |  |  |  |  |  |  |  |"
    assert lines[3].startswith("| korthikanti-22b-selective | 8 | step time | 931 | 7000 | +652.0 % |")
    assert len({line.count("|") for line in lines[:4]}) == 1 and lines[4] == ""


def test_rows_are_chosen_by_id_and_group():
    assert [run.id for run in planning.chosen(RUNS, ["llama3", "narayanan-1t"])] == [
        "narayanan-1t", "llama3-405b-8192-8k", "llama3-405b-16384-8k", "llama3-405b-16384-128k"]  # fmt: skip
    with pytest.raises(ConfigError, match="llama4: there is no such row; groups are skywork"):
        planning.chosen(RUNS, ["llama4"])


def test_a_row_is_predicted_by_the_others_and_never_by_itself():
    """A machine whose kernels keep 0.8 of their rate in all rows but one: that one is predicted with 0.8, the others with what theirs say."""
    runs = [BY_ID[name] for name in ("skywork-13b-dp256-tp1-pp2", "skywork-13b-dp256-tp2-pp1", "skywork-13b-dp128-tp4-pp1", "skywork-moe-146b")]
    asked = []

    def estimate(config, cluster, *, schedule=None):
        asked.append(cluster.sustained)
        parts = {"products": 10.0, "tp": 1.0 + config.parallel.tp, "waiting": 0.0, "optimizer": 0.0, "gradients and parameters": 0.0}
        step = 10.0 / cluster.sustained.kernels + parts["tp"] / cluster.sustained.collectives
        stage = SimpleNamespace(total=1e9, gradients=0.0)
        return SimpleNamespace(tokens_per_gpu_second=1.0 / step, step_seconds=step, parts=parts, memory=[stage])

    @dataclass(frozen=True)
    class Machine:
        gpu: SimpleNamespace
        sustained: Sustained = Sustained()

    rows = [planning.compare(run, estimate, lambda run: Machine(SimpleNamespace(memory_bytes=79e9))) for run in runs]
    for run, row in zip(runs, rows, strict=True):
        true = 10.0 / 0.8 + (1.0 + run.config.parallel.tp) / 0.5
        row["published_tokens_per_gpu_second"] = 1.0 / true
        row["sample"]["measured"] = true if run.id != "skywork-moe-146b" else 99.0
    planning.compare_by_others(runs, rows, estimate, lambda run: Machine(SimpleNamespace(memory_bytes=79e9)))
    assert rows[3]["sustained"] == {"kernels": pytest.approx(0.8), "collectives": pytest.approx(0.5)}
    assert rows[3]["sustained_error"] == pytest.approx(0.0, abs=1e-9)
