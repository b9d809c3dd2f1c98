"""The page of several runs: key figures and what differs first, then curves over each other, then every run by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_skywork.report import page
from megatron_skywork.report.comparison_plots import glance_plot, look, router_comparison, training_comparison
from megatron_skywork.report.findings import findings
from megatron_skywork.report.key_figures import columns, key_figures
from megatron_skywork.report.load import Run
from megatron_skywork.report.load_plots import load_at_end
from megatron_skywork.report.style import DASHES, Plot
from megatron_skywork.report.summary import summary_section
from megatron_skywork.report.tables import color_keys, comparison_table, layer_table, settings_table
from megatron_skywork.report.variants import Variant, differing_settings, variants

# More runs than this are folded, and their heatmaps left to the one that compares them.
_MAX_RUNS_SHOWN = 6


def comparison_page(runs: Sequence[Run], summary: Mapping[str, Any] | None) -> tuple[str, str, list[Plot]]:
    """Title, body and plots of the report of several runs."""
    found = variants(runs)
    figures = {run.name: key_figures(run) for run in runs}
    shown = columns([figures[run.name] for run in runs])
    looks = [(look(index)[0], DASHES.index(look(index)[1])) for index in range(len(found))]
    keys = color_keys(found, looks)
    glance = glance_plot(found, shown, figures)
    training, routers = training_comparison(found), router_comparison(found)
    parts = [_header(runs, found)]
    if summary:
        parts.append(summary_section(summary))
    parts += ["<h2>Key figures</h2>", comparison_table(found, shown, figures, looks)]
    if glance is not None:
        parts.append(f'<div class="after">{page.plot_grid([glance])}</div>')
    parts += ["<h2>What differs</h2>", settings_table(found, differing_settings(found)), "<h2>Training</h2>", keys, page.plot_grid(training)]
    if routers:
        parts += ["<h2>Routers</h2>", keys, page.plot_grid(routers)]
    plots = [*([glance] if glance else []), *training, *routers]
    parts.append("<h2>Run by run</h2>" if len(runs) > _MAX_RUNS_SHOWN else "")
    for number, run in enumerate(runs, start=1):
        section, drawn = _run_section(run, number, folded=len(runs) > _MAX_RUNS_SHOWN)
        parts.append(section)
        plots += drawn
    return f"{len(runs)} runs compared", "\n".join(parts), plots


def _header(runs: Sequence[Run], found: Sequence[Variant]) -> str:
    number = f"{len(runs)} runs compared" + (f", {len(found)} variants" if len(found) < len(runs) else "")
    named = len(found) <= _MAX_RUNS_SHOWN
    names = ", ".join(variant.name for variant in found) if named else number
    return f'<p class="eyebrow">{escape(number if named else "Comparison")}</p><div class="title"><h1>{escape(names)}</h1></div>'


def _run_section(run: Run, number: int, folded: bool) -> tuple[str, list[Plot]]:
    """Facts, findings, loads, layers and configuration of one run."""
    load = None if folded else load_at_end(run, key=f"expert_load_{number}")
    said = findings(run)
    parts = [page.pairs(page.facts(run), "facts"), page.finding_list(said)]
    if load is not None:
        parts.append(page.plot_grid([load]))
    if run.router is not None:
        parts.append(f"<details><summary>Layers at the end of the run</summary>{layer_table(run.router)}</details>")
    parts.append(page.config_details(run))
    body = "\n".join(parts)
    if folded:
        warnings = sum(finding.level == "warn" for finding in said)
        more = f' <span class="caption">{warnings} to watch</span>' if warnings else ""
        return f'<details class="card"><summary>{escape(run.name)}{more}</summary>{body}</details>', []
    return f"<h2>{escape(run.name)}</h2>{body}", [load] if load is not None else []
