"""The whole answer of `tools/plan.py`: one layout on one cluster, what it costs to train with it, and which one would do better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from megatron_skywork.config.load import load_config, unchecked_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.wording import count
from megatron_skywork.plan import forecast, gantt
from megatron_skywork.plan.budget import DAY_SECONDS, Budget, budget, budget_lines, budget_record, gpus_for, tokens_in
from megatron_skywork.plan.checkpoint_interval import DEFAULT_RATE, failure_rate, save_cost
from megatron_skywork.plan.describe import blocks, describe
from megatron_skywork.plan.estimate import Estimate, estimate
from megatron_skywork.plan.expert_layouts import expert_layouts
from megatron_skywork.plan.hardware import Cluster, load_cluster
from megatron_skywork.plan.layout_costs import RESERVE_BYTES, room_bytes
from megatron_skywork.plan.layouts import layout_of
from megatron_skywork.plan.nearest import Nearest, nearest
from megatron_skywork.plan.parameters import count_parameters
from megatron_skywork.plan.search import VARY, SearchResult, plan_of, plan_yaml, search
from megatron_skywork.plan.search_text import (
    expert_lines,
    expert_record,
    nearest_lines,
    nearest_record,
    plan_record,
    search_lines,
    search_record,
    split_lines,
)
from megatron_skywork.plan.upcycle_or_scratch import advice_lines, advice_record, advise, parse_tokens

# Cuts of the given degrees that are timed, a few milliseconds each.
MOST_CUTS = 200


@dataclass(frozen=True)
class Wanted:
    """What is asked beyond the plan itself; see the options of tools/plan.py.

    Raises:
        ConfigError: options that contradict each other, or a value that cannot be.
    """

    schedule: str | None = None
    search: bool = False
    search_seconds: float = 40.0
    vary: tuple[str, ...] = ()
    write: str | None = None
    tokens: str | None = None
    days: float | None = None
    failures: str | None = None
    gpu_hour_price: float | None = None
    dense_tokens: str | None = None
    html: str | None = None
    png: str | None = None

    def __post_init__(self) -> None:
        problems = [f"--vary={name}: cannot be varied; use {' or '.join(VARY)}" for name in self.vary if name not in VARY]
        problems += [f"{option} goes with --search" for option, given in (("--vary", self.vary), ("--write", self.write)) if given and not self.search]
        if not self.search_seconds > 0:
            problems.append(f"--search-seconds={self.search_seconds:g}: must be above 0")
        if self.days is not None and not 0 < self.days < math.inf:
            problems.append(f"--days={self.days:g}: must be a number above 0")
        if self.write and Path(self.write).exists():
            problems.append(f"--write={self.write}: exists; give another name, or move it away")
        if problems:
            raise ConfigError(problems)


def plan(paths: Sequence[str], overrides: Sequence[str], cluster: str, nodes: int | None, wanted: Wanted, progress: Callable[[str], None]) -> dict[str, Any]:
    """The plan of a run's settings on a cluster: JSON, with what a person reads under `text` and whether it fits under `passed`.

    Args:
        cluster: as `hardware.load_cluster` takes it.
        nodes: instead of the cluster's own number.
        progress: told how a search comes on.

    Raises:
        ConfigError: settings, cluster or options are wrong; where there is a plan near by that works, it is named.
    """
    machine = load_cluster(cluster)
    if nodes is not None:
        if nodes < 1:
            raise ConfigError(f"--nodes={nodes}: must be at least 1")
        machine = replace(machine, nodes=nodes)
    config = _config(paths, [*overrides, f"parallel.gpus_per_node={machine.gpus_per_node}"], machine)
    foreseen = estimate(config, machine, schedule=wanted.schedule, keep_events=bool(wanted.html or wanted.png))
    record = describe(config, machine.world_size, machine)
    del record["config"]
    text = [f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in blocks(record, config)]

    def add(name: str, title: str, found: Any, lines: Sequence[str]) -> None:
        record[name] = found
        text.append(f"{title}\n" + "\n".join(f"  {line}" for line in lines))

    pipeline, sent = forecast.pipeline(config, foreseen), forecast.collectives(config, machine)
    add("pipeline", "Pipeline", pipeline, forecast.pipeline_lines(pipeline))
    add("collectives", "Time of collectives in a step", sent, forecast.collective_lines(sent))
    if config.parallel.pp > 1:
        split = plan_of(layout_of(config), config, machine, room_bytes(machine, RESERVE_BYTES), cuts=MOST_CUTS)
        add("best_split", "The best split of these degrees", split and plan_record(split), split_lines(split, foreseen.step_seconds))
    if config.moe is not None:
        layouts = expert_layouts(config, machine)
        add("expert_layouts", "Experts: over which ranks they are dealt", expert_record(layouts), expert_lines(layouts))
    costs = _budget(config, machine, foreseen, wanted)
    in_days, said = _in_days(config, machine, costs, wanted)
    add("budget", "Budget", {**budget_record(costs), "in_days": in_days}, [*budget_lines(costs), *said])
    if wanted.dense_tokens is not None:
        advice = advise(parse_tokens(wanted.dense_tokens, "--dense-tokens"), costs.tokens, _dense_parameters(config), count_parameters(config).active)
        add("advice", "Upcycle, or train from scratch", advice_record(advice), advice_lines(advice))
    record["passed"] = fits = record["memory"]["gpu"]["fits"]
    if not fits:
        near = _nearest(config, machine)
        found = nearest_record(near) if isinstance(near, Nearest) else None
        add("nearest", "It does not fit", found, [*near.reasons, *nearest_lines(near)] if isinstance(near, Nearest) else near)
    if wanted.search:
        best = search(config, machine, vary=wanted.vary, progress=progress, most_seconds=wanted.search_seconds)
        add("search", "The best layouts", search_record(best), [*search_lines(best), *_written(best, wanted)])
    whole, title = "\n\n".join(text), f"{Path(config.run_dir).name or 'a run'} on {machine.name}"
    if wanted.html is not None:
        Path(wanted.html).write_text(_page(foreseen, title, whole), encoding="utf-8")
    if wanted.png is not None:
        Path(wanted.png).write_bytes(gantt.png(foreseen.timeline, foreseen.pieces, title=title))
    return {**record, "text": [whole]}


def _config(paths: Sequence[str], overrides: Sequence[str], machine: Cluster) -> Config:
    """The settings, checked for the cluster; to what is wrong between them the nearest plan that works is added."""
    try:
        return load_config(paths, overrides, machine.world_size)
    except ConfigError as error:
        try:
            possible = unchecked_config(paths, overrides)
        except ConfigError:
            raise error from None
        near = _nearest(possible, machine)
        more = nearest_lines(near) if isinstance(near, Nearest) else near
        raise ConfigError([*error.problems, *(line for line in more if line not in error.problems)]) from None


def _nearest(config: Config, machine: Cluster) -> Nearest | list[str]:
    """The nearest plan, or why there is none."""
    try:
        return nearest(config, machine) or []
    except ConfigError as none:
        return none.problems


def _budget(config: Config, machine: Cluster, foreseen: Estimate, wanted: Wanted) -> Budget:
    tokens = None if wanted.tokens is None else parse_tokens(wanted.tokens, "--tokens")
    speed, saving = foreseen.tokens_per_gpu_second, save_cost(config, machine)
    failures = DEFAULT_RATE if wanted.failures is None else failure_rate(wanted.failures)
    return budget(config, machine.world_size, speed, saving, tokens=tokens, failures=failures, price_per_gpu_hour=wanted.gpu_hour_price)


def _in_days(config: Config, machine: Cluster, costs: Budget, wanted: Wanted) -> tuple[dict[str, Any] | None, list[str]]:
    """What the asked number of days gives: tokens on these GPUs, and GPUs for the target."""
    if wanted.days is None:
        return None, []
    per_node = machine.gpus_per_node

    def on(gpus: int) -> Budget:
        some = replace(machine, nodes=max(gpus // per_node, 1), gpus_per_node=min(gpus, per_node))
        return _budget(config, some, estimate(config, some), wanted)

    trained = tokens_in(wanted.days, costs)
    lines = [f"in {wanted.days:g} days: {count(trained)} tokens on these GPUs"]
    try:
        needed = gpus_for(config, costs.tokens, wanted.days, on, per_node)
    except ConfigError as none:
        return {"days": wanted.days, "tokens": trained, "gpus": None}, [*lines, *none.problems]
    how = f"{needed.seconds / DAY_SECONDS:.1f} days at {needed.tokens_per_gpu_second:,.0f} tokens per GPU and second"
    lines.append(f"{count(costs.tokens)} tokens in {wanted.days:g} days: {needed.gpus:,} GPUs of this kind ({how})")
    return {"days": wanted.days, "tokens": trained, "gpus": needed.gpus}, lines


def _dense_parameters(config: Config) -> int:
    """Of the dense model with the same layers, of which the experts are copies."""
    return count_parameters(config.model_copy(update={"moe": None})).active


def _written(found: SearchResult, wanted: Wanted) -> list[str]:
    if wanted.write is None or not found.plans:
        return []
    Path(wanted.write).write_text(plan_yaml(found.plans[0]), encoding="utf-8")
    return [f"the first one's settings are in {wanted.write}; the trainer runs them as they are"]


def _page(foreseen: Estimate, title: str, text: str) -> str:
    """The plan as one HTML page that loads nothing."""
    body = "body { margin: 24px; font-family: system-ui, sans-serif; color-scheme: light dark; } pre { font-size: 13px; white-space: pre-wrap; }"
    picture = gantt.svg(foreseen.timeline, foreseen.pieces, title=title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{gantt.STYLE}{body}</style></head>\n<body>{picture}<pre>{escape(text)}</pre></body></html>\n"
    )
