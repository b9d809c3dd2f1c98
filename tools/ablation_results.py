"""What the ablation's runs have to say: figures per run, mean and spread over seeds, and differences between variants seed by seed.

With few seeds the spread over seeds is larger than most differences; but runs of one seed share their first weights and the order of the text, so the
difference is taken within each seed, and how many seeds agree on its sign is told beside it. Values at the end are means over the last tenth of the steps.

Shapes: S steps, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablation_plan import Group, Plan, PlannedRun
from megatron_skywork.errors import DataError
from megatron_skywork.metrics.jsonl import FILE_NAME, parse_line

LAST_SHARE = 0.1
CURVE_POINTS = 60
DEAD_BELOW = 0.01  # of the even share
THIRD_LAYER = 2  # the report plots the third MoE layer


@dataclass(frozen=True)
class Figure:
    """A measured quantity: how it is called, where its values come from in words, and how it is printed."""

    key: str
    label: str
    digits: int
    scale: float = 1.0


FIGURES = (
    Figure("training_loss", "training loss", 4),
    Figure("held_out_loss", "held-out loss", 4),
    Figure("max1_over_max2", "Max1/Max2", 3),
    Figure("max1_over_max2_third", "Max1/Max2, third layer", 3),
    Figure("max2_over_max3", "Max2/Max3", 3),
    Figure("max2_over_max3_third", "Max2/Max3, third layer", 3),
    Figure("drop_rate", "dropped, %", 2, 100.0),
    Figure("load_variation", "load: std / mean", 3),
    Figure("dead_experts", "dead experts", 1),
    Figure("coefficient", "coefficient", 5),
    Figure("expert_similarity", "expert similarity", 4),
    Figure("changed_experts", "tokens with other experts than at the evaluation before, %", 1, 100.0),
)
PER_LAYER = ("drop_rate", "coefficient", "max1_over_max2", "max2_over_max3", "load_variation", "aux_loss", "entropy")


def read_records(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step records and evaluations of a run, in order; a step done twice counts as done last, an evaluation as done first.

    The second evaluation of a step compares the routing with the first one's, or with none after a resume: it knows nothing of what changed since.

    Raises:
        DataError: no step is recorded.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    path = folder / FILE_NAME
    if path.is_file():
        with path.open("rb") as file:
            for record in filter(None, map(parse_line, file)):
                if record.get("kind") == "step":
                    steps[record["step"]] = record
                elif record.get("kind") == "eval":
                    evaluations.setdefault(record["step"], record)
    if not steps:
        raise DataError(f"{path}: no step is recorded there")
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]


def read_run(run: PlannedRun) -> dict[str, Any]:
    """A finished run as plain values: figures, layers at the end, and curves.

    Raises:
        DataError: there is nothing to read.
    """
    steps, evaluations = read_records(run.folder)
    last = steps[-max(1, round(LAST_SHARE * len(steps))) :]
    router = [step["router"] for step in last if step.get("router")]
    layers = {name: per_layer(router, name) for name in PER_LAYER}
    load_LE = np.mean([item["load"] for item in router], axis=0)
    if layers["load_variation"] is None:
        layers["load_variation"] = (load_LE.std(axis=1) / load_LE.mean(axis=1)).tolist()
    evaluated = (evaluations[-1].get("router") or {}) if evaluations else {}
    losses = evaluations[-1].get("losses") or {} if evaluations else {}
    figures = {
        "training_loss": mean([step["loss"] for step in last]),
        "held_out_loss": mean(list(losses.values())),
        "max1_over_max2": mean(layers["max1_over_max2"]),
        "max1_over_max2_third": third(layers["max1_over_max2"]),
        "max2_over_max3": mean(layers["max2_over_max3"]),
        "max2_over_max3_third": third(layers["max2_over_max3"]),
        "drop_rate": mean(layers["drop_rate"]),
        "load_variation": mean(layers["load_variation"]),
        "dead_experts": float((load_LE * load_LE.shape[1] < DEAD_BELOW).sum()),
        "coefficient": mean(layers["coefficient"]),
        "expert_similarity": mean(evaluated.get("expert_similarity")),
        "changed_experts": mean(evaluated.get("changed_experts")),
    }
    return {
        "variant": run.variant,
        "seed": run.seed,
        "folder": run.config.run_dir,
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "seconds_per_step": float(np.median([step["seconds"]["step"] for step in steps])),
        "figures": figures,
        "layers": layers,
        "curves": curves(steps),
        "held_out": [{"step": item["step"], "loss": mean(list((item.get("losses") or {}).values()))} for item in evaluations],
    }


def per_layer(router: Sequence[dict[str, Any]], name: str) -> list[float] | None:
    """Mean of a quantity over records, per layer; None where it was not recorded."""
    rows = [item[name] for item in router if item.get(name) is not None]
    return np.mean(np.array(rows, dtype=float), axis=0).tolist() if rows else None


def curves(steps: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """A run's course, in means over equal stretches of steps."""
    found: dict[str, list[float | None]] = {"tokens": [], "loss": [], "drop_rate": [], "max1_over_max2_third": [], "coefficient": []}
    for chunk in np.array_split(np.arange(len(steps)), min(CURVE_POINTS, len(steps))):
        records = [steps[index] for index in chunk]
        router = [record["router"] for record in records if record.get("router")]
        found["tokens"].append(mean([record["tokens"] for record in records]))
        found["loss"].append(mean([record["loss"] for record in records]))
        found["drop_rate"].append(mean(per_layer(router, "drop_rate")))
        found["max1_over_max2_third"].append(third(per_layer(router, "max1_over_max2")))
        found["coefficient"].append(mean(per_layer(router, "coefficient")))
    return found


