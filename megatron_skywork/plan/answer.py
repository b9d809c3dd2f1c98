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
from megatron_skywork.plan.hardware import Cluster, load_cluster, node_size
from megatron_skywork.plan.layouts import layout_of
from megatron_skywork.plan.memory import room_bytes
from megatron_skywork.plan.nearest import Nearest, nearest, other_problems
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
MOST_NODES = 100_000


@dataclass(frozen=True)
class Wanted:
    """What is asked beyond the plan itself; see the options of tools/plan.py.

    Raises:
        ConfigError: options that contradict each other, or a value that cannot be.
    """

    what_if: str | None = None
    search: bool = False
    search_seconds: float = 120.0
    vary: tuple[str, ...] = ()
    write: str | None = None
    tokens: str | None = None
    days: float | None = None
    failures: str | None = None
    storage_gb_per_second: float | None = None
    gpu_hour_price: float | None = None
    dense_tokens: str | None = None
    html: str | None = None
    png: str | None = None

    def __post_init__(self) -> None:
        problems = [f"--vary={name}: cannot be varied; use {' or '.join(VARY)}" for name in self.vary if name not in VARY]
        problems += [f"{option} goes with --search" for option, given in (("--vary", self.vary), ("--write", self.write)) if given and not self.search]
        numbers = {"--search-seconds": self.search_seconds, "--days": self.days, "--storage": self.storage_gb_per_second}
        numbers["--gpu-hour-price"] = self.gpu_hour_price
        problems += [f"{option}={given:g}: must be a number above 0" for option, given in numbers.items() if given is not None and not 0 < given < math.inf]
        for option, path in (("--write", self.write), ("--html", self.html), ("--png", self.png)):
            if path is not None and (not path or Path(path).is_dir() or not Path(path).parent.is_dir()):
                problems.append(f"{option}={path}: is no name of a file in a folder that is there")
        if self.write and Path(self.write).is_file():
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
    if not cluster:
        raise ConfigError("--cluster is empty; name a cluster's file, or a machine such as dgx_h100:16")
    machine = load_cluster(cluster)
    if nodes is not None:
        if not 1 <= nodes <= MOST_NODES:
            raise ConfigError(f"--nodes={nodes}: must be 1 to {MOST_NODES}")
        machine = replace(machine, nodes=nodes)
    words = [*overrides, node_size(machine, overrides)]
    try:
        config = load_config(paths, words, machine.world_size)
    except ConfigError as error:
        return _without_own(error, paths, words, machine, wanted, progress)
    if wanted.dense_tokens is not None and config.moe is None:
        raise ConfigError("--dense-tokens is about a mixture of experts, and the settings have no section moe; leave it out, or add the section")
    draws = bool(wanted.html or wanted.png)
    foreseen = estimate(config, machine, keep_events=draws)
    record = describe(config, machine.world_size, machine)
    del record["config"]
    text = [f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in blocks(record, config)]

    def add(name: str, title: str, found: Any, lines: Sequence[str]) -> None:
        record[name] = found
        text.append(f"{title}\n" + "\n".join(f"  {line}" for line in lines))

    pipeline, sent = forecast.pipeline(config, foreseen), forecast.collectives(config, machine)
    add("pipeline", "Pipeline", pipeline, forecast.pipeline_lines(pipeline))
    drawn = foreseen
    if wanted.what_if is not None:
        drawn = estimate(config, machine, schedule=wanted.what_if, keep_events=draws)
        what_if = forecast.pipeline(config, drawn)
        add("what_if", f"What if: {wanted.what_if}, which the trainer does not run (its memory is not foreseen)", what_if, forecast.pipeline_lines(what_if))
    add("collectives", "Time of collectives in a step", sent, forecast.collective_lines(sent))
    if config.parallel.pp > 1:
        split = plan_of(layout_of(config), config, machine, room_bytes(machine), cuts=MOST_CUTS)
        lines = split_lines(split, foreseen.step_seconds, fits=record["memory"]["gpu"]["fits"])
        add("best_split", "The best split of these degrees", split and plan_record(split), lines)
    if config.moe is not None:
        layouts = expert_layouts(config, machine)
        add("expert_layouts", "Experts: over which ranks they are dealt", expert_record(layouts), expert_lines(layouts, room_bytes(machine)))
    add("budget", "Budget", *_budget_block(config, machine, foreseen, wanted))
    if wanted.dense_tokens is not None:
        target = record["batch"]["total_tokens"] if wanted.tokens is None else parse_tokens(wanted.tokens, "--tokens")
        advice = advise(parse_tokens(wanted.dense_tokens, "--dense-tokens"), target, _dense_parameters(config), count_parameters(config).active)
        add("advice", "Upcycle, or train from scratch", advice_record(advice), advice_lines(advice))
    record["passed"] = fits = record["memory"]["gpu"]["fits"]
    if not fits:
        near = _nearest(config, machine)
        found = nearest_record(near) if isinstance(near, Nearest) else None
        add("nearest", "It does not fit", found, [*near.reasons, *nearest_lines(near)] if isinstance(near, Nearest) else near)
    if wanted.search:
        add("search", "The best layouts", *_search_block(config, machine, wanted, progress))
    whole, title = "\n\n".join(text), f"{Path(config.run_dir).name or 'a run'} on {machine.name}"
    if wanted.html is not None:
        Path(wanted.html).write_text(_page(drawn, title, whole), encoding="utf-8")
    if wanted.png is not None:
        Path(wanted.png).write_bytes(gantt.png(drawn.timeline, drawn.pieces, title=title))
    return {**record, "text": [whole]}


