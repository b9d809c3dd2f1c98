"""Puts a report together: reads the runs, draws what they have data for, and writes one page and its PNGs.

One run gets the whole treatment (`single_page.py`); several are drawn over each other (`comparison_page.py`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_skywork.errors import ConfigError
from megatron_skywork.report import page
from megatron_skywork.report.findings import findings
from megatron_skywork.report.key_figures import key_figures
from megatron_skywork.report.load import find_summary, load_run
from megatron_skywork.report.prediction import Comparison, compare, comparison_record
from megatron_skywork.report.variants import run_names

if TYPE_CHECKING:
    from megatron_skywork.report.style import Plot


@dataclass(frozen=True)
class Report:
    """What was written."""

    path: Path
    figures: list[Path]
    runs: list[dict[str, Any]]
    """Per run: name, folder, key_figures, findings, prediction; plain values, ready for JSON."""
    comparisons: list[Comparison]
    """Per run: what was foreseen of it, beside what it measured."""


def build_report(
    run_dirs: Sequence[str | Path], out: str | Path | None = None, summary: Mapping[str, Any] | None = None, cluster: str | None = None
) -> Report:
    """Write the report of one run, or of several compared.

    Args:
        run_dirs: folders with metrics.jsonl.
        out: the HTML file; unset means `report.html` in the run's folder, or `comparison.html` in the first one's for several. The PNGs go to a folder of the
            same name without suffix.
        summary: a demonstration's summary; unset means summary.json in the run's folder or the one above, if it is there.
        cluster: file or name of the cluster that the runs ran on, for what the planner foresees; unset means the device's name decides.

    Raises:
        DataError: a folder is not there, or has no step recorded.
        ConfigError: matplotlib is not installed, no folder was given, or the cluster cannot be that of the runs.
    """
    if not run_dirs:
        raise ConfigError("report: no run folder given")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the report needs matplotlib, which is not installed; pip install 'megatron_skywork[plot]'")
    runs = [load_run(folder, name) for folder, name in zip(run_dirs, run_names(run_dirs), strict=True)]
    path = Path(out) if out is not None else runs[0].folder / ("report.html" if len(runs) == 1 else "comparison.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {path}: give a file that ends in .html")
    if summary is None:
        summary = find_summary(runs[0].folder)
    comparisons = [compare(run, cluster) for run in runs]
    # These draw, and matplotlib is an extra.
    from megatron_skywork.report.comparison_page import comparison_page
    from megatron_skywork.report.single_page import single_page

    title, body, plots = single_page(runs[0], summary, comparisons[0]) if len(runs) == 1 else comparison_page(runs, summary)
    figures = _write_plots(path.with_suffix(""), plots)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    _write(path, page.document(title, f"{body}\n<footer>Made by megatron_skywork on {made} from metrics.jsonl.</footer>").encode())
    described = [
        {"name": run.name, "folder": str(run.folder), "key_figures": asdict(key_figures(run)), "findings": [asdict(f) for f in findings(run)],
         "prediction": comparison_record(comparison)}
        for run, comparison in zip(runs, comparisons, strict=True)
    ]  # fmt: skip
    return Report(path, figures, described, comparisons)


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
