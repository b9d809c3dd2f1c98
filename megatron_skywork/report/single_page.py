"""The page of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_skywork.report import page
from megatron_skywork.report.drop_plots import drop_plots
from megatron_skywork.report.findings import findings
from megatron_skywork.report.gate_plots import depth_plot, expert_plots, gate_plots
from megatron_skywork.report.key_figures import key_figures
from megatron_skywork.report.load import Run
from megatron_skywork.report.load_plots import load_plots
from megatron_skywork.report.prediction import Comparison, comparison_section
from megatron_skywork.report.style import Plot
from megatron_skywork.report.summary import summary_section
from megatron_skywork.report.tables import layer_table
from megatron_skywork.report.training_plots import training_plots


def single_page(run: Run, summary: Mapping[str, Any] | None, comparison: Comparison) -> tuple[str, str, list[Plot]]:
    """Title, body and plots of the report of one run.

    Args:
        comparison: what was foreseen of it, beside what it measured.
    """
    depth = depth_plot(run)
    sections = {
        "Training": training_plots(run),
        "Who gets the tokens": load_plots(run),
        "What is dropped": drop_plots(run),
        "How sure the gates are": gate_plots(run),
        "What becomes of the experts": expert_plots(run),
    }
    parts = [page.header(run)]
    if summary:
        parts.append(summary_section(summary))
    parts += [page.tiles(key_figures(run), run.window), "<h2>What the numbers say</h2>", page.finding_list(findings(run))]
    for heading, plots in sections.items():
        if plots:
            parts += [f"<h2>{heading}</h2>", page.plot_grid(plots)]
    if run.router is not None:
        parts += ["<h2>Layers at the end of the run</h2>", page.plot_grid([depth]) if depth else "", f'<div class="after">{layer_table(run.router)}</div>']
    if comparison.rows:
        parts += ["<h2>Predicted and measured</h2>", comparison_section(comparison)]
    formulas = run.header.get("formulas")
    if isinstance(formulas, Mapping) and formulas:
        parts.append(f'<h2>How the speed is computed</h2><div class="card">{page.pairs(formulas)}</div>')
    parts.append(page.config_details(run))
    drawn = [plot for plots in sections.values() for plot in plots] + ([depth] if depth else [])
    return f"{run.name}: run report", "\n".join(parts), drawn
