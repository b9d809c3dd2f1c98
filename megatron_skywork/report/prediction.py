"""What the planner foresees of a run beside what the run measured: memory of a rank, seconds of a step, tokens, MFU, bubble.

The run's header has its settings, its number of ranks and its device. Memory is foreseen from the settings alone; speed needs the machine's rates: a cluster
file, or, on one node, the figures that come with the package for the device's name. Measured are medians over the records after the first, whose step may have
had to compile; memory is the largest peak. A run that went on with other settings is compared up to where it changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from pydantic import ValidationError

from megatron_skywork.config.load import check_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.wording import gibibytes, percent
from megatron_skywork.plan.describe_estimate import part_of
from megatron_skywork.plan.estimate import estimate
from megatron_skywork.plan.hardware import Cluster, load_cluster, one_node, packaged_gpu
from megatron_skywork.plan.memory import StageMemory, stage_memory
from megatron_skywork.report.load import Run

CPU = "cpu"
# Changes of the header under these names are another run to a planner.
_PLANNED = (
    "world_size", "device", "config.model.", "config.moe.", "config.parallel.", "config.data.seq_length", "config.optim.moments", "config.megatron.",
    "config.train.global_batch_size", "config.train.micro_batch_size", "config.train.precision", "config.train.keep_logits",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        unit: seconds, bytes, share or tokens.
        predicted, measured: None where there is none.
    """

    name: str
    unit: str
    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted, where both are there."""
        return self.measured / self.predicted if self.measured and self.predicted else None


@dataclass(frozen=True)
class Comparison:
    """Rows, and sentences on what they rest on or why there are none."""

    rows: list[Row]
    notes: list[str]


def compare(run: Run, cluster: str | None = None) -> Comparison:
    """Prediction and measurement of one run.

    Args:
        cluster: a cluster's file or name, for `load_cluster`; None: the device's name decides.

    Raises:
        ConfigError: there is no such cluster, or it is smaller than the run.
    """
    given = None if cluster is None else load_cluster(cluster)
    world_size, device = run.header.get("world_size"), str(run.header.get("device") or "")
    config = _config(run, world_size)
    if config is None or not isinstance(world_size, int):
        return Comparison([], ["The run's header holds no settings that this version of the planner reads, so nothing is foreseen."])
    last, notes = _until_change(run)
    rows, said = _speed(run, config, world_size, device, given, last)
    memory, more = _memory(run, config, world_size, device, last)
    return Comparison([*rows, *memory], [*said, *more, *notes])


def _config(run: Run, world_size: Any) -> Config | None:
    try:
        config = Config.model_validate(run.header.get("config"))
        check_config(config, world_size if isinstance(world_size, int) else None)
    except (ValidationError, ConfigError):
        return None
    return config


def _until_change(run: Run) -> tuple[int, list[str]]:
    """The last step with the header's settings."""
    for event in run.events:
        if event.get("event") == "header_changed" and isinstance(event.get("step"), int):
            changed = [name for name in event.get("changed") or {} if name.startswith(_PLANNED)]
            if changed:
                return event["step"], [f"Measured up to step {event['step']}; after it the run went on with other settings ({', '.join(changed[:3])})."]
    return int(run.steps_S[-1]), []


def _median(run: Run, name: str, last: int) -> float | None:
    values = run.series(name)[run.steps_S <= last]
    values = values[1:] if len(values) > 1 else values
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _largest(run: Run, name: str, last: int) -> float | None:
    known = run.series(name)[run.steps_S <= last]
    known = known[np.isfinite(known)]
    return float(known.max()) if len(known) else None


# ------------------------------------------------------------------------------------------------------------------------------ speed


