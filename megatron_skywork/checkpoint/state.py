"""What a checkpoint says of itself beside the tensors: how far the run has come, in which layout it was saved, and by which versions."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_skywork import __version__
from megatron_skywork.config.schema import Config


@dataclass
class TrainState:
    """How far a run has come. Steps count from 1; `step` is the last one that was done."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


def layout_of(config: Config) -> dict[str, Any]:
    """What must be equal for the random state of a rank to mean the same."""
    parallel = config.parallel
    return {
        "world_size": torch.distributed.get_world_size(),
        **{name: getattr(parallel, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "layers_per_stage")},
    }


def versions() -> dict[str, str | None]:
    """What wrote a checkpoint."""
    import megatron.core

    return {"megatron_skywork": __version__, "torch": torch.__version__, "megatron_core": megatron.core.__version__, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """The commit this package is run from; None where it was installed from a wheel."""
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run([git, "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
