"""The file of record, metrics.jsonl: one strict JSON object a line, in the order things happened, and never two records of one step.

A process can die between any two bytes, and a run that resumes goes back to its checkpoint's step. So a torn last line is cut off when the file is opened, and
what an earlier process recorded beyond the step resumed from is removed, by writing the rest to a temporary file and renaming it: a reader, or a second death,
sees the old file or the new one.

A disk that takes nothing for a while ends no run: what it refuses waits in memory, and is written in its order with the next record that it takes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
LARGEST_WAITING_BYTES = 64 << 20


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
        # Unbuffered: a record is with the operating system when its call returns.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._waiting = b""

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
        """End the file. What the disk refuses even now is lost, with a word: the run's own end, an error perhaps, matters more."""
        try:
            self._write_waiting()
        except OSError as refused:
            count = self._waiting.count(b"\n")
            print(f"warning: {self.path}: the last {count} records are lost ({refused.strerror})", file=sys.stderr, flush=True)
        self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        """Write a record, or keep it.

        Raises:
            OSError: more is waiting than memory should hold.
        """
        has_waited = bool(self._waiting)
        self._waiting += (json.dumps(strict(record), allow_nan=False, separators=(",", ":")) + "\n").encode()
        try:
            self._write_waiting()
        except OSError as refused:
            if len(self._waiting) > LARGEST_WAITING_BYTES:
                raise
            if not has_waited:
                print(f"warning: {self.path} cannot be written ({refused.strerror}); records wait in memory until it can", file=sys.stderr, flush=True)
        else:
            if has_waited:
                print(f"{self.path}: the records that waited are written", file=sys.stderr, flush=True)

    def _write_waiting(self) -> None:
        """A disk may take a part of it."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


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
