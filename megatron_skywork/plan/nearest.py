"""What to type when a run cannot be: the settings nearest to the given ones that work on the same GPUs.

Nearest is: the fewest settings changed; of these the smallest change, |log2(new / old)| summed over them (a list that must follow, such as layers per stage, is
not counted, nor is a switch). Sets of one setting are tried, then of two and of three, each with every value that could help, and what comes out is held
against the trainer's own rules (`config/validate.py`) and against `memory.py`. Where only memory is short, every answer with the fewest changes is foreseen
(`estimate.py`), and the one with the shortest step is given: recomputed layers per stage, a larger degree, a smaller micro-batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from megatron_skywork.config.rules import RULES, divisors, overlap
from megatron_skywork.config.schema import Config
from megatron_skywork.config.validate import uneven_split
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.estimate import estimate
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.layout_costs import changed, default_modules, held_bytes, pipeline_of, with_split
from megatron_skywork.plan.layouts import problems_of
from megatron_skywork.plan.memory import RESERVE_BYTES, room_bytes, stage_memory
from megatron_skywork.plan.splits import best_split, given_split

_DEGREES = ("tp", "pp", "vpp", "ep", "etp", "cp")
_SETTINGS = (*(f"parallel.{name}" for name in _DEGREES), "train.micro_batch_size", "train.global_batch_size", "model.vocab_divisible_by")
_MOST_CHANGES = 3
# Answers to a lack of memory that are foreseen, the smallest changes first.
_MOST_FORESEEN = 24


@dataclass(frozen=True)
class Nearest:
    """A configuration that works.

    Args:
        overrides: what to type, `section.key=value`.
        reasons: what was wrong with the given one, a sentence each.
        config: the changed configuration.
        step_seconds: of a step with it, foreseen.
        alternatives: others with as few changes, overrides and seconds of a step, the fastest first; only where memory was what lacked.
    """

    overrides: list[str]
    reasons: list[str]
    config: Config = field(repr=False)
    step_seconds: float
    alternatives: list[tuple[list[str], float]]


def nearest(config: Config, cluster: Cluster, *, reserve_bytes: float = RESERVE_BYTES) -> Nearest | None:
    """The nearest configuration that works on all GPUs of a cluster; None if the given one does.

    Raises:
        ConfigError: nothing near works: the rules that are broken have nothing to do with the layout, or no layout nearby fits.
    """
    world, room = cluster.world_size, room_bytes(cluster, reserve_bytes)
    problems = problems_of(config, world)
    reasons = problems or _lacking(config, world, room)
    if not reasons:
        return None
    fixed = other_problems(config, world)
    if fixed:
        raise ConfigError([*fixed, "no other layout changes that; set these right first"])
    found = _that_work(config, cluster, room, is_only_memory=not problems) if _least_held(config, world) <= room else []
    if not found:
        raise ConfigError([*reasons, f"no change of up to {_MOST_CHANGES} settings of the layout works on {world} GPUs of {room / 1e9:.1f} GB; "
                           f"weights and optimizer alone are {_least_held(config, world) / 1e9:.1f} GB a GPU, shared evenly over all: use more GPUs, "
                           "or let `--search` look at every layout"])  # fmt: skip
    best = found[0]
    return Nearest(best[1], reasons, best[2], best[0], [(overrides, seconds) for seconds, overrides, _ in found[1:]])


def _lacking(config: Config, world: int, room: float) -> list[str]:
    """By how much and where a valid configuration does not fit."""
    over = [(stage, memory.total) for stage, memory in enumerate(stage_memory(config, world), start=1) if memory.total > room]
    if not over:
        return []
    stage, total = max(over, key=lambda item: item[1])
    others = f", and {len(over) - 1} other stage(s) do not fit either" if len(over) > 1 else ""
    return [f"stage {stage} of {config.parallel.pp} needs {total:,.0f} bytes on each GPU, {total - room:,.0f} more than the {room:,.0f} there are{others}"]


def _least_held(config: Config, world: int) -> float:
    """Bytes of a GPU if everything were shared over all of them, as far as the rules let it."""
    alone = changed(config, parallel={name: 1 for name in _DEGREES} | {"layers_per_stage": None})
    return held_bytes(alone, world) / world


def other_problems(config: Config, world: int) -> list[str]:
    """Sentences of rules that read no setting that is tried here, and of sections' own rules."""
    from_layout = [sentence for reads, rule in RULES if overlap(reads, (*_SETTINGS, "parallel.layers_per_stage")) for sentence in rule(config, world)]
    return [problem for problem in problems_of(config, world) if problem not in from_layout]


# ---------------------------------------------------------------------------------------------------------------------------- what is tried


def _value(config: Config, setting: str) -> int:
    section, name = setting.split(".")
    return getattr(getattr(config, section), name)


