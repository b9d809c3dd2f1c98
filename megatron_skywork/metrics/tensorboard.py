"""TensorBoard events, for those who watch runs there. The package is asked for only when metrics.tensorboard is true."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
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
    """Writes scalars to `RUN_DIR/tensorboard`; on a resume, what an earlier process wrote beyond that step is hidden."""

    def __init__(self, folder: Path, *, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def header(self, record: Mapping[str, Any]) -> None:
        self._writer.add_text("header", f"```\n{json.dumps(record, indent=2, default=str)}\n```")

    def step(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def evaluation(self, record: Mapping[str, Any]) -> None:
        for name, value in evaluation_scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def event(self, record: Mapping[str, Any]) -> None:
        self._writer.add_text("events", str(record["event"]), record["step"])

    def close(self) -> None:
        self._writer.close()