def _speed(run: Run, config: Config, world_size: int, device: str, given: Cluster | None, last: int) -> tuple[list[Row], list[str]]:
    step, tokens = _median(run, "seconds.step", last), _median(run, "tokens_per_second", last)
    bubble = _median(run, "pipeline.bubble", last)
    measured = [("Step", "seconds", step), ("Tokens per GPU and second", "tokens", None if tokens is None else tokens / world_size)]
    measured += [("MFU", "share", _median(run, "mfu", last))]
    if config.parallel.pp > 1:
        measured += [("Bubble", "share", bubble)]
    rows = [Row(name, unit, None, value) for name, unit, value in measured if value is not None]
    cluster = part_of(given, world_size) if given is not None else _node_of(config, world_size, device)
    if cluster is None:
        where = "this machine" if device == CPU else f"{device or 'the device'}{'' if world_size <= config.parallel.gpus_per_node else ' and its network'}"
        return rows, [f"Speed is not foreseen: the planner has no rates of {where}. On it, python tools/calibrate.py --write FILE measures them; then "
                      "python tools/report.py RUN_DIR --cluster FILE."]  # fmt: skip
    try:
        foreseen = estimate(config, cluster)
    except ConfigError as refused:
        return rows, [f"Speed is not foreseen on {cluster.name}: {refused}"]
    predicted = {"Step": foreseen.step_seconds, "Tokens per GPU and second": foreseen.tokens_per_gpu_second, "MFU": foreseen.mfu, "Bubble": foreseen.bubble}
    rows = [Row(name, unit, predicted[name], value) for name, unit, value in measured]
    rates = cluster.rates.source or "measured there"
    notes = [f"Speed is foreseen for {cluster.name} ({cluster.gpu.name}; rates: {rates}), with experts that get equally many tokens."]
    known = packaged_gpu(device)
    if cluster.gpu.name not in (device, known.name if known else device):
        notes.insert(0, f"The run's device is {device or 'not recorded'}, the cluster's {cluster.gpu.name}: two machines are compared.")
    if config.parallel.pp > 1:
        notes.append("Bubble: the share of the pipeline's time in which a stage waits for others, mean over stages"
                     + ("." if bubble is not None else "; this run did not record it."))  # fmt: skip
    return rows, notes


def _node_of(config: Config, world_size: int, device: str) -> Cluster | None:
    """The device by its name, where its own links are all there is to cross."""
    return one_node(device, world_size) if device and world_size <= config.parallel.gpus_per_node else None


# ------------------------------------------------------------------------------------------------------------------------------ memory


def _memory(run: Run, config: Config, world_size: int, device: str, last: int) -> tuple[list[Row], list[str]]:
    stages = stage_memory(config, world_size)
    if len(stages) == 1:
        measured = [_largest(run, "memory_bytes", last)]
    else:
        measured = [_largest(run, f"pipeline.memory_bytes.{stage}", last) for stage in range(len(stages))]
    if device == CPU:
        resident = _largest(run, "memory_bytes", last)
        rows = [Row(_name(number, len(stages)), "bytes", float(stage.allocated), None) for number, stage in enumerate(stages, start=1)]
        seen = f" (here {gibibytes(resident)})" if resident else ""
        return rows, [f"Memory is foreseen for a GPU. What a CPU records is the whole process's resident set{seen}, libraries included: no measurement of it."]
    rows = [Row(_name(number, len(stages)), "bytes", float(stage.allocated), peak)
            for number, (stage, peak) in enumerate(zip(stages, measured, strict=True), start=1)]  # fmt: skip
    return rows, [_memory_note(stages)]


def _name(stage: int, stages: int) -> str:
    return "Peak memory of a rank" if stages == 1 else f"Peak memory of a rank, stage {stage}"


def _memory_note(stages: list[StageMemory]) -> str:
    slack = max(stage.fragmentation for stage in stages)
    return f"Memory is what torch's allocator has given out, with a balanced router; a plan leaves up to {gibibytes(slack)} more for what it cannot use."


# ------------------------------------------------------------------------------------------------------------------------------ shown


def shown(value: float | None, unit: str) -> str:
    """A figure in words."""
    if value is None:
        return "–"
    if unit == "seconds":
        return f"{value:.3g} s"
    return {"bytes": gibibytes, "share": percent}[unit](value) if unit in ("bytes", "share") else f"{value:,.0f}"


def _texts(row: Row) -> tuple[str, str, str, str]:
    return row.name, shown(row.predicted, row.unit), shown(row.measured, row.unit), "–" if row.ratio is None else f"{row.ratio:.3f}"


HEADINGS = ("", "predicted", "measured", "measured / predicted")


def comparison_lines(comparison: Comparison) -> list[str]:
    """The table for a terminal."""
    table = [HEADINGS, *map(_texts, comparison.rows)] if comparison.rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]) for row in table]
    return [*lines, *comparison.notes]


def comparison_section(comparison: Comparison) -> str:
    """The table as HTML."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in _texts(row)) + "</tr>" for row in comparison.rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if comparison.rows else ""
    notes = f'<p class="caption after">{escape(" ".join(comparison.notes))}</p>' if comparison.notes else ""
    return f'<div class="card scroll" id="prediction">{table}{notes}</div>'


def comparison_record(comparison: Comparison) -> Mapping[str, Any]:
    """The same for JSON."""
    return {"rows": [{**vars(row), "ratio": row.ratio} for row in comparison.rows], "notes": comparison.notes}