def mean(values: Sequence[float | None] | None) -> float | None:
    known = [value for value in values or [] if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None


def third(values_L: Sequence[float] | None) -> float | None:
    """Of the third MoE layer; of the last one where there are fewer."""
    return None if not values_L else float(values_L[min(THIRD_LAYER, len(values_L) - 1)])


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean over seeds and standard deviation (n - 1; None for one seed)."""
    known = [value for value in values if value is not None]
    std = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": mean(known), "std": std, "seeds": len(known)}


def differences(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """Variant minus reference, seed by seed.

    Returns:
        mean, std, per_seed, and `agree`: seeds whose difference has the sign of the mean.
    """
    of_reference = {run["seed"]: run["figures"][key] for run in reference}
    pairs = {str(run["seed"]): (run["figures"][key], of_reference.get(run["seed"])) for run in runs}
    per_seed = {seed: value - other for seed, (value, other) in pairs.items() if value is not None and other is not None}
    found = spread(list(per_seed.values()))
    middle = found["mean"]
    agree = sum(value * middle > 0 for value in per_seed.values()) if middle is not None else 0
    return {**found, "per_seed": per_seed, "agree": agree}


def collect(plan: Plan) -> dict[str, Any]:
    """Everything about the finished runs of a plan; plain values, ready for JSON."""
    runs = [read_run(run) for run in plan.runs if run.status() == "done"]
    groups = [compare(group, plan, runs) for group in plan.groups()]
    missing = [run.name for run in plan.runs if run.status() != "done"]
    facts = [asdict(figure) for figure in FIGURES]
    return {"seeds": list(plan.seeds), "trained_as": plan.trained_as, "figures": facts, "groups": groups, "runs": runs, "missing": missing}


def compare(group: Group, plan: Plan, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One comparison: each variant's figures over seeds, and its differences from the reference."""
    by_variant = {variant: [run for run in runs if run["variant"] == plan.trained_as[variant]] for variant in group.variants}
    variants = []
    for variant, own in by_variant.items():
        figures = {figure.key: spread([run["figures"][figure.key] for run in own]) for figure in FIGURES}
        entry: dict[str, Any] = {"variant": variant, "trained_as": plan.trained_as[variant], "figures": figures}
        if variant != group.reference:
            entry["differences"] = {figure.key: differences(own, by_variant[group.reference], figure.key) for figure in FIGURES}
        variants.append(entry)
    return {"key": group.key, "title": group.title, "reference": group.reference, "variants": variants}


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    lines = ["# Ablation: results", ""]
    if results["runs"]:
        first = results["runs"][0]
        lines += [
            f"Seeds {', '.join(map(str, results['seeds']))}; {first['steps']} steps, {first['tokens'] / 1e6:.2f} million tokens a run. Values are means over "
            "the last tenth of the steps and over layers, ± the standard deviation over seeds; held-out loss, similarity and changed experts are those of the "
            "last evaluation.", "",
        ]
    if results["missing"]:
        lines += [f"Not finished, and not in the tables: {', '.join(results['missing'])}.", ""]
    for group in results["groups"]:
        caption = f"Difference from `{group['reference']}`, seed by seed (in brackets: seeds that agree on the sign):"
        lines += [f"## {group['title']}", "", *value_table(group), "", caption, "", *difference_table(group), ""]
    return "\n".join(lines)


def value_table(group: dict[str, Any]) -> list[str]:
    rows = [f"| | {' | '.join(entry['variant'] for entry in group['variants'])} |", f"| --- |{' ---: |' * len(group['variants'])}"]
    for figure in FIGURES:
        cells = [shown(entry["figures"][figure.key], figure) for entry in group["variants"]]
        if any(cell != "–" for cell in cells):
            rows.append(f"| {figure.label} | {' | '.join(cells)} |")
    return rows


def difference_table(group: dict[str, Any]) -> list[str]:
    entries = [entry for entry in group["variants"] if "differences" in entry]
    rows = [f"| | {' | '.join(entry['variant'] for entry in entries)} |", f"| --- |{' ---: |' * len(entries)}"]
    for figure in FIGURES:
        found = [entry["differences"][figure.key] for entry in entries]
        if any(item["mean"] is not None for item in found):
            rows.append(f"| {figure.label} | {' | '.join(shown_difference(item, figure) for item in found)} |")
    return rows


def shown_difference(value: dict[str, Any], figure: Figure) -> str:
    """`-0.0123 ± 0.0040 (3 of 3)`; `equal` where no seed differs, as with runs that are the same."""
    if value["seeds"] and not any(value["per_seed"].values()):
        return "equal"
    return shown(value, figure, signed=True) + (f" ({value['agree']} of {value['seeds']})" if value["seeds"] else "")


def shown(value: dict[str, Any], figure: Figure, signed: bool = False) -> str:
    """`4.1234 ± 0.0100`."""
    if value["mean"] is None:
        return "–"
    text = f"{value['mean'] * figure.scale:{'+' if signed else ''}.{figure.digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std'] * figure.scale:.{figure.digits}f}"
