"""TensorBoard events, for those who watch runs there. The package is asked for only when metrics.tensorboard is true."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.scalars import evaluation_scalars, scalars


def require() -> None:
    """Say early, on every rank alike, that the package is missing.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        remedy = "pip install 'megatron_skywork[tensorboard]', or set metrics.tensorboard=false"
        raise ConfigError(f"metrics.tensorboard=true: the package tensorboard is not installed; {remedy}")


class TensorBoardWriter:
    """Writes scalars to `RUN_DIR/tensorboard`; on a resume, what an earlier process wrote beyond that step is hidden.

    The record of a run is its JSONL file; when this copy cannot be written (a full disk), that is said once and the run goes on without it.
    """

    def __init__(self, folder: Path, *, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._has_failed = folder, False
        with self._or_without():
            self._writer = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            self._has_failed = True
            print(f"warning: {self._folder}: {failure.strerror or failure}; the run goes on without TensorBoard, metrics.jsonl has everything", file=sys.stderr)

    def header(self, record: Mapping[str, Any]) -> None:
        self._text("header", f"```\n{json.dumps(record, indent=2, default=str)}\n```", None)

    def step(self, record: Mapping[str, Any]) -> None:
        self._scalars(scalars(record), record["step"])

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._scalars(evaluation_scalars(record), record["step"])

    def event(self, record: Mapping[str, Any]) -> None:
        self._text("events", str(record["event"]), record["step"])

    def close(self) -> None:
        if not self._has_failed:
            with self._or_without():
                self._writer.close()

    def _text(self, name: str, text: str, step: int | None) -> None:
        if not self._has_failed:
            with self._or_without():
                self._writer.add_text(name, text, step)

    def _scalars(self, values: Iterable[tuple[str, float]], step: int) -> None:
        if not self._has_failed:
            with self._or_without():
                for name, value in values:
                    self._writer.add_scalar(name, value, step)
