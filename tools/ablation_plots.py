"""Our curves beside the report's: the same quantity twice, measured here at the left, read off the report's figures at the right.

The axes are not shared: the report's model is hundreds of times larger and saw tens of thousands of times the tokens. What can be compared is the order
of the variants and the direction they move in.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablation_plan import ROOT

REPORT_CURVES = ROOT / "docs/report_curves.json"
# Variant -> its name in the report's figure 3.
IN_REPORT = {"no_norm": "no_norm", "lambda_0.5": "lambda0.5", "lambda_1": "lambda1"}
LABELS = {
    "no_norm": "no norm", "lambda_0.5": "λ = 0.5", "lambda_1": "λ = 1", "lambda_2": "λ = 2",
    "fixed_1e-2": "fixed 0.01", "fixed_1e-3": "fixed 0.001", "adaptive": "adaptive",
}  # fmt: skip
REPORT_SENSITIVITY = 0.2

Draw = Callable[[Any], None]
Runs = Sequence[dict[str, Any]]


def write_plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the results have runs for.

    Args:
        results: as `ablation_results.collect` gives them.
        folder: receives ablation_*.png.

    Returns:
        the files written.
    """
    report = json.loads(REPORT_CURVES.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key, left, right in figures(results, report):
        path = folder / f"ablation_{key}.png"
        path.write_bytes(side_by_side(left, right))
        written.append(path)
    return written


def figures(results: dict[str, Any], report: dict[str, Any]) -> list[tuple[str, Draw, Draw]]:
    """Name, what is drawn at the left, and at the right."""
    gates, coefficients = variants_of(results, "gate_norm"), variants_of(results, "coefficients")
    found: list[tuple[str, Draw, Draw]] = []
    if gates:
        for key, name, what, scale in (
            ("sharpness", "max1_over_max2_third", "Max1 / Max2, third MoE layer", 1.0),
            ("drop_rate", "drop_rate", "dropped, %", 100.0),
        ):
            curve = {"sharpness": "fig3_max1_over_max2", "drop_rate": "fig3_drop_rate"}[key]
            found.append((key, ours(gates, name, what, scale), theirs(report, curve, what, scale)))
        found.append(("loss", our_loss(gates), their_loss(report)))
    if coefficients:
        found.append(("coefficient", our_layers(coefficients), their_layers(report)))
        # Both of these are ours: what the coefficients did, and what came of it.
        course = ours(coefficients, "coefficient", "coefficient, mean over layers", 1.0)
        found.append(("adaptive", course, ours(coefficients, "drop_rate", "dropped, %", 100.0)))
    return found


def variants_of(results: dict[str, Any], key: str) -> dict[str, Runs]:
    """Variant -> its finished runs, of one comparison."""
    entries: list[dict[str, Any]] = next((group["variants"] for group in results["groups"] if group["key"] == key), [])
    found = {entry["variant"]: [run for run in results["runs"] if run["variant"] == entry["trained_as"]] for entry in entries}
    return {variant: runs for variant, runs in found.items() if runs}


def ours(variants: dict[str, Runs], name: str, what: str, scale: float) -> Draw:
    """Mean over seeds as a line, from the lowest to the highest seed as a band."""

    def draw(axes: Any) -> None:
        for color, (variant, runs) in zip(colors(), variants.items(), strict=False):
            tokens_P = over_runs(runs, "tokens")[0] / 1e6
            values_RP = scale * over_runs(runs, name)
            if np.isfinite(values_RP).any():
                axes.plot(tokens_P, values_RP.mean(axis=0), color=color, label=LABELS[variant])
                axes.fill_between(tokens_P, values_RP.min(axis=0), values_RP.max(axis=0), color=color, alpha=0.15, linewidth=0)
        finish(axes, f"here: {what}", "million tokens")

    return draw


def theirs(report: dict[str, Any], curve: str, what: str, scale: float) -> Draw:
    def draw(axes: Any) -> None:
        for color, (variant, name) in zip(colors(), IN_REPORT.items(), strict=False):
            points = report[f"{curve}/{name}"]
            axes.plot(points["tokens_B"], scale * np.array(points["value"]), color=color, label=LABELS[variant])
        finish(axes, f"report, fig. 3: {what}", "billion tokens")

    return draw


def our_loss(variants: dict[str, Runs]) -> Draw:
    """Training loss minus that of `no_norm` with the same seed."""

    def draw(axes: Any) -> None:
        reference = {run["seed"]: run for run in variants.get("no_norm", [])}
        for color, (variant, runs) in zip(colors(), variants.items(), strict=False):
            pairs = [(run, reference[run["seed"]]) for run in runs if run["seed"] in reference]
            if not pairs:
                continue
            tokens_P = over_runs([run for run, _ in pairs], "tokens")[0] / 1e6
            values_RP = over_runs([run for run, _ in pairs], "loss") - over_runs([other for _, other in pairs], "loss")
            axes.plot(tokens_P, values_RP.mean(axis=0), color=color, label=LABELS[variant])
            axes.fill_between(tokens_P, values_RP.min(axis=0), values_RP.max(axis=0), color=color, alpha=0.15, linewidth=0)
        finish(axes, "here: training loss − loss without norm", "million tokens")

    return draw


def their_loss(report: dict[str, Any]) -> Draw:
    def draw(axes: Any) -> None:
        reference = report["fig3_loss/no_norm"]
        for color, (variant, name) in zip(colors(), IN_REPORT.items(), strict=False):
            points = report[f"fig3_loss/{name}"]
            difference = np.array(points["value"]) - np.interp(points["tokens_B"], reference["tokens_B"], reference["value"])
            axes.plot(points["tokens_B"], difference, color=color, label=LABELS[variant])
        finish(axes, "report, fig. 3: training loss − loss without norm", "billion tokens")

    return draw


def our_layers(variants: dict[str, Runs]) -> Draw:
    """One mark per layer and seed, at the end of the run."""

    def draw(axes: Any) -> None:
        for color, (variant, runs) in zip(colors(), variants.items(), strict=False):
            drops = 100 * np.concatenate([run["layers"]["drop_rate"] for run in runs])
            axes.plot(drops, np.concatenate([run["layers"]["coefficient"] for run in runs]), "o", markersize=4, color=color, label=LABELS[variant])
        target_line(axes)
        finish(axes, "here: coefficient of a layer, at the end", "dropped in the layer, %")

    return draw


def their_layers(report: dict[str, Any]) -> Draw:
    def draw(axes: Any) -> None:
        measured = report["fig4_per_layer"]
        for color, layer, drops, coefficients in zip(colors(), measured["layers"], measured["drop"], measured["alpha"], strict=False):
            axes.plot(100 * np.array(drops), coefficients, "o", markersize=4, color=color, label=f"layer {layer}")
        target_line(axes)
        finish(axes, "report, fig. 4: coefficient of a layer, six windows", "dropped in the layer, %")

    return draw


def target_line(axes: Any) -> None:
    """Where adaptive coefficients come to rest: a fifth of the drop rate, at most 0.01."""
    right = max(axes.get_xlim()[1], 6.0)
    drops = np.array([0.0, 5.0, right])
    axes.plot(drops, np.minimum(REPORT_SENSITIVITY * drops / 100, 0.01), color="#9aa5b1", linewidth=1.0, zorder=0)
    axes.set_xlim(0, right)
    axes.set_ylim(bottom=0)


def over_runs(runs: Runs, name: str) -> np.ndarray:
    """A curve of every run, [R, P]; runs of one plan have the same points."""
    rows = [np.array([np.nan if value is None else value for value in run["curves"][name]], dtype=float) for run in runs]
    shortest = min(map(len, rows))
    return np.stack([row[:shortest] for row in rows])


def colors() -> Sequence[str]:
    from megatron_skywork.report.style import CYCLE

    return CYCLE


def finish(axes: Any, title: str, below: str) -> None:
    from megatron_skywork.report.style import MUTED

    axes.set_title(title, loc="left", fontsize=8.5, color=MUTED, pad=8)
    axes.set_xlabel(below)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", frameon=False, fontsize=8.5)


def side_by_side(left: Draw, right: Draw) -> bytes:
    """Two panels in the style of the run report as one PNG."""
    from matplotlib import image

    from megatron_skywork.report.style import panel, png

    pictures = []
    for draw in (left, right):
        canvas, axes = panel()
        draw(axes)
        pictures.append(image.imread(io.BytesIO(png(canvas))))
    joined = io.BytesIO()
    image.imsave(joined, np.hstack(pictures), format="png")
    return joined.getvalue()
