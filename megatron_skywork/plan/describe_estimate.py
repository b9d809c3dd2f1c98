"""What `--dry-run` and the report foresee of a run: memory of a rank of every stage, and its speed on a cluster; as dictionaries, and as text made from them.

Memory needs no cluster, only to say whether it fits; speed does.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.wording import gibibytes, percent
from megatron_skywork.plan.estimate import PART_NAMES, Estimate, estimate
from megatron_skywork.plan.flops import formula_text
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.memory import StageMemory, room_bytes, stage_memory
from megatron_skywork.plan.stages import batch


def part_of(cluster: Cluster, world_size: int) -> Cluster:
    """As many of a cluster's GPUs, whole nodes or a part of one.

    Raises:
        ConfigError: it has fewer, or the number is neither.
    """
    per_node, nodes = cluster.gpus_per_node, -(-world_size // cluster.gpus_per_node)
    if world_size > cluster.world_size:
        raise ConfigError(
            f"cluster {cluster.name}: has {cluster.world_size:,} GPUs, and the run has {world_size:,} ranks; name a larger cluster, or one of {nodes} nodes")
    if world_size < per_node:
        return replace(cluster, nodes=1, gpus_per_node=world_size)
    if world_size % per_node:
        fitting = f"{nodes * per_node:,} or {(nodes - 1) * per_node:,}"
        raise ConfigError(f"cluster {cluster.name}: {world_size:,} ranks do not fill nodes of {per_node}; use {fitting}")
    return replace(cluster, nodes=nodes)


def memory_record(config: Config, world_size: int, cluster: Cluster | None = None) -> dict[str, Any]:
    """Bytes of a rank of every stage at the peak of a step, on a GPU; with a cluster also what its GPUs have."""
    worst = stage_memory(config, world_size, worst_case=True) if config.moe is not None else None
    stages = stage_memory(config, world_size)
    totals = [stage.total for stage in stages]
    record: dict[str, Any] = {
        "stages": [{"stage": number, **asdict(stage), "total": stage.total} for number, stage in enumerate(stages, start=1)],
        "largest_stage": totals.index(max(totals)) + 1,
        "largest_bytes": max(totals),
        "worst_case_bytes": max(stage.total for stage in worst) if worst else None,
    }
    if cluster is not None:
        room = room_bytes(cluster)
        record["gpu"] = {"name": cluster.gpu.name, "memory_bytes": cluster.gpu.memory_bytes, "room_bytes": room, "fits": max(totals) <= room}
    return record


def speed_record(config: Config, cluster: Cluster) -> dict[str, Any]:
    """What a step takes on all GPUs of a cluster."""
    foreseen, tokens = estimate(config, cluster), batch(config, cluster.world_size).tokens_per_step
    return {
        "cluster": cluster.name, "gpu": cluster.gpu.name, "step_seconds": foreseen.step_seconds, "tokens_per_gpu_second": foreseen.tokens_per_gpu_second,
        "tokens_per_second": tokens / foreseen.step_seconds, "mfu": foreseen.mfu, "report_mfu": foreseen.report_mfu, "formula": formula_text(config),
        "peak_flops": cluster.gpu.peak_flops[config.train.precision], "precision": config.train.precision, "bubble": foreseen.bubble,
        "rates": cluster.rates.source, "sustained": asdict(cluster.sustained),
        "stage": foreseen.stage + 1, "parts": foreseen.parts, "limit": _limit(foreseen),
    }  # fmt: skip


def _limit(foreseen: Estimate) -> str:
    name = max(foreseen.parts, key=lambda part: foreseen.parts[part])
    return PART_NAMES.get(name, name)


# ------------------------------------------------------------------------------------------------------------------------------ in words


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """The block `Memory of a rank`."""
    lines = [_stage_line(StageMemory(**{name: stage[name] for name in StageMemory.__dataclass_fields__}), stage["stage"]) for stage in memory["stages"]]
    where = f"stage {memory['largest_stage']} needs most: " if len(lines) > 1 else "in all "
    most = f"{where}{gibibytes(memory['largest_bytes'])}"
    if memory["worst_case_bytes"] is not None and memory["worst_case_bytes"] > memory["largest_bytes"]:
        most += f" with a balanced router, at most {gibibytes(memory['worst_case_bytes'])} whatever it does"
    if "gpu" not in memory:
        return [*lines, f"{most}; whether that fits and how fast it runs: --cluster FILE (configs/clusters, or python tools/calibrate.py --write FILE)"]
    gpu, room = memory["gpu"], memory["gpu"]["room_bytes"] - memory["largest_bytes"]
    fits = f"it fits, {gibibytes(room)} are left" if gpu["fits"] else f"it does NOT fit, {gibibytes(-room)} are missing"
    reserve = gibibytes(gpu["memory_bytes"] - gpu["room_bytes"])
    return [*lines, most, f"{gpu['name']} has {gibibytes(gpu['memory_bytes'])}, less {reserve} for the CUDA context and NCCL: {fits}"]


def _stage_line(stage: StageMemory, number: int) -> str:
    other = stage.loss + stage.temporary + stage.communication + stage.fragmentation
    parts = {"weights": stage.weights, "gradients": stage.gradients, "optimizer": stage.masters + stage.moments, "activations": stage.activations}
    parts["other"] = other
    return f"stage {number:>3}: {gibibytes(stage.total):>9} = " + " + ".join(f"{name} {gibibytes(size)}" for name, size in parts.items())


def speed_lines(speed: dict[str, Any]) -> list[str]:
    """The block `Speed`."""
    shares = sorted(((seconds / speed["step_seconds"], name) for name, seconds in speed["parts"].items() if seconds > 0), reverse=True)
    where = f"of stage {speed['stage']}, which works most: " if speed["bubble"] else ""
    waits = [f"bubble {percent(speed['bubble'])}: the share of the pipeline's time in which a stage waits for others, mean over stages"]
    return [
        f"step of {speed['step_seconds']:.3g} s on {speed['cluster']}: {speed['tokens_per_gpu_second']:,.0f} tokens per GPU and second, "
        f"{speed['tokens_per_second']:,.0f} in all",
        f"MFU {percent(speed['mfu'])} of {speed['peak_flops'] / 1e12:g} TFLOP/s ({speed['gpu']}, dense {speed['precision']}); {speed['formula']}",
        f"MFU {percent(speed['report_mfu'])} under the Skywork-MoE report's convention",
        *(waits if speed["bubble"] else []),
        _sustained_line(speed["sustained"]),
        f"what limits it: {speed['limit']}; {where}{', '.join(f'{name} {percent(share)}' for share, name in shares)}",
    ]


def _sustained_line(sustained: dict[str, Any]) -> str:
    kernels, collectives = sustained["kernels"], sustained["collectives"]
    if kernels == collectives == 1:
        return ("rates: those of single kernels and undisturbed links, nothing taken off; a training step is slower, by 18 % in the mean of published runs "
                "(docs/planning.md; cluster.sustained takes it off)")  # fmt: skip
    return f"rates: of single kernels' {percent(kernels)} and of links' {percent(collectives)} are taken as sustained: {sustained['source']}"
