"""Which runs of a comparison are the same experiment with another seed, what they are called, and what differs between the others.

Runs whose settings differ in the seed and the folder alone are one variant: its curves are a mean over seeds with their range, so that a difference between
variants can be held against the difference between seeds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skywork.report.averages import calm, nan_mean, nan_range
from megatron_skywork.report.load import Run

# What may differ between runs of one variant.
SEED, FOLDER = "train.seed", "run_dir"
_NAMES_THAT_SAY_NOTHING = {"run", "train", "default", "output"}
_SEED = re.compile(r"seed[_-]?\d+")
Series = tuple[np.ndarray, np.ndarray]
"""Steps and values, [S] each."""


@dataclass(frozen=True)
class Curve:
    """One variant's line: the mean over its runs and their range, at every step that any of them recorded."""

    steps_S: np.ndarray
    mean_S: np.ndarray
    low_S: np.ndarray
    high_S: np.ndarray


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: list[Run]

    @property
    def label(self) -> str:
        """Its name in a legend, with how many runs it is."""
        seeds = {run.setting(SEED) for run in self.runs}
        what = "seeds" if len(seeds) == len(self.runs) else "runs"
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} {what})"

    def curve(self, series_of: Callable[[Run], Series | None], smooth: int = 20) -> Curve | None:
        """The variant's line for what `series_of` reads from a run, smoothed over the `smooth`-th part of it (0: not at all); None where no run has it."""
        found = [series for run in self.runs if (series := series_of(run)) is not None and np.isfinite(series[1]).any()]
        if not found:
            return None
        steps_S = np.unique(np.concatenate([steps for steps, _ in found]))
        rows = np.full((len(found), len(steps_S)), np.nan)
        for row, (steps, values) in zip(rows, found, strict=True):
            row[np.searchsorted(steps_S, steps)] = calm(values, smooth) if smooth else values
        low_S, high_S = nan_range(rows, axis=0)
        return Curve(steps_S, nan_mean(rows, axis=0), low_S, high_S)


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names; with as many folders above as it takes to tell them apart, or to say something; then a number."""
    paths = [Path(folder).resolve() for folder in folders]
    alone = len(paths) == 1
    lengths = [2 if path.name in _NAMES_THAT_SAY_NOTHING or (alone and _SEED.fullmatch(path.name)) else 1 for path in paths]
    names: list[str] = []
    for _ in range(max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[1:][-length:]) for path, length in zip(paths, lengths, strict=True)]
        taken = [len({other for other, its in zip(paths, names, strict=True) if its == name}) > 1 for name in names]
        if not any(taken):
            break
        lengths = [length + more for length, more in zip(lengths, taken, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({names[:index].count(name) + 1})" for index, name in enumerate(names)]


def variants(runs: Sequence[Run]) -> list[Variant]:
    """The runs by variant, in the order in which each first appears."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_without_seed(run.config), sort_keys=True, default=str), []).append(run)
    names = [_common_name([run.folder for run in group], [run.folder for run in runs]) if len(group) > 1 else group[0].name for group in groups.values()]
    found: list[Variant] = []
    for name, group in zip(names, groups.values(), strict=True):
        unique = name if name and names.count(name) == 1 else group[0].name
        found.append(Variant(unique, group))
    return found


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {key: value for key, value in config.items() if key != FOLDER}
    if isinstance(kept.get("train"), Mapping):
        kept["train"] = {key: value for key, value in kept["train"].items() if key != "seed"}
    return kept


def _common_name(folders: Sequence[Path], every: Sequence[Path]) -> str:
    """What the folders of a variant share: `a/norm_1/seed_1` and `a/norm_1/seed_2`, beside `a/plain/seed_1`, are `norm_1`."""
    top = os.path.commonpath([str(folder.resolve()) for folder in every])
    parts = [list(Path(os.path.relpath(folder.resolve(), top)).parts) for folder in folders]
    if len({len(part) for part in parts}) != 1:
        return ""
    shared = []
    for column in zip(*parts, strict=True):
        name = column[0] if len(set(column)) == 1 else _shared_beginning(column)
        if name and name not in (".", *_NAMES_THAT_SAY_NOTHING):
            shared.append(name)
    return "/".join(shared)


def _shared_beginning(names: Sequence[str]) -> str:
    """`norm_1-seed1`, `norm_1-seed2` -> `norm_1`."""
    start = os.path.commonprefix(list(names))
    if any(name[len(start) : len(start) + 1].isdigit() for name in names):
        start = re.sub(r"\d+$", "", start)  # seed12 and seed13 share `seed1`, which is no number of a seed
    return re.sub(r"[-_. ]*(seed|run|s)?[-_. =]*$", "", start)


def differing_settings(found: Sequence[Variant]) -> dict[str, list[str]]:
    """Dotted setting -> its value in every variant, for those that differ; a variant's seeds are listed where they differ.

    A section that some variant does not have is one row, and its settings are compared among the variants that have it.
    """
    flat = [_flat(variant.runs[0].config) for variant in found]
    rows: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for values in flat for key in values):
        if key in (FOLDER, SEED):
            continue
        given = [values[key] for values in flat if key in values]
        sectioned = all(key in values or _section_is_missing(key, values) for values in flat)
        if len(set(given)) > 1 or (len(given) < len(flat) and not sectioned):
            rows[key] = [values.get(key, "–") for values in flat]
    seeds = [sorted({run.setting(SEED) for run in variant.runs if run.setting(SEED) is not None}) for variant in found]
    if len({tuple(each) for each in seeds}) > 1 and any(seeds):
        rows[SEED] = [", ".join(map(str, each)) or "–" for each in seeds]
    return rows


def _section_is_missing(key: str, values: Mapping[str, str]) -> bool:
    """Whether a section that `key` lies in is not there."""
    parents = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]
    return any(values.get(parent, "unset") == "unset" for parent in parents)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values as text; a section that is there counts as `set`, so that one that is not can be told."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat[f"{prefix}{key}"] = "set"
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _as_text(value)
    return flat


def _as_text(value: Any) -> str:
    """A setting as one would type it; 0.1 + 0.2 is 0.3."""
    if value is None:
        return "unset"
    if isinstance(value, float):
        return repr(float(f"{value:.12g}"))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
