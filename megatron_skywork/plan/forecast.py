"""What `tools/plan.py` says of a layout on a cluster beyond the dry run: where a step's time goes, stage by stage and collective by collective."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_skywork.config.schema import Config
from megatron_skywork.metrics.wording import sized
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.communication import busiest_stage
from megatron_skywork.plan.estimate import Estimate
from megatron_skywork.plan.hardware import Cluster

# What runs beside something else, by group; everything else is waited for.
OVERLAP = {
    "tp": "backward's run beside products, which they slow down; counted as waited for",
    "dp_cp": "beside the last backward and the first forward, with parallel.overlap",
    "expert_dp": "beside the last backward and the first forward, with parallel.overlap",
}


def collectives(config: Config, cluster: Cluster) -> dict[str, Any]:
    """Every kind of collective of the stage that sends most: bytes, calls and seconds of a step on the link its group crosses, as if nothing hid it."""
    network = Network(config, cluster.world_size, cluster)
    stage, sent = busiest_stage(config, cluster.world_size)
    rows = []
    for traffic in sent:
        where = network.where(traffic.group)
        link = cluster.between if where.crosses else cluster.inside
        seconds = network.sent(traffic.group, traffic.operation, traffic.expected, traffic.calls)
        place = {"ranks": where.size, "ranks_in_a_node": where.per_node, "link": link.name}
        rows.append({**asdict(traffic), **place, "seconds": seconds, "beside": OVERLAP.get(traffic.group)})
    return {"stage": stage + 1, "rows": rows}


def collective_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f"of stage {found['stage']}, which sends most; seconds as if nothing ran beside them"]
    for row in found["rows"]:
        where = "inside a node" if row["ranks_in_a_node"] == row["ranks"] else f"across nodes, {row['ranks_in_a_node']} of {row['ranks']} ranks in each"
        call = f"{row['group']:<9} {row['operation']:<14} {sized(row['expected']):>9} in {row['calls']:>5} calls {row['seconds'] * 1000:>9.1f} ms"
        lines.append(f"{call}  {row['link']}, {where}: {row['what']}")
    said = {text: [group for group in OVERLAP if OVERLAP[group] == text] for text in OVERLAP.values()}
    present = {row["group"] for row in found["rows"]}
    return lines + [f"overlap, {' and '.join(groups)}: {text}" for text, groups in said.items() if present & set(groups)]


def pipeline(config: Config, foreseen: Estimate) -> dict[str, Any]:
    """Each stage's time in a step."""
    stages = [
        {"stage": number, "busy_seconds": stage.busy_seconds, "idle_seconds": stage.idle_seconds, "idle_share": stage.idle_seconds / foreseen.timeline.seconds}
        for number, stage in enumerate(foreseen.timeline.stages, start=1)
    ]
    return {"seconds": foreseen.timeline.seconds, "bubble": foreseen.bubble, "stages": stages}


def pipeline_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f"{found['seconds']:.3f} s; stages wait {found['bubble']:.1%} of it"]
    for stage in found["stages"]:
        idle = f"{stage['idle_seconds']:7.3f} s idle ({stage['idle_share']:.1%})"
        lines.append(f"stage {stage['stage']:>3}: {stage['busy_seconds']:8.3f} s of work, {idle}")
    return lines
