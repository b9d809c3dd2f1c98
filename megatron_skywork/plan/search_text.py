"""What a search, a comparison of expert layouts and a nearest plan have to say: for JSON, and as lines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_skywork.metrics.wording import gibibytes, percent
from megatron_skywork.plan.expert_layouts import ExpertLayout
from megatron_skywork.plan.layouts import Layout
from megatron_skywork.plan.nearest import Nearest
from megatron_skywork.plan.search import Plan, SearchResult


def search_record(found: SearchResult) -> dict[str, Any]:
    """The plans, how far the search went, and where the given layout stands."""
    own = found.own
    place = {"rank_at_least": own.rank_at_least, "rank_at_most": own.rank_at_most, "why": own.why}
    return {
        "plans": [plan_record(plan) for plan in found.plans],
        "own": {"step_seconds": own.estimate and own.estimate.step_seconds, **place},
        "counts": asdict(found.counts), "bound_seconds": found.bound_seconds, "room_bytes": found.room_bytes, "seconds": found.seconds,
    }  # fmt: skip


def plan_record(plan: Plan) -> dict[str, Any]:
    """One plan."""
    foreseen = plan.estimate
    return {
        "layout": asdict(plan.layout), "layers_per_stage": list(plan.split.layers), "recompute": plan.config.parallel.recompute,
        "recompute_layers": list(plan.split.recomputed), "split_gap": plan.split.gap, "step_seconds": foreseen.step_seconds,
        "tokens_per_gpu_second": foreseen.tokens_per_gpu_second, "mfu": foreseen.mfu, "bubble": foreseen.bubble,
        "largest_bytes": max(memory.total for memory in foreseen.memory), "reason": plan.reason,
    }  # fmt: skip


def search_lines(found: SearchResult, given: Layout) -> list[str]:
    """The same for people.

    Args:
        given: the layout that a plan's capacity, precision and moments are compared with.
    """
    counts = found.counts
    lines = [
        f"{counts.enumerated:,} layouts in {found.seconds:.0f} s: {counts.pruned_by_bound:,} cannot be among the best by their bound, "
        f"{counts.refused_by_memory:,} do not fit into {gibibytes(found.room_bytes)}, {counts.evaluated:,} were foreseen in full, {_proven(found)}"
    ]
    for number, plan in enumerate(found.plans, start=1):
        foreseen, gap = plan.estimate, f", another split at most {percent(plan.split.gap)} faster" if plan.split.gap else ", no split is faster"
        lines += [
            f"{number:>2}. {plan.layout.words()}: {foreseen.step_seconds:.3f} s, {foreseen.tokens_per_gpu_second:,.0f} tokens per GPU and second, "
            f"MFU {percent(foreseen.mfu)}, {gibibytes(max(memory.total for memory in foreseen.memory))}",
            f"    layers {_listed(plan.split.layers)}{_again(plan)}{gap}",
            f"    {_changes(plan.layout, given)}{plan.reason}",
        ]
    rank = "" if found.own.rank_at_least is None else f" (place {found.own.rank_at_least:,} to {found.own.rank_at_most:,})"
    return [*lines, f"the given one{rank}: {found.own.why}"]


def _changes(layout: Layout, given: Layout) -> str:
    names = ("capacity_factor", "precision", "moments")
    changed = [f"{name} {getattr(layout, name)} instead of {getattr(given, name)}" for name in names if getattr(layout, name) != getattr(given, name)]
    return f"changes what is learned: {', '.join(changed)}; " if changed else ""


def _proven(found: SearchResult) -> str:
    if not found.counts.left:
        return "none is left: these are the best"
    return f"{found.counts.left:,} were not come to, none of them below {found.bound_seconds or 0:.3f} s"


def _listed(numbers: tuple[int, ...]) -> str:
    return f"all {numbers[0]}" if len(set(numbers)) == 1 and len(numbers) > 1 else f"[{' '.join(map(str, numbers))}]"


def _again(plan: Plan) -> str:
    p = plan.config.parallel
    if p.recompute == "selective":
        return f", recomputed in all of them: {', '.join(p.recompute_modules)}"
    return f", recomputed {_listed(plan.split.recomputed)}" if any(plan.split.recomputed) else ", nothing recomputed"


def split_lines(plan: Plan | None, given_seconds: float, *, fits: bool) -> list[str]:
    """The best split of the given degrees, beside the given one."""
    if plan is None:
        return ["in these degrees no split fits, whatever is recomputed"]
    faster = 1 - plan.estimate.step_seconds / given_seconds
    beside = "as fast as the given one" if abs(faster) < 1e-6 else f"{percent(abs(faster))} {'faster' if faster > 0 else 'slower'} than the given one"
    gap = f"another split could at most be {percent(plan.split.gap)} faster" if plan.split.gap else "no other split is faster"
    beside += "" if fits else ", which does not fit"
    return [f"layers {_listed(plan.split.layers)}{_again(plan)}: {plan.estimate.step_seconds:.3f} s a step, {beside}; {gap}"]


def expert_lines(layouts: list[ExpertLayout], room: float) -> list[str]:
    """Ways to lay out experts.

    Args:
        room: bytes a run may allocate on one GPU.
    """
    lines = []
    for one in layouts:
        name = f"{one.name:<24} ep {one.ep}, etp {one.etp}:"
        if one.estimate is None:
            lines.append(f"{name} {one.problem}")
            continue
        where = "across nodes" if one.crosses_nodes else "inside a node"
        lines.append(
            f"{name} {one.estimate.step_seconds:8.3f} s a step, {one.exchange_seconds:.3f} s of it exchange of rows ({where}), {gibibytes(one.fullest_bytes)}"
            + ", which does not fit" * (one.fullest_bytes > room))
    return lines


def expert_record(layouts: list[ExpertLayout]) -> list[dict[str, Any]]:
    """The same for JSON."""
    names = ("name", "ep", "etp", "crosses_nodes", "exchange_seconds", "communication_seconds", "fullest_bytes", "problem")
    return [{**{name: getattr(one, name) for name in names}, "step_seconds": one.estimate and one.estimate.step_seconds} for one in layouts]


def nearest_record(near: Nearest) -> dict[str, Any]:
    """What to type, and what else would do."""
    others = [{"overrides": overrides, "step_seconds": seconds} for overrides, seconds in near.alternatives]
    return {"overrides": near.overrides, "reasons": near.reasons, "step_seconds": near.step_seconds, "alternatives": others}


def nearest_lines(near: Nearest) -> list[str]:
    """The same for people."""
    lines = [f"the nearest plan that works: {' '.join(near.overrides)} ({near.step_seconds:.3f} s a step)"]
    return lines + [f"or: {' '.join(overrides)} ({seconds:.3f} s)" for overrides, seconds in near.alternatives[:3]]