def _values(config: Config, setting: str, world: int) -> list[int]:
    """Other values of a setting that could help, the nearest first."""
    old, name = _value(config, setting), setting.split(".")[1]
    if name == "micro_batch_size":
        values = [size for size in divisors(config.train.global_batch_size) if size <= max(old, 8)]
    elif name == "global_batch_size":
        # Multiples of what any data-parallel size could ask for, around the given one.
        values = sorted({max(step, round_ * step) for step in divisors(world) for round_ in (old // step, -(-old // step))})
    elif name == "vocab_divisible_by":
        values = [old * factor for factor in (2, 3, 4, 5, 7, 8)]
    elif name == "vpp":
        values = list(range(1, config.model.num_layers // max(1, config.parallel.pp) + 2))
    elif name == "pp":
        values = [degree for degree in divisors(world) if degree <= config.model.num_layers]
    elif name == "cp" and config.model.backend != "te":
        values = [1]
    else:
        values = divisors(world)
    return sorted((value for value in values if value != old), key=lambda value: (_distance(value, old), value))


def _distance(new: int, old: int) -> float:
    return abs(math.log2(new / old))


def _changes(config: Config, world: int, number: int) -> Iterator[dict[str, int]]:
    """All changes of so many settings, the smallest first."""
    found: list[tuple[float, dict[str, int]]] = []
    options = {setting: _values(config, setting, world) for setting in _SETTINGS}
    if config.moe is None:
        options |= {f"parallel.{name}": [1] * (getattr(config.parallel, name) > 1) for name in ("ep", "etp")}
    for settings in combinations(_SETTINGS, number):
        for values in product(*(options[setting] for setting in settings)):
            change = dict(zip(settings, values, strict=True))
            p = {name: change.get(f"parallel.{name}", getattr(config.parallel, name)) for name in _DEGREES}
            if world % (p["tp"] * p["cp"] * p["pp"]) or (config.moe is not None and world % (p["ep"] * p["etp"] * p["pp"])):
                continue
            found.append((sum(_distance(value, _value(config, setting)) for setting, value in change.items()), change))
    yield from (change for _, change in sorted(found, key=lambda item: (item[0], list(item[1].items()))))


def _applied(config: Config, change: dict[str, int]) -> Config:
    """A configuration with these settings, and with what must follow them: layers per stage, and recomputed layers of as many pieces."""
    sections: dict[str, dict[str, Any]] = {}
    for setting, value in change.items():
        section, name = setting.split(".")
        sections.setdefault(section, {})[name] = value
    result = changed(config, **sections)
    p, layers = result.parallel, config.model.num_layers
    split = p.layers_per_stage
    is_right = layers % (p.pp * p.vpp) == 0 if split is None else len(split) == p.pp * p.vpp and sum(split) == layers
    if is_right or p.pp * p.vpp > layers:
        return result
    follow: dict[str, Any] = {"layers_per_stage": uneven_split(layers, p.pp * p.vpp)}
    if isinstance(p.recompute_layers, list):
        follow["recompute_layers"] = None
    return changed(result, parallel=follow)


def _that_work(config: Config, cluster: Cluster, room: float, *, is_only_memory: bool) -> list[tuple[float, list[str], Config]]:
    """What works with the fewest changes: seconds of a step, overrides, configuration. The smallest change; where memory lacked the fastest first."""
    world = cluster.world_size
    rules = [rule for reads, rule in RULES if overlap(reads, (*_SETTINGS, "parallel.layers_per_stage"))]
    for number in range(_MOST_CHANGES + 1):
        found = [_answer(config, candidate, cluster) for candidate in _recomputing(config, cluster, room)] if is_only_memory and number == 1 else []
        for change in _changes(config, world, number):
            candidate = _applied(config, change)
            if any(next(iter(rule(candidate, world)), None) for rule in rules):
                continue
            if held_bytes(candidate, world) / candidate.parallel.pp > room:
                continue
            if max(memory.total for memory in stage_memory(candidate, world)) > room:
                fitting = next(_recomputing(candidate, cluster, room), None) if not is_only_memory else None
                if fitting is None:
                    continue
                candidate = fitting
            if problems_of(candidate, world):
                continue
            found.append(_answer(config, candidate, cluster))
            if not is_only_memory or len(found) >= _MOST_FORESEEN:
                break
        if found:
            return sorted(found, key=lambda item: item[0])
    return []


def _recomputing(config: Config, cluster: Cluster, room: float) -> Iterator[Config]:
    """The same layout with recomputed layers, in its own split and in the best one; nothing if it does not fit either way."""
    p = config.parallel
    if problems_of(config, cluster.world_size):
        return
    bare = changed(config, parallel={"recompute": "none", "recompute_layers": None, "recompute_modules": default_modules(config)})
    pipeline = pipeline_of(bare, cluster, room)
    own = p.layers_per_stage or [config.model.num_layers // (p.pp * p.vpp)] * (p.pp * p.vpp)
    for split in (given_split(pipeline, own), best_split(pipeline, limit=40)):
        if split is not None:
            result = with_split(bare, split.layers, split.recomputed)
            if not problems_of(result, cluster.world_size) and max(memory.total for memory in stage_memory(result, cluster.world_size)) <= room:
                yield result


def _answer(config: Config, candidate: Config, cluster: Cluster) -> tuple[float, list[str], Config]:
    return estimate(candidate, cluster).step_seconds, overrides_between(config, candidate), candidate


def overrides_between(config: Config, other: Config) -> list[str]:
    """What to type to come from one configuration to another."""
    found = []
    for section in ("model", "parallel", "train"):
        before, after = getattr(config, section), getattr(other, section)
        for name in type(before).model_fields:
            new = getattr(after, name)
            if new != getattr(before, name):
                is_text = isinstance(new, str)
                found.append(f"{section}.{name}={new if is_text else json.dumps(new, separators=(',', ':'))}")
    return found
