"""Why a plan is as fast as it is, in words: what its step goes to beside the products it is there for, and what it loses against another."""

from __future__ import annotations

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.estimate import PART_NAMES, Estimate
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.stages import batch, recomputed_layers

# Shares of a step below this are not worth a word.
_WORTH = 0.01
# Memory that is this full decides what else is possible.
_FULL = 0.93


def limits(config: Config, cluster: Cluster, foreseen: Estimate, room: float) -> str:
    """What keeps a plan from its products' own speed, largest first, in shares of the step on the stage that works most."""
    p, step = config.parallel, foreseen.step_seconds
    network = Network(config, cluster.world_size, cluster)
    again, count = sum(recomputed_layers(config)), batch(config, cluster.world_size).micro_batches
    where = {True: "across nodes", False: "inside a node"}
    details = {
        "tp": f"tp {p.tp}, {where[network.where('tp').crosses]}",
        "ep": f"ep {p.ep}, etp {p.etp}, {where[network.where('etp_ep').crosses]}",
        "recomputation": f"{again} of {config.model.num_layers} layers" if p.recompute == "full" else ", ".join(p.recompute_modules),
        "waiting": f"{p.pp} stages" + (f" of {p.vpp} chunks" if p.vpp > 1 else "") + f", {count} micro-batches",
    }
    costs = sorted(((seconds / step, name) for name, seconds in foreseen.parts.items() if name not in ("products", "attention")), reverse=True)
    words = {name: PART_NAMES[name] + (f" ({details[name]})" if name in details else "") for _, name in costs}
    said = [f"{100 * share:.1f} % {words[name]}" for share, name in costs if share >= _WORTH]
    fullest = max(memory.total for memory in foreseen.memory)
    stage = next(stage for stage, memory in enumerate(foreseen.memory, start=1) if memory.total == fullest)
    full = f"; memory is full on stage {stage}: {fullest / 1e9:.1f} of {room / 1e9:.1f} GB" if fullest > _FULL * room else ""
    return (", ".join(said) or "nothing but its products") + full


def compared(foreseen: Estimate, best: Estimate) -> str:
    """By how much a plan is slower than another, and which part of the step that is; nothing if it is not."""
    lost = foreseen.step_seconds - best.step_seconds
    if lost <= 1e-9 * best.step_seconds:
        return ""
    names = {*foreseen.parts, *best.parts}
    differences = sorted(((foreseen.parts.get(name, 0.0) - best.parts.get(name, 0.0), name) for name in names), reverse=True)
    more = [f"{PART_NAMES.get(name, name)} (+{100 * seconds / best.step_seconds:.1f} %)" for seconds, name in differences[:2] if seconds > lost / 4]
    return f"; {100 * lost / best.step_seconds:.1f} % slower than the best by {' and '.join(more)}" if more else ""
