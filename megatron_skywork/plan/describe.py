"""What `--dry-run` says about a run that has not begun: as one dictionary (for `--json`) and as text made from that dictionary."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_skywork.config.load import dump_config
from megatron_skywork.config.schema import Config
from megatron_skywork.metrics.wording import sized
from megatron_skywork.plan.communication import busiest_stage
from megatron_skywork.plan.describe_estimate import memory_lines, memory_record, part_of, speed_lines, speed_record
from megatron_skywork.plan.flops import (
    formula_text,
    forward_flops_per_token,
    full_attention_flops_per_token,
    hardware_flops_per_token,
    report_flops_per_token,
    train_flops_per_token,
)
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.parameters import count_parameters, stage_parameters
from megatron_skywork.plan.stages import batch, recomputed_layers, stage_chunks
from megatron_skywork.plan.topology import NAMES, Groups, coincidences, config_groups


def billions(count: int) -> str:
    """146364000000 as `146.4 B`; smaller counts in M and K."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def describe(config: Config, world_size: int, cluster: Cluster | None = None) -> dict[str, Any]:
    """Everything `--dry-run` reports, ready for JSON; layers and stages count from 1, ranks and nodes from 0.

    Args:
        cluster: what it would run on; None leaves its speed open.

    Raises:
        ConfigError: the cluster has no such number of GPUs.
    """
    p, count, cut = config.parallel, count_parameters(config), batch(config, world_size)
    chunks, again, per_rank = stage_chunks(config), recomputed_layers(config), stage_parameters(config)
    groups = config_groups(config, world_size)
    flops = {"forward": forward_flops_per_token(config), "train": train_flops_per_token(config), "report_convention": report_flops_per_token(config),
             "full_attention": full_attention_flops_per_token(config), "hardware": hardware_flops_per_token(config)}
    return {
        "config": config.model_dump(mode="json"),
        "world_size": world_size,
        "nodes": -(-world_size // p.gpus_per_node),
        "layout": {"tp": p.tp, "pp": p.pp, "vpp": p.vpp, "cp": p.cp, "dp": cut.data_parallel,
                   **({"ep": p.ep, "etp": p.etp, "expert_dp": groups["expert_dp"].size} if config.moe is not None else {})},
        "parameters": {"total": count.total, "active": count.active, "padded_total": count.padded_total, "vocab_size": config.model.vocab_size,
                       "padded_vocab_size": config.model.padded_vocab_size, "components": count.components, "active_components": count.active_components},
        "flops_per_token": {**flops, "formula": formula_text(config)},
        "stages": [
            {"stage": stage, "layers": [[chunk[0] + 1, chunk[-1] + 1] for chunk in layers], "num_layers": sum(map(len, layers)),
             "recomputed_layers": again[stage - 1 :: p.pp], "parameters_per_rank": held}
            for stage, (layers, held) in enumerate(zip(chunks, per_rank, strict=True), start=1)
        ],
        "batch": {"tokens_per_step": cut.tokens_per_step, "sequences_per_step": config.train.global_batch_size, "micro_batches": cut.micro_batches,
                  "micro_batch_size": config.train.micro_batch_size, "steps": config.train.steps, "total_tokens": cut.tokens_per_step * config.train.steps},
        "groups": [_group_record(group, p.gpus_per_node) for group in groups.values()],
        "traffic": _traffic_record(config, world_size),
        "memory": memory_record(config, world_size, cluster),
        "speed": None if cluster is None else speed_record(config, part_of(cluster, world_size)),
        "same_groups": [list(pair) for pair in coincidences(groups)],
        "notes": notes(config, world_size),
    }


def _group_record(group: Groups, gpus_per_node: int) -> dict[str, Any]:
    return {"name": group.name, "count": len(group.ranks), "size": group.size, "first": group.ranks[0], "crossing_nodes": group.crossing(gpus_per_node),
            "nodes_of_first": len({rank // gpus_per_node for rank in group.ranks[0]})}


def _traffic_record(config: Config, world_size: int) -> dict[str, Any]:
    stage, sent = busiest_stage(config, world_size)
    expected, most = (sum(getattr(traffic, name) for traffic in sent) for name in ("expected", "most"))
    return {"stage": stage + 1, "expected_bytes": expected, "most_bytes": most, "by_collective": [asdict(traffic) for traffic in sent]}


def notes(config: Config, world_size: int) -> list[str]:
    """Things that are allowed and worth knowing."""
    p, moe, said = config.parallel, config.moe, []
    if p.tp > p.gpus_per_node:
        said.append(f"parallel.tp={p.tp} is more than the {p.gpus_per_node} GPUs of a node: every layer's reduction crosses nodes")
    if moe is not None and p.etp > 1:
        said.append(f"parallel.etp={p.etp}: on CPU ranks (gloo) the gathering of uneven token counts is padded, which is slower; GPUs are not affected")
    if moe is not None and moe.capacity_factor is not None and moe.capacity_scope == "rank" and p.tp * p.cp > 1:
        said.append("moe.capacity_scope=rank counts slots over one rank's part of the sequence, so which assignments drop depends on the layout")
    if config.megatron:
        said.append("the megatron section is not looked at by these counts: " + ", ".join(config.megatron))
    if world_size % p.gpus_per_node and world_size > p.gpus_per_node:
        said.append(f"the last of {-(-world_size // p.gpus_per_node)} nodes is not full ({world_size % p.gpus_per_node} of {p.gpus_per_node} GPUs)")
    return said


def plan_text(config: Config, world_size: int, cluster: Cluster | None = None) -> str:
    """The dry run as text; the arguments are `describe`'s."""
    resolved = ("Resolved configuration", dump_config(config).rstrip().splitlines())
    found = [resolved, *blocks(describe(config, world_size, cluster), config)]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in found)


def blocks(plan: dict[str, Any], config: Config) -> list[tuple[str, list[str]]]:
    """The parts of `describe`'s dictionary that have something to say, each a title and lines."""
    found = [
        ("Parameters", _parameter_lines(plan["parameters"])),
        ("Floating-point operations per token", _flops_lines(plan["flops_per_token"])),
        ("Layout", _layout_lines(plan, config)),
        ("Pipeline stages", [_stage_line(stage, config) for stage in plan["stages"]]),
        ("Process groups", _group_lines(plan, config)),
        ("Bytes sent by a rank in a step", _traffic_lines(plan["traffic"], plan["layout"])),
        ("Batch", _batch_lines(plan["batch"], plan["layout"]["dp"])),
        ("Memory of a rank", memory_lines(plan["memory"])),
        ("Speed", speed_lines(plan["speed"]) if plan["speed"] else []),
        ("Notes", plan["notes"]),
    ]
    return [(title, lines) for title, lines in found if lines]


def _parameter_lines(parameters: dict[str, Any]) -> list[str]:
    width = max(map(len, parameters["components"]))
    lines = [
        f"total   {billions(parameters['total'])} ({parameters['total']:,}), real vocabulary of {parameters['vocab_size']}, not padded",
        f"active  {billions(parameters['active'])} ({parameters['active']:,}) for each token",
        f"stored  {billions(parameters['padded_total'])} ({parameters['padded_total']:,}), vocabulary padded to {parameters['padded_vocab_size']}",
    ]
    for name, count in parameters["components"].items():
        active = parameters["active_components"][name]
        lines.append(f"        {name:<{width}}  {count:>19,}" + (f"  of them active {active:,}" if active != count else ""))
    return lines


def _flops_lines(flops: dict[str, Any]) -> list[str]:
    return [f"forward {flops['forward']:.4g}, forward and backward {flops['train']:.4g}", flops["formula"],
            f"under the Skywork-MoE report's convention, 6 N_active + 12 L A S: {flops['report_convention']:.4g}",
            f"attention counted in full, the masked half too: {flops['full_attention']:.4g}",
            f"done by the hardware: {flops['hardware']:.4g} ({flops['hardware'] / flops['train'] - 1:+.1%} by recomputation, padded slots and vocabulary, "
            "logits made again)"]


def _layout_lines(plan: dict[str, Any], config: Config) -> list[str]:
    layout = plan["layout"]
    attention = f"attention: PP {layout['pp']} x TP {layout['tp']} x CP {layout['cp']} x DP {layout['dp']}"
    lines = [f"{_plural(plan['world_size'], 'rank')} on {_plural(plan['nodes'], 'node')} of {config.parallel.gpus_per_node}", attention]
    if layout["vpp"] > 1:
        lines[-1] += f", {layout['vpp']} chunks per stage"
    if "ep" in layout:
        lines.append(f"experts:   PP {layout['pp']} x ETP {layout['etp']} x EP {layout['ep']} x expert DP {layout['expert_dp']}")
        summary = f"TP = EP {layout['tp']}" if ["tp", "ep"] in plan["same_groups"] else f"TP {layout['tp']}, EP {layout['ep']}"
        lines.append(f"in short:  PP {layout['pp']}, {summary}, DP {layout['dp']}")
    if config.parallel.recompute == "selective":
        lines.append(f"recomputed in every layer: {', '.join(config.parallel.recompute_modules)}")
    return lines


def _stage_line(stage: dict[str, Any], config: Config) -> str:
    spans = " and ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in stage["layers"])
    ends = [word for word, there in (("embedding", stage["stage"] == 1), ("output and loss", stage["stage"] == config.parallel.pp)) if there]
    again = f"{' and '.join(map(str, stage['recomputed_layers']))} of them recomputed" if config.parallel.recompute == "full" else ""
    parts = [f"{stage['num_layers']:>3} layers ({spans})", again, f"{billions(stage['parameters_per_rank'])} parameters per rank", " and ".join(ends)]
    return f"stage {stage['stage']:>3}: {', '.join(part for part in parts if part)}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _ranks(ranks: list[int]) -> str:
    shown = ranks if len(ranks) <= 8 else [*ranks[:4], "...", ranks[-1]]
    return f"[{' '.join(map(str, shown))}]"


def _group_lines(plan: dict[str, Any], config: Config) -> list[str]:
    lines, alone = [], []
    for group in plan["groups"]:
        name = group["name"].upper().replace("EXPERT_DP", "expert DP")
        head = f"{name + ':':<10} {_plural(group['count'], 'group')} of {group['size']}, e.g. {_ranks(group['first'])}"
        if group["size"] == 1:
            alone.append(name)
            continue
        if group["crossing_nodes"] == 0:
            where = "inside a node"
        else:
            share = "all" if group["crossing_nodes"] == group["count"] else f"{group['crossing_nodes']} of {group['count']}"
            where = f"{share} cross nodes" + (f" ({group['nodes_of_first']} nodes each)" if share == "all" else "")
        lines.append(f"{head}, {where}  ({NAMES[group['name']]})")
    if alone:
        lines.append(f"of one rank each, so nothing is exchanged: {', '.join(alone)}")
    return lines + [f"the {NAMES[second]} groups are the {NAMES[first]} groups" for first, second in plan["same_groups"]]


def _traffic_lines(traffic: dict[str, Any], layout: dict[str, Any]) -> list[str]:
    kinds = traffic["by_collective"]
    if not kinds:
        return []
    where = f"; stage {traffic['stage']} of {layout['pp']} sends most" if layout["pp"] > 1 else ""
    lines = [f"{sized(traffic['expected_bytes'])}, as rings send them, without single numbers{where}"]
    for kind in kinds:
        most = f"  (balanced; at most {sized(kind['most'])})" if kind["most"] > kind["expected"] else ""
        lines.append(f"{kind['group']:<9} {kind['operation']:<14} {sized(kind['expected']):>10}  {kind['what']}{most}")
    return lines + ["context parallelism's exchange of keys and values is not counted"] * (layout["cp"] > 1)


def _batch_lines(batch_plan: dict[str, Any], data_parallel: int) -> list[str]:
    sequences, tokens = _plural(batch_plan["sequences_per_step"], "sequence"), batch_plan["tokens_per_step"]
    return [
        f"{sequences} = {tokens:,} tokens per step; {_plural(batch_plan['steps'], 'step')} = {billions(batch_plan['total_tokens'])} tokens",
        f"{batch_plan['micro_batches']} micro-batch{'' if batch_plan['micro_batches'] == 1 else 'es'} of {_plural(batch_plan['micro_batch_size'], 'sequence')} "
        f"on each of {_plural(data_parallel, 'data-parallel rank')}",
    ]
