"""Whether a save fits into what a stop signal leaves: a scheduler kills a run that is still writing when its grace is over, and steps are lost."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_skywork.metrics.jsonl import FILE_NAME, parse_line

# What torchrun gives a rank between SIGTERM and SIGKILL, and SLURM too (KillWait), when nothing else was said.
USUAL_SECONDS = 30.0


def grace_seconds(configured: float | None) -> float:
    """Seconds from a stop signal to the kill: as configured, or as torchrun's environment says."""
    if configured is not None:
        return configured
    try:
        return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", USUAL_SECONDS))
    except ValueError:
        return USUAL_SECONDS


def last_save_seconds(run_dir: Path) -> float | None:
    """How long the newest save of the record took; None where there was none."""
    seconds = None
    try:
        with open(run_dir / FILE_NAME, "rb") as file:
            for line in file:
                # Most lines are steps; taking them apart would be most of the work.
                record = parse_line(line) if b'"save"' in line else None
                if record and record.get("event") == "save" and isinstance(record.get("seconds"), (int, float)):
                    seconds = float(record["seconds"])
    except FileNotFoundError:
        return None
    return seconds


def warning(save_seconds: float | None, grace: float) -> str | None:
    """What to say when the last save took more than half of the grace."""
    if save_seconds is None or save_seconds <= grace / 2:
        return None
    return (
        f"the last save took {save_seconds:.0f} s, more than half of the {grace:.0f} s from a stop signal to the kill; what a stop cannot save is lost. "
        "Have the scheduler signal earlier (sbatch --signal, TORCH_ELASTIC_SHUTDOWN_TIMEOUT) and say so in train.grace_seconds"
    )
