"""A run, or a variant, in a few numbers: the tiles of one run's page, and the table in which an ablation is read.

"At the end" is the last tenth of what was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_skywork.metrics import wording
from megatron_skywork.report.averages import nan_mean
from megatron_skywork.report.finding import cosine
from megatron_skywork.report.load import Run
from megatron_skywork.report.router_records import DEAD_BELOW, Router
from megatron_skywork.report.variants import Variant

# Runs at least this part as long as the longest are compared with it.
_AS_LONG = 0.9


@dataclass(frozen=True)
class KeyFigures:
    """A run in a few numbers; None where a run has no such thing. Router values are means over layers at the end."""

    steps: int
    tokens: float | None
    first_loss: float | None
    last_loss: float | None
    """Mean over the last tenth of the records."""
    validation: dict[str, tuple[float, float]]
    """Set -> first and last loss."""
    tokens_per_second: float | None
    tflops_per_device: float | None
    mfu: float | None
    data_wait_share: float | None
    """Median share of a step in which the device waits for data."""
    seconds: float | None
    drop_rate: float | None
    max_over_mean: float | None
    dead_experts: int | None
    num_experts: int | None
    """Of all layers together."""
    load_variation: float | None = None
    max1_over_max2: float | None = None
    max2_over_max3: float | None = None
    entropy: float | None = None
    """Over log(E)."""
    coefficient: float | None = None
    expert_similarity: float | None = None
    """At the last evaluation."""
    changed_experts: float | None = None
    """At the last evaluation."""


def key_figures(run: Run) -> KeyFigures:
    """The numbers of the tiles at the top of the page, and of `--json`."""
    loss = run.series("loss")
    validation = {}
    for name, (_, losses) in run.evaluations.items():
        known = losses[np.isfinite(losses)]
        if len(known):
            validation[name] = (float(known[0]), float(known[-1]))
    times = run.series("time")
    return KeyFigures(
        steps=int(run.steps_S[-1]),
        tokens=_or_none(run.series("tokens")[-1]),
        first_loss=_or_none(nan_mean(loss[: run.window])),
        last_loss=_or_none(nan_mean(loss[-run.window :])),
        validation=validation,
        tokens_per_second=_median(run.series("tokens_per_second")),
        tflops_per_device=_median(run.series("tflops_per_device")),
        mfu=_median(run.series("mfu")),
        data_wait_share=_median(run.series("data_wait_share")),
        seconds=_or_none(times[-1] - times[0]) if len(times) > 1 else None,
        **(_router_figures(run.router) if run.router else dict.fromkeys(("drop_rate", "max_over_mean", "dead_experts", "num_experts"))),
    )


def _router_figures(router: Router) -> dict[str, Any]:
    def at_end(values_SL: np.ndarray) -> float | None:
        return _or_none(nan_mean(router.at_end(values_SL)))

    series, evaluations = router.per_layer, router.evaluations
    figures = {name: at_end(series[name]) for name in ("drop_rate", "load_variation", "max1_over_max2", "max2_over_max3", "coefficient")}
    figures |= {"max_over_mean": at_end(series["load_max_over_mean"]), "entropy": at_end(router.entropy_SL)}
    figures |= {"expert_similarity": _last_mean(evaluations.similarity_VL) if evaluations else None}
    figures |= {"changed_experts": _last_mean(evaluations.changed_VL) if evaluations else None}
    return {**figures, "dead_experts": int((router.relative_load_LE < DEAD_BELOW).sum()), "num_experts": int(router.load_LE.size)}


def _last_mean(values_VL: np.ndarray) -> float | None:
    """Mean over layers at the last evaluation that has one."""
    known = np.isfinite(values_VL).any(axis=1)
    return _or_none(nan_mean(values_VL[known][-1])) if known.any() else None


def _or_none(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


@dataclass(frozen=True)
class Column:
    """One key figure of the comparison."""

    name: str
    of: Callable[[KeyFigures], float | None]
    show: Callable[[float], str]
    better: Literal["low", "high", None]
    """Which way is better, where that can be said."""
    meaning: str


@dataclass(frozen=True)
class Cell:
    """One variant's value: the mean over its runs, and their range where there are several."""

    mean: float
    low: float
    high: float
    runs: int
    mark: Literal["best", "tie", ""] = ""
    """`tie`: its range over seeds overlaps that of the best, so the runs do not tell them apart."""


