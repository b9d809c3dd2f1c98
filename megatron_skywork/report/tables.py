"""The report's tables: the layers of one run; of several, the key figures with the best marked, and the settings that differ.

Every text that comes from a run is escaped where it enters a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from megatron_skywork.report.key_figures import Cell, Column, KeyFigures, cells
from megatron_skywork.report.router_records import DEAD_BELOW, Router
from megatron_skywork.report.variants import Variant

# More variants than this are rows of the table of settings, and the settings its columns.
_MAX_VARIANTS_ACROSS = 6
_DASH_NAMES = ("solid", "dashed", "dotted")


def layer_table(router: Router) -> str:
    """Every layer's numbers at the end of the run; columns that were not recorded are left out."""
    relative_LE = router.relative_load_LE
    series = router.per_layer

    def at_end(name: str) -> np.ndarray:
        return router.at_end(series[name])

    found: list[tuple[str, np.ndarray, str, bool]] = [
        ("load max / mean", at_end("load_max_over_mean"), "{:.2f}", True),
        ("load CV", at_end("load_variation"), "{:.2f}", True),
        ("least expert", relative_LE.min(axis=1), "{:.2f}", False),
        ("dead", (relative_LE < DEAD_BELOW).sum(axis=1).astype(float), "{:.0f}", True),
        ("drop rate", 100 * at_end("drop_rate"), "{:.2f} %", True),
        ("coefficient", at_end("coefficient"), "{:.5f}", False),
        ("aux. loss", at_end("aux_loss"), "{:.5f}", False),
        ("entropy / log E", router.at_end(router.entropy_SL), "{:.3f}", False),
        ("Max1 / Max2", at_end("max1_over_max2"), "{:.2f}", False),
        ("Max2 / Max3", at_end("max2_over_max3"), "{:.2f}", False),
    ]
    if router.evaluations is not None:
        known = np.isfinite(router.evaluations.similarity_VL).any(axis=1)
        if known.any():
            found.append(("similarity", router.evaluations.similarity_VL[known][-1], "{:.3f}", False))
    found = [column for column in found if np.isfinite(column[1]).any()]
    head = "<th>layer</th>" + "".join(f"<th>{escape(name)}</th>" for name, *_ in found)
    rows = []
    for index, layer in enumerate(router.layers):
        cells_of = "".join(_layer_cell(values_L, index, form, tinted) for _, values_L, form, tinted in found)
        rows.append(f"<tr><td>{layer}</td>{cells_of}</tr>")
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _layer_cell(values_L: np.ndarray, index: int, form: str, tinted: bool) -> str:
    value = values_L[index]
    if not math.isfinite(value):
        return "<td>–</td>"
    low, high = float(np.nanmin(values_L)), float(np.nanmax(values_L))
    # A tint only says which layers stand out, so there is none where all are alike.
    if not tinted or high - low <= 0.02 * max(abs(high), 1e-12):
        return f"<td>{form.format(value)}</td>"
    return f'<td class="heat" style="--amount:{0.42 * (value - low) / (high - low):.3f}">{form.format(value)}</td>'


def key(color: str, dashes: int) -> str:
    """A line's sample: its colour, and solid, dashed or dotted."""
    return f'<span class="key" style="border-top-color:{color};border-top-style:{_DASH_NAMES[dashes]}"></span>'


def color_keys(found: Sequence[Variant], looks: Sequence[tuple[str, int]]) -> str:
    """Which line is which, for plots that are too small for a legend."""
    shown = "".join(f"<span>{key(*look)}{escape(variant.label)}</span>" for variant, look in zip(found, looks, strict=True))
    return f'<div class="keys">{shown}</div>'


def comparison_table(found: Sequence[Variant], columns: Sequence[Column], figures: Mapping[str, KeyFigures], looks: Sequence[tuple[str, int]]) -> str:
    """Key figures, a row per variant: mean over its runs and their range; the best value of a column is marked.

    Args:
        figures: of every run, by the run's name.
    """
    by_column = [cells(column, found, figures) for column in columns]
    lengths = [_steps(variant, figures) for variant in found]
    alike = len(set(lengths)) == 1
    titles = "".join(f'<th title="{escape(column.meaning)}">{escape(column.name)}</th>' for column in columns)
    head = f"<th>run</th>{'' if alike else '<th>steps</th>'}{titles}"
    rows = []
    for index, (variant, look) in enumerate(zip(found, looks, strict=True)):
        shown = "".join(_figure_cell(column, cells_of[index]) for column, cells_of in zip(columns, by_column, strict=True))
        steps = "" if alike else f"<td>{lengths[index]}</td>"
        rows.append(f"<tr><td>{key(*look)}{escape(variant.name)}{_state(variant)}</td>{steps}{shown}</tr>")
    words = "; ".join(f"{column.name}: {column.meaning}" for column in columns)
    marks = (
        f"{lengths[0]} steps each. "
        if alike
        else "Not all are equally long, so figures at their ends are not those of equal training; marks are for the longest. "
    )
    marks += "Star: best of its column. "
    if any(len(variant.runs) > 1 for variant in found):
        marks += "≈: its range over seeds overlaps the best one's, so these runs do not tell them apart. Small: ± half the range over seeds. "
    note = f'<p class="caption after">{escape(marks + words)}.</p>'
    return f'<div class="card scroll"><table class="compare"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _steps(variant: Variant, figures: Mapping[str, KeyFigures]) -> str:
    steps = sorted({figures[run.name].steps for run in variant.runs})
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}–{steps[-1]:,}"


def _state(variant: Variant) -> str:
    """How many runs it is, and the status of those that are not finished."""
    states = sorted({str(run.status.get("status") or run.status.get("state") or "") for run in variant.runs} - {"", "done", "finished"})
    shown = [variant.label.removeprefix(variant.name).strip(" ()")] * (len(variant.runs) > 1) + states
    return f"<small>{escape(', '.join(shown))}</small>" if shown else ""


def _figure_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return "<td>–</td>"
    value = escape(column.show(cell.mean))
    sign = {"best": " ★", "tie": " ≈", "": ""}[cell.mark]
    half = column.show((cell.high - cell.low) / 2)
    between = f"{column.show(cell.low)} to {column.show(cell.high)}"
    spread = f'<small title="{escape(between)}">± {escape(half)}</small>' if half != column.show(0.0) else ""
    return f'<td class="{cell.mark}">{value}{sign}{spread}</td>'


def settings_table(found: Sequence[Variant], rows: Mapping[str, Sequence[str]]) -> str:
    """Only the settings that differ; variants across where there are few, else downwards."""
    if not rows:
        return '<p class="caption">No setting differs but the folder.</p>'
    names = [variant.name for variant in found]
    if len(found) <= _MAX_VARIANTS_ACROSS:
        head, lines = ["setting", *names], [[setting, *values] for setting, values in rows.items()]
    else:
        head, lines = ["run", *rows], [[name, *(values[index] for values in rows.values())] for index, name in enumerate(names)]
    # Dotted names may be broken after a dot.
    titles = "".join(f"<th>{escape(name).replace('.', '.<wbr>')}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in line) + "</tr>" for line in lines)
    return f'<div class="card scroll"><table class="settings"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
