"""Puts a report together: reads the runs, draws what they have data for, and writes one page and its PNGs.

One run gets the whole treatment. Several runs are drawn over each other, and what cannot be (the load of every expert, the table of layers) follows run by run.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_skywork.errors import ConfigError
from megatron_skywork.report import page
from megatron_skywork.report.findings import findings, key_figures
from megatron_skywork.report.load import Run, find_summary, load_run
from megatron_skywork.report.summary import summary_section

if TYPE_CHECKING:
    from megatron_skywork.report.style import Plot


_NAMES_THAT_SAY_NOTHING = {"run", "train", "default", "output"}


@dataclass(frozen=True)
class Report:
    """What was written."""

    path: Path
    figures: list[Path]
    runs: list[dict[str, Any]]
    """Per run: name, folder, key_figures, findings; plain values, ready for JSON."""


def build_report(run_dirs: Sequence[str | Path], out: str | Path | None = None, summary: Mapping[str, Any] | None = None) -> Report:
    """Write the report of one run, or of several compared.

    Args:
        run_dirs: folders with metrics.jsonl.
        out: the HTML file; unset means `report.html` in the run's folder, or `comparison.html` in the first one's for several. The PNGs go to a folder of the
            same name without suffix.
        summary: a demonstration's summary; unset means summary.json in the run's folder or the one above, if it is there.

    Raises:
        DataError: a folder is not there, or has no step recorded.
        ConfigError: matplotlib is not installed, or no folder was given.
    """
    if not run_dirs:
        raise ConfigError("report: no run folder given")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the report needs matplotlib, which is not installed; pip install 'megatron_skywork[plot]'")
    runs = [load_run(folder, name) for folder, name in zip(run_dirs, _names(run_dirs), strict=True)]
    path = Path(out) if out is not None else runs[0].folder / ("report.html" if len(runs) == 1 else "comparison.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {path}: give a file that ends in .html")
    if summary is None:
        summary = find_summary(runs[0].folder)
    title, body, plots = _single(runs[0], summary) if len(runs) == 1 else _comparison(runs, summary)
    figures = _write_plots(path.with_suffix(""), plots)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    _write(path, page.document(title, f"{body}\n<footer>Made by megatron_skywork on {made} from metrics.jsonl.</footer>").encode())
    described = [
        {"name": run.name, "folder": str(run.folder), "key_figures": asdict(key_figures(run)), "findings": [asdict(f) for f in findings(run)]} for run in runs
    ]
    return Report(path, figures, described)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names; with the folder above where a name is shared or says nothing, and then a number."""
    paths = [Path(folder).resolve() for folder in folders]
    alike = Counter(path.name for path in paths)
    names = [path.name if alike[path.name] == 1 and path.name not in _NAMES_THAT_SAY_NOTHING else f"{path.parent.name}/{path.name}" for path in paths]
    return [name if names.count(name) == 1 else f"{name} ({names[:index].count(name) + 1})" for index, name in enumerate(names)]


def _single(run: Run, summary: Mapping[str, Any] | None) -> tuple[str, str, list[Plot]]:
    from megatron_skywork.report import router_plots, training_plots

    training = training_plots.training_plots([run])
    routers = [plot for plot in (router_plots.load_plot(run), router_plots.balance_over_time([run])) if plot is not None]
    routers += [*router_plots.drop_plots([run]), *router_plots.sharpness_plots([run])]
    parts = [page.header(run)]
    if summary:
        parts.append(summary_section(summary))
    parts += [
        page.tiles(key_figures(run), run.window),
        "<h2>What the numbers say</h2>",
        page.finding_list(findings(run)),
        "<h2>Training</h2>",
        page.plot_grid(training),
    ]
    if run.router is not None:
        parts += ["<h2>Experts and routers</h2>", page.plot_grid(routers), "<h2>Layers at the end of the run</h2>", page.layer_table(run.router)]
    parts.append(_settings(run))
    return f"{run.name}: run report", "\n".join(parts), [*training, *routers]


def _comparison(runs: Sequence[Run], summary: Mapping[str, Any] | None) -> tuple[str, str, list[Plot]]:
    from megatron_skywork.report import router_plots, training_plots
    from megatron_skywork.report.style import CYCLE

    training = training_plots.training_plots(runs)
    balance = router_plots.balance_over_time(runs)
    routers = [*([balance] if balance else []), *router_plots.sharpness_plots(runs), *router_plots.drop_plots(runs)]
    names = ", ".join(run.name for run in runs)
    colors = [CYCLE[index % len(CYCLE)] for index in range(len(runs))]
    figures = [key_figures(run) for run in runs]
    parts = [f'<p class="eyebrow">{len(runs)} runs compared</p><div class="title"><h1>{escape(names)}</h1></div>']
    if summary:
        parts.append(summary_section(summary))
    parts += ["<h2>Key figures</h2>", page.comparison_table(runs, figures, colors), "<h2>Training</h2>", page.plot_grid(training)]
    if routers:
        parts += ["<h2>Routers</h2>", page.plot_grid(routers)]
    plots = [*training, *routers]
    for number, run in enumerate(runs, start=1):
        parts += [f"<h2>{escape(run.name)}</h2>", page.pairs(page.facts(run), "facts"), page.finding_list(findings(run))]
        load = router_plots.load_plot(run, key=f"expert_load_{number}")
        if load is not None and run.router is not None:
            table = f"<details><summary>Layers at the end of the run</summary>{page.layer_table(run.router)}</details>"
            parts += [page.plot_grid([load]), table]
            plots.append(load)
        parts.append(_settings(run, heading=False))
    return f"{len(runs)} runs compared", "\n".join(parts), plots


def _settings(run: Run, heading: bool = True) -> str:
    """How the speed figures were made, and the configuration."""
    formulas = run.header.get("formulas")
    shown = f'<div class="card">{page.pairs(formulas)}</div>' if isinstance(formulas, Mapping) and formulas else ""
    if not heading:
        return page.config_details(run)
    return (f"<h2>How the speed is computed</h2>{shown}" if shown else "") + page.config_details(run)


def _write_plots(folder: Path, plots: Sequence[Plot]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in plots:
        target = folder / f"{plot.key}.png"
        _write(target, plot.png)
        written.append(target)
    return written


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, so that a browser never shows half a page."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
