"""The fastest ways to train a model on a cluster: every layout the trainer accepts, those that cannot be among the best left out by proof, the rest foreseen.

Layouts (`layouts.py`) are taken in the order of the least time a step of them can take. Each is cut into the best split there is (`splits.py`), with whole
layers recomputed where memory asks for it, each stage its own number, or modules of all layers where that is faster, and then foreseen in full (`estimate.py`).
When the next layout's least time is no less than the last of the best found, no other can be among them. A split with several chunks per stage is the best of
those tried, not of all (`Split.gap`), so about such layouts the proof is as good as that. What time does not suffice for is counted (`Counts.left`).

What is proven is proven about the planner's own figures: a plan it calls the best is the best of those foreseen, not of those measured.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from time import monotonic

from megatron_skywork.config.load import dump_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.estimate import Estimate, estimate
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.layout_costs import changed, held_bytes, least_bytes, pipeline_of, with_split
from megatron_skywork.plan.layouts import Layout, layout_of, layouts, least_ends_seconds, least_seconds, problems_of
from megatron_skywork.plan.memory import RESERVE_BYTES, room_bytes
from megatron_skywork.plan.reasons import compared, limits
from megatron_skywork.plan.splits import Split, best_split

VARY = ("capacity", "precision")
Progress = Callable[[str], None]
# Cuts of one layout that are timed; a layout's best is nearly always among the first.
CUTS_TIMED = 24
# An even cut of several chunks per stage that takes this much longer than the last of the best is not improved.
_WORTH_IMPROVING = 1.02
# Seconds between two words on how far the search is.
_SAY_EVERY = 2.0


@dataclass(frozen=True)
class Plan:
    """A layout with its split.

    Args:
        config: what the trainer runs, whole.
        split: layers and recomputed layers of each piece; its gap says whether it is proven to be the best split.
        reason: what limits it, in words.
    """

    layout: Layout
    config: Config = field(repr=False)
    estimate: Estimate = field(repr=False)
    split: Split
    reason: str


@dataclass(frozen=True)
class Own:
    """Where the given configuration stands.

    Args:
        estimate: None if it does not fit or breaks a rule.
        rank_at_least, rank_at_most: among all layouts, its own in its own split counted beside them; None with no estimate.
        why: it is not among the best, or that it is, in words.
    """

    estimate: Estimate | None = field(repr=False)
    rank_at_least: int | None
    rank_at_most: int | None
    why: str


@dataclass(frozen=True)
class Counts:
    """Of layouts: all that the rules allow, and what became of them; `left` are those that time did not suffice for (0: the best are proven to be)."""

    enumerated: int = 0
    refused_by_memory: int = 0
    pruned_by_bound: int = 0
    evaluated: int = 0
    left: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The best plans, fastest first.

    Args:
        bound_seconds: no layout that was not foreseen has a step that takes less; None where every one was.
        room_bytes: what a run may allocate on one GPU.
        seconds: that the search took.
    """

    plans: list[Plan]
    own: Own
    counts: Counts
    bound_seconds: float | None
    room_bytes: float
    seconds: float


