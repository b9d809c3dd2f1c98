"""The file of record, metrics.jsonl: one strict JSON object a line, in the order things happened, and never two records of one step.

A process can die between any two bytes, and a run that resumes goes back to its checkpoint's step. So a torn last line is cut off when the file is opened, and
what an earlier process recorded beyond the step resumed from is removed, by writing the rest to a temporary file and renaming it: a reader, or a second death,
sees the old file or the new one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


def strict(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with NaN and infinities as null, since JSON has neither; where each stood is listed under `nonfinite` (`loss`, `router.entropy.3`).

    Raises:
        TypeError: a value that JSON does not have, such as a tensor; the message names its place.
    """
    places: list[str] = []
    clean = _clean(record, "", places)
    if places:
        clean["nonfinite"] = places
    return clean


def _clean(value: Any, place: str, places: list[str]) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        places.append(place)
        return None
    if isinstance(value, Mapping):
        return {str(key): _clean(item, f"{place}.{key}" if place else str(key), places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, f"{place}.{index}", places) for index, item in enumerate(value)]
    raise TypeError(f"metrics record: {place or 'the record'} is a {type(value).__name__}, which JSON does not have; give a plain number")


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None for a torn or foreign one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class JsonlWriter:
    """Appends records, each flushed as it is written.

    Args:
        path: the file; made, with its folder, if it is not there.
        resume_step: the step resumed from, or None for a new run. A new run leaves an older file of that name beside its own, as `metrics.old-1.jsonl`.
            The resume itself is an event that the training loop records.
    """

    def __init__(self, path: Path, *, resume_step: int | None):
        self.path = path
        self._resume_step = resume_step
        path.parent.mkdir(parents=True, exist_ok=True)
        self._header: dict[str, Any] | None = None
        if path.exists() and path.stat().st_size:
            if resume_step is None:
                os.replace(path, _free_name(path))
            else:
                self._header = _keep_up_to(path, resume_step)
        # Line-buffered: a record is with the operating system when its call returns.
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def header(self, record: Mapping[str, Any]) -> None:
        """The run's first record. A resumed file has one; what changed since is then an event, under dotted names."""
        if self._header is None:
            self._header = dict(strict(record))
            self._append(self._header)
            return
        before, now = _dotted(self._header), _dotted(strict(record))
        changed = {key: now.get(key) for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key) and key != "time"}
        if changed:
            self._append({"kind": "event", "event": "header_changed", "step": self._resume_step, "time": time.time(), "changed": changed})

    def step(self, record: Mapping[str, Any]) -> None:
        self._append(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._append(record)

    def event(self, record: Mapping[str, Any]) -> None:
        self._append(record)

    def close(self) -> None:
        self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(strict(record), allow_nan=False, separators=(",", ":")) + "\n")


def _dotted(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update(_dotted(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return candidate


def _keep_up_to(path: Path, step: int) -> dict[str, Any] | None:
    """Rewrite the file without what was recorded after `step` and without lines that are no records; give the header back.

    A whole record whose line end was not written any more is kept, and gets it.
    """
    header = None
    kept: list[bytes] = []
    content = path.read_bytes()
    for line in content.splitlines():
        record = parse_line(line)
        if record is None or (isinstance(record.get("step"), int) and record["step"] > step):
            continue
        if record.get("kind") == "header":
            header = header or record
        kept.append(line + b"\n")
    if b"".join(kept) != content:
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return header
