"""What the dry run foresees: sums against the parts they are made of, formulas against their terms, sentences, and a cluster that does not fit the run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.describe import describe, plan_text
from megatron_skywork.plan.describe_estimate import memory_lines, memory_record, part_of, speed_lines, speed_record
from megatron_skywork.plan.flops import train_flops_per_token
from megatron_skywork.plan.hardware import load_cluster, one_node
from megatron_skywork.plan.memory import RESERVE_BYTES, stage_memory

ROOT = Path(__file__).resolve().parents[2]
MOE_146B, A800 = str(ROOT / "configs" / "skywork_moe_146b.yaml"), str(ROOT / "configs" / "clusters" / "a800_192x8.yaml")


def skywork(*overrides: str, world_size: int = 1536) -> Config:
    return load_config([MOE_146B], list(overrides), world_size)


def test_a_part_of_a_cluster():
    whole = load_cluster(A800)
    assert part_of(whole, 1536) == whole
    assert (part_of(whole, 16).nodes, part_of(whole, 16).gpus_per_node) == (2, 8)
    few = part_of(whole, 4)
    assert (few.nodes, few.gpus_per_node, few.world_size, few.inside) == (1, 4, 4, whole.inside)
    with pytest.raises(ConfigError, match="has 1,536 GPUs, and the run has 3,072 ranks; name a larger cluster, or one of 384 nodes"):
        part_of(whole, 3072)
    with pytest.raises(ConfigError, match="12 ranks do not fill nodes of 8; use 16 or 8"):
        part_of(whole, 12)


def test_memory_is_that_of_every_stage_and_the_largest_decides():
    stages, memory = stage_memory(skywork(), 1536), memory_record(skywork(), 1536)
    assert [stage["total"] for stage in memory["stages"]] == [stage.total for stage in stages]
    for stage in memory["stages"]:
        assert stage["total"] == sum(size for name, size in stage.items() if name not in ("stage", "total"))
    assert memory["largest_bytes"] == max(stage.total for stage in stages) == memory["stages"][memory["largest_stage"] - 1]["total"]
    assert memory["worst_case_bytes"] >= memory["largest_bytes"] and "gpu" not in memory
    assert "--cluster FILE" in memory_lines(memory)[-1] and len(memory_lines(memory)) == 13


@pytest.mark.parametrize(("spare", "said"), [
    (0, "it fits, 0.0 MiB are left"), (2**30, "it fits, 1.0 GiB are left"), (-(2**30), "it does NOT fit, 1.0 GiB are missing"),
])  # fmt: skip
def test_whether_it_fits(spare: int, said: str):
    cluster, needed = load_cluster(A800), memory_record(skywork(), 1536)["largest_bytes"]
    cluster = replace(cluster, gpu=replace(cluster.gpu, memory_bytes=needed + RESERVE_BYTES + spare))
    memory = memory_record(skywork(), 1536, cluster)
    assert memory["gpu"] == {"name": "A800-80G", "memory_bytes": needed + RESERVE_BYTES + spare, "room_bytes": needed + spare, "fits": spare >= 0}
    assert said in "\n".join(memory_lines(memory))


def test_a_dense_model_has_no_worst_case():
    dense = load_config([str(ROOT / "configs" / "skywork_13b.yaml")], [], 512)
    memory = memory_record(dense, 512)
    assert memory["worst_case_bytes"] is None and "balanced router" not in "\n".join(memory_lines(memory))


def test_speed_is_what_its_formulas_say():
    cluster = load_cluster(A800)
    speed = speed_record(skywork(), cluster)
    assert speed["tokens_per_second"] == pytest.approx(31_457_280 / speed["step_seconds"]) == pytest.approx(1536 * speed["tokens_per_gpu_second"])
    assert speed["mfu"] == pytest.approx(speed["tokens_per_gpu_second"] * train_flops_per_token(skywork()) / 312e12)
    assert sum(speed["parts"].values()) == pytest.approx(speed["step_seconds"]) and 0 < speed["bubble"] < 1
    assert speed["limit"] == "matrix products" and max(speed["parts"], key=speed["parts"].get) == "products"
    text = "\n".join(speed_lines(speed))
    for said in ("a800_192x8", "of 312 TFLOP/s (A800-80G, dense bf16)", "FLOPs/token = 3 *", "Skywork-MoE report's convention", "bubble ",
                 f"of stage {speed['stage']}", "what limits it: matrix products"):  # fmt: skip
        assert said in text, said


def test_one_stage_waits_for_nobody():
    config = load_config([str(ROOT / "configs" / "tiny.yaml")], ["parallel.ep=2"], 2)
    cluster = one_node("NVIDIA H100 80GB HBM3", 2)
    assert cluster is not None and cluster.world_size == 2 and one_node("a toaster", 2) is None
    text = "\n".join(speed_lines(speed_record(config, cluster)))
    assert "bubble" not in text and "which works most" not in text and "what limits it: " in text


def test_the_dry_run_has_both():
    plan = json.loads(json.dumps(describe(skywork(world_size=384), 384, load_cluster(A800))))
    assert plan["speed"]["step_seconds"] > 0 and plan["memory"]["gpu"]["fits"] in (True, False)
    without = describe(skywork(), 1536)
    assert without["speed"] is None and without["memory"]["stages"]
    text = plan_text(skywork(), 1536, load_cluster(A800))
    assert "\n\nMemory of a rank\n" in text and "\n\nSpeed\n" in text and "\n\nSpeed\n" not in plan_text(skywork(), 1536)


# ---------------------------------------------------------------------------------------------------------------- the command line


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "pretrain_moe.py"), "--config", MOE_146B, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_cluster_says_how_many_ranks_there_are():
    result = dry_run("--dry-run", "--json", "--cluster", A800)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["world_size"] == 1536 and plan["speed"]["cluster"] == "a800_192x8"
    assert json.loads(dry_run("--dry-run", "--json", "--cluster", A800, "--world-size", "768").stdout)["world_size"] == 768


@pytest.mark.parametrize(("arguments", "says"), [
    (["--cluster", A800], "--cluster goes with --dry-run"), (["--dry-run", "--cluster", "nowhere.yaml"], "nowhere.yaml"),
    (["--dry-run", "--cluster", "dgx_h200:2", "--world-size", "1536"], "has 16 GPUs, and the run has 1,536 ranks"),
    (["--dry-run", "--cluster", "dgx_h200:2"], "parallel."),
])  # fmt: skip
def test_a_cluster_that_cannot_be_is_refused(arguments: list[str], says: str):
    result = dry_run(*arguments)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr, result.stderr