def _without_own(
    error: ConfigError, paths: Sequence[str], overrides: Sequence[str], machine: Cluster, wanted: Wanted, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The answer where the given layout cannot run: the best layouts, if they are asked for.

    Raises:
        ConfigError: they are not, or other settings are wrong; with the nearest plan that works, if there is one.
    """
    try:
        possible = unchecked_config(paths, overrides)
    except ConfigError:
        raise error from None
    if not wanted.search or other_problems(possible, machine.world_size):
        near = _nearest(possible, machine)
        more = nearest_lines(near) if isinstance(near, Nearest) else near
        raise ConfigError([*error.problems, *(line for line in more if line not in error.problems)]) from None
    found, lines = _search_block(possible, machine, wanted, progress)
    text = "\n".join(["The given layout cannot run", *(f"  {problem}" for problem in error.problems), "", "The best layouts", *(f"  {line}" for line in lines)])
    return {"world_size": machine.world_size, "problems": error.problems, "search": found, "text": [text]}


def _search_block(config: Config, machine: Cluster, wanted: Wanted, progress: Callable[[str], None]) -> tuple[dict[str, Any], list[str]]:
    best = search(config, machine, vary=wanted.vary, progress=progress, most_seconds=wanted.search_seconds)
    return search_record(best), [*search_lines(best, layout_of(config)), *_written(best, wanted)]


def _nearest(config: Config, machine: Cluster) -> Nearest | list[str]:
    """The nearest plan, or why there is none."""
    try:
        return nearest(config, machine) or []
    except ConfigError as none:
        return none.problems


def _budget_block(config: Config, machine: Cluster, foreseen: Estimate, wanted: Wanted) -> tuple[dict[str, Any] | None, list[str]]:
    """The budget, or why there is none; wrong options are still errors."""
    if wanted.failures is not None:
        failure_rate(wanted.failures)
    if wanted.tokens is not None:
        parse_tokens(wanted.tokens, "--tokens")
    try:
        costs = _budget(config, machine, foreseen, wanted)
    except ConfigError as none:
        return None, none.problems
    in_days, said = _in_days(config, machine, costs, wanted)
    return {**budget_record(costs), "in_days": in_days}, [*budget_lines(costs), *said]


def _budget(config: Config, machine: Cluster, foreseen: Estimate, wanted: Wanted) -> Budget:
    tokens = None if wanted.tokens is None else parse_tokens(wanted.tokens, "--tokens")
    storage = wanted.storage_gb_per_second
    speed, saving = foreseen.tokens_per_gpu_second, save_cost(config, machine, None if storage is None else storage * 1e9)
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