def search(
    config: Config, cluster: Cluster, *, vary: Collection[str] = (), limit: int = 10, progress: Progress | None = None,
    reserve_bytes: float = RESERVE_BYTES, most_seconds: float = 120.0,
) -> SearchResult:  # fmt: skip
    """The fastest plans for a model, a global batch and all GPUs of a cluster.

    Args:
        config: its layout is where the user stands; all but layout, micro-batch and recomputation is kept.
        vary: what else may change: "capacity" and "precision", see `layouts.layouts`.
        limit: how many plans.
        progress: called with a line now and then.
        reserve_bytes: of a GPU's memory, what a run may not allocate.
        most_seconds: after which the search ends with what it has; `Counts.left` then says what it did not come to.

    Raises:
        ConfigError: an unknown word in `vary`, or no layout fits.
    """
    unknown = sorted(set(vary) - set(VARY))
    if unknown:
        raise ConfigError(f"vary={','.join(unknown)}: the search can also vary {' and '.join(VARY)}; degrees, splits and recomputation it always does")
    began, room = monotonic(), room_bytes(cluster, reserve_bytes)
    say = _paced(progress)
    candidates, counts = _candidates(config, cluster, frozenset(vary), room, say)
    plans: list[Plan] = []
    everything: list[float] = []
    heap = [(least, number, False) for number, (least, _) in enumerate(candidates)]
    while heap and monotonic() - began < most_seconds and not (len(plans) == limit and heap[0][0] >= plans[-1].estimate.step_seconds):
        _, number, is_refined = heapq.heappop(heap)
        layout = candidates[number][1]
        say(_progress_line(counts, plans))
        if not is_refined:
            least = _least_that_fits(layout, config, cluster, room)
            if least < math.inf:
                heapq.heappush(heap, (max(least, candidates[number][0]), number, True))
                continue
        worth = plans[-1].estimate.step_seconds * _WORTH_IMPROVING if len(plans) == limit else math.inf
        plan = plan_of(layout, config, cluster, room, worth_seconds=worth) if is_refined else None
        if plan is None:
            counts = replace(counts, refused_by_memory=counts.refused_by_memory + 1)
            continue
        counts = replace(counts, evaluated=counts.evaluated + 1)
        everything.append(plan.estimate.step_seconds)
        plans = sorted([*plans, plan], key=lambda plan: plan.estimate.step_seconds)[:limit]
    last = plans[-1].estimate.step_seconds if len(plans) == limit else math.inf
    left = sum(least < last for least, _, _ in heap)
    counts = replace(counts, pruned_by_bound=len(heap) - left, left=left)
    if not plans:
        raise ConfigError(f"none of {counts.enumerated} layouts of {cluster.world_size} GPUs fits into {room / 1e9:.1f} GB of each; use more GPUs; a smaller "
                          "train.global_batch_size does not help")  # fmt: skip
    own = _own(config, cluster, room, plans, everything, [least for least, _, _ in heap])
    plans = [replace(plan, reason=limits(plan.config, cluster, plan.estimate, room) + compared(plan.estimate, plans[0].estimate)) for plan in plans]
    return SearchResult(plans, own, counts, min((least for least, _, _ in heap), default=None), room, monotonic() - began)


def plan_yaml(plan: Plan) -> str:
    """A plan as a configuration file that the trainer runs as it is."""
    step, speed = plan.estimate.step_seconds, plan.estimate.tokens_per_gpu_second
    head = f"# Planned: {plan.layout.words()}. Foreseen: {step:.3f} s a step, {speed:.0f} tokens/s and GPU.\n# {plan.reason}\n"
    return head + dump_config(plan.config)


def _least_that_fits(layout: Layout, config: Config, cluster: Cluster, room: float) -> float:
    """What no step of a layout takes less than with the recomputation, of whatever kind, that it needs at least; infinite if it cannot fit."""
    found = math.inf
    for candidate in _recomputing(layout.applied(config)):
        pipeline = pipeline_of(candidate, cluster, room)
        least = least_seconds(pipeline, least_bytes(candidate, cluster.world_size))
        found = min(found, least + least_ends_seconds(candidate, cluster, pipeline)) if least < found else found
    return found


def plan_of(layout: Layout, config: Config, cluster: Cluster, room: float, *, cuts: int = CUTS_TIMED, worth_seconds: float = math.inf) -> Plan | None:
    """A layout in its best split; None if it does not fit, or if a rule forbids what came out.

    Args:
        cuts: how many are timed at most.
        worth_seconds: as `splits.best_split` takes it.
    """
    found: list[Plan] = []
    base = changed(layout.applied(config), parallel={"gpus_per_node": cluster.gpus_per_node})
    for candidate in _recomputing(base):
        pipeline = pipeline_of(candidate, cluster, room)
        if found and least_seconds(pipeline, least_bytes(candidate, cluster.world_size)) >= found[0].split.seconds:
            continue
        split = best_split(pipeline, limit=cuts, worth_seconds=worth_seconds)
        if split is None or (found and split.seconds >= found[0].split.seconds):
            continue
        whole = with_split(candidate, split.layers, split.recomputed)
        if not problems_of(whole, cluster.world_size):
            found = [Plan(layout, whole, estimate(whole, cluster), split, "")]
        if not any(split.recomputed):
            break  # nothing is computed twice: other modules could only add to it
    return found[0] if found else None