def columns(figures: Sequence[KeyFigures]) -> list[Column]:
    """The columns that any of the runs has a value for."""
    sets = list(dict.fromkeys(name for figure in figures for name in figure.validation))

    def held_out(name: str) -> Callable[[KeyFigures], float | None]:
        return lambda figure: figure.validation[name][1] if name in figure.validation else None

    found = [
        Column("loss", lambda f: f.last_loss, "{:.4f}".format, "low", "training loss, mean of the last tenth of the steps"),
        *[Column("held-out" if len(sets) == 1 else f"held-out, {name}", held_out(name), "{:.4f}".format, "low", f"last evaluation on {name}") for name in sets],
        Column("dropped", lambda f: f.drop_rate, wording.percent, "low", "dropped over routed assignments"),
        Column("Max1/Max2", lambda f: f.max1_over_max2, "{:.2f}".format, "high", "sharpness of the first choice"),
        Column("Max2/Max3", lambda f: f.max2_over_max3, "{:.2f}".format, "high", "sharpness of the second choice"),
        Column("entropy", lambda f: f.entropy, "{:.3f}".format, "low", "of the gate, over log E; lower is surer"),
        Column("load CV", lambda f: f.load_variation, "{:.3f}".format, "low", "standard deviation of the load over its mean"),
        Column("dead", lambda f: f.dead_experts, _plain, "low", "experts below 1 % of the even share, of all layers"),
        Column("similarity", lambda f: f.expert_similarity, cosine, "low", "mean cosine between experts; lower is more specialized"),
        Column("coefficient", lambda f: f.coefficient, "{:.4f}".format, None, "of the auxiliary loss, mean over layers"),
        Column("tokens/s", lambda f: f.tokens_per_second, "{:,.0f}".format, "high", "median over the records"),
        Column("MFU", lambda f: f.mfu, wording.percent, "high", "median over the records"),
    ]
    return [column for column in found if any(column.of(figure) is not None for figure in figures)]


def _plain(value: float) -> str:
    return f"{value:g}" if value == int(value) else f"{value:.1f}"


def cells(column: Column, found: Sequence[Variant], figures: Mapping[str, KeyFigures]) -> list[Cell | None]:
    """A column over the variants, the best of the longest ones marked; nothing is marked where most are equally good or nothing is better.

    Args:
        figures: of every run, by the run's name.
    """
    row: list[Cell | None] = []
    for variant in found:
        values = [value for run in variant.runs if (value := column.of(figures[run.name])) is not None]
        row.append(Cell(sum(values) / len(values), min(values), max(values), len(values)) if values else None)
    steps = [max(figures[run.name].steps for run in variant.runs) for variant in found]
    # A run that has just begun, or a shorter one, is no match for the others.
    long = [count >= _AS_LONG * max(steps) for count in steps]
    known = [cell for cell, counts in zip(row, long, strict=True) if cell is not None and counts]
    if column.better is None or len(known) < 2 or len({column.show(cell.mean) for cell in known}) < 2:
        return row
    best = (min if column.better == "low" else max)(known, key=lambda cell: cell.mean)
    if sum(column.show(cell.mean) == column.show(best.mean) for cell in known) > len(known) / 2:
        return row  # most are best: the others stand out without stars
    return [cell if cell is None or not counts else _marked(cell, best, column) for cell, counts in zip(row, long, strict=True)]


def _marked(cell: Cell, best: Cell, column: Column) -> Cell:
    overlap = cell.runs > 1 and best.runs > 1 and cell.low <= best.high and cell.high >= best.low
    mark: Literal["best", "tie", ""] = "best" if column.show(cell.mean) == column.show(best.mean) else "tie" if overlap else ""
    return Cell(cell.mean, cell.low, cell.high, cell.runs, mark)
