"""Reading a run's folder for the report: what metrics.jsonl recorded, as arrays.

A run may still be going on or may have died: a torn last line is skipped, missing fields are NaN, and only a folder with no step at all is refused.
What the routers said is read by `router_records.py`.

Shapes: S recorded steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_skywork.errors import DataError
from megatron_skywork.metrics.jsonl import FILE_NAME, parse_line
from megatron_skywork.report.averages import window_of
from megatron_skywork.report.router_records import Router, RouterReader


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells it."""

    name: str
    folder: Path
    header: dict[str, Any]
    steps_S: np.ndarray
    scalars: dict[str, np.ndarray]
    """Name -> [S]; phases of a step as `seconds.NAME`, of the pipeline `pipeline.NAME`, with the stage (from 0) behind it where there is one per stage."""
    evaluations: dict[str, tuple[np.ndarray, np.ndarray]]
    """Validation set -> steps, losses."""
    events: list[dict[str, Any]]
    nonfinite_steps: list[int]
    router: Router | None
    status: dict[str, Any]
    config_text: str
    config: dict[str, Any] = field(default_factory=dict)

    def series(self, name: str) -> np.ndarray:
        """A scalar over the recorded steps; all NaN where it was not recorded."""
        return self.scalars.get(name, np.full(len(self.steps_S), np.nan))

    def setting(self, path: str) -> Any:
        """A setting by its dotted path, or None."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def window(self) -> int:
        return window_of(len(self.steps_S))


def load_run(folder: str | Path, name: str | None = None) -> Run:
    """Read a run's folder.

    Args:
        name: how the run is called in the report; the folder's name if not given.

    Raises:
        DataError: there is no such folder, it has no metrics.jsonl, or that has no step yet.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the run_dir of a run")
    if not path.is_file():
        raise DataError(f"{folder}: has no {FILE_NAME}; give the run_dir of a run that has started")
    reader = _Reader()
    with open(path, "rb") as file:
        for line in file:
            if (record := parse_line(line)) is not None:
                reader.take(record)
    if not reader.steps:
        raise DataError(f"{path}: has no step record yet; a report needs at least one step")
    config_text, config = _read_config(folder, reader.header)
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        header=reader.header,
        steps_S=np.array(sorted(reader.steps), dtype=np.int64),
        scalars=reader.scalars(),
        evaluations=reader.evaluations_by_name(),
        events=reader.events,
        nonfinite_steps=sorted(reader.nonfinite),
        router=reader.router(),
        status=_read_json(folder / "run_status.json"),
        config_text=config_text,
        config=config,
    )


class _Reader:
    """Takes records one by one. A step that was recorded twice counts as the later record says."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.steps: dict[int, dict[str, float]] = {}
        self.events: list[dict[str, Any]] = []
        self.nonfinite: set[int] = set()
        self._evaluations: dict[str, dict[int, float]] = {}
        self._router = RouterReader()

    def take(self, record: dict[str, Any]) -> None:
        kind, step = record.get("kind"), record.get("step")
        if kind == "header":
            self.header = record
        elif kind == "step" and isinstance(step, int):
            self._take_step(step, record)
        elif kind == "eval" and isinstance(step, int):
            for name, loss in (record.get("losses") or {}).items():
                self._evaluations.setdefault(name, {})[step] = _number(loss)
            if (record.get("router") or {}).get("layers"):
                self._router.take_evaluation(step, record["router"])
        elif kind == "event":
            self.events.append(record)

    def _take_step(self, step: int, record: dict[str, Any]) -> None:
        values = {key: _number(value) for key, value in record.items() if key != "step" and (value is None or isinstance(value, (int, float)))}
        values.update({f"seconds.{key}": _number(value) for key, value in (record.get("seconds") or {}).items()})
        for key, value in (record.get("pipeline") or {}).items():
            values.update({f"pipeline.{key}.{stage}": _number(item) for stage, item in enumerate(value)} if isinstance(value, list)
                          else {f"pipeline.{key}": _number(value)})  # fmt: skip
        self.steps[step] = values
        if record.get("nonfinite"):
            self.nonfinite.add(step)
        if record.get("router"):
            self._router.take_step(step, record["router"])

    def scalars(self) -> dict[str, np.ndarray]:
        names = {name for values in self.steps.values() for name in values}
        ordered = sorted(self.steps)
        return {name: np.array([self.steps[step].get(name, np.nan) for step in ordered]) for name in sorted(names)}

    def evaluations_by_name(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {name: (np.array(sorted(losses)), np.array([losses[step] for step in sorted(losses)])) for name, losses in self._evaluations.items()}

    def router(self) -> Router | None:
        return self._router.router()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the run, or nothing: a report about a broken run is worth more than none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_config(folder: Path, header: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """config.yaml as text and as values; where it is missing, what the header says."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        values = header.get("config") or {}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text, values if isinstance(values, dict) else {}


def read_summary(path: str | Path) -> dict[str, Any]:
    """A summary that was named, and so has to be there.

    Raises:
        DataError: it is not there, or is not a JSON object.
    """
    content = _read_json(Path(path))
    if not content:
        raise DataError(f"{path}: is not there, or is not a JSON object; give a demonstration's summary.json")
    return content


def find_summary(folder: Path) -> dict[str, Any] | None:
    """The demo's summary.json in the run's folder or the one above it, if there is one that has stages."""
    for candidate in (folder / "summary.json", folder.resolve().parent / "summary.json"):
        content = _read_json(candidate)
        if isinstance(content.get("stages"), list):
            return content
    return None