def _recomputing(config: Config) -> Iterator[Config]:
    """A configuration without recomputation (whole layers come with the split), then with modules of all layers recomputed."""
    yield config
    sparse = set(config.moe_layers)
    large = ["moe"] * bool(sparse) + ["mlp"] * (len(sparse) < config.model.num_layers)
    for modules in (["layernorm"], large, ["layernorm", *large]):
        yield changed(config, parallel={"recompute": "selective", "recompute_modules": modules})


def _candidates(config: Config, cluster: Cluster, vary: frozenset[str], room: float, say: Progress) -> tuple[list[tuple[float, Layout]], Counts]:
    """Layouts with the least time of a step, in its order, and how many there were; those are gone whose weights and optimizer alone do not fit."""
    found: list[tuple[float, Layout]] = []
    enumerated = refused = 0
    bounds: dict[Layout, float] = {}
    for layout in layouts(config, cluster.world_size, vary):
        enumerated += 1
        say(f"{enumerated} layouts")
        alike = replace(layout, vpp=min(layout.vpp, 2))  # more chunks change neither bound
        if alike not in bounds:
            applied = alike.applied(config)
            fits = held_bytes(applied, cluster.world_size) / layout.pp <= room  # the fullest stage holds no less than the mean
            bounds[alike] = least_seconds(pipeline_of(applied, cluster, room)) if fits else math.inf
        if bounds[alike] == math.inf:
            refused += 1
        else:
            found.append((bounds[alike], layout))
    return sorted(found, key=lambda item: (item[0], item[1].vpp)), Counts(enumerated=enumerated, refused_by_memory=refused)


def _own(config: Config, cluster: Cluster, room: float, plans: list[Plan], everything: list[float], pruned: list[float]) -> Own:
    problems = problems_of(config, cluster.world_size)
    if problems:
        return Own(None, None, None, f"the given layout cannot run: {problems[0]}")
    foreseen = estimate(config, cluster)
    over = [(memory.total - room, stage) for stage, memory in enumerate(foreseen.memory, start=1) if memory.total > room]
    if over:
        most, stage = max(over)
        return Own(None, None, None, f"the given layout does not fit: stage {stage} needs {most / 1e9:.2f} GB more than the {room / 1e9:.2f} GB there are")
    step = foreseen.step_seconds
    at_least = 1 + sum(other < step * (1 - 1e-9) for other in everything)
    at_most = at_least + sum(least < step for least in pruned)
    share = step / plans[0].estimate.step_seconds - 1
    same = next((number for number, plan in enumerate(plans, start=1) if plan.layout == layout_of(config)), None)
    where = f"the given layout is number {same} of these" if same else "the given layout is not among these"
    slower = compared(foreseen, plans[0].estimate).removeprefix("; ") or f"{100 * share:.1f} % slower than the best"
    how = "no slower than the best" if share <= 1e-9 else slower
    return Own(foreseen, at_least, at_most, f"{where}: {how}")


def _progress_line(counts: Counts, plans: list[Plan]) -> str:
    best = f", best step {plans[0].estimate.step_seconds:.3f} s" if plans else ""
    return f"{counts.evaluated + counts.refused_by_memory} of {counts.enumerated} layouts done{best}"


def _paced(progress: Progress | None) -> Progress:
    """Passes a line on now and then."""
    last = monotonic()

    def say(line: str) -> None:
        nonlocal last
        if progress is not None and monotonic() - last >= _SAY_EVERY:
            last = monotonic()
            progress(line)

    return say
