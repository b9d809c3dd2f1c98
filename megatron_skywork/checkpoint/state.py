"""What a checkpoint says of itself beside the tensors, in `state.json`: how far the run has come, on which data, in which layout, by which versions.

`extras` is the place for the state of any other part of a run: plain JSON values under the part's name, one for the run and not one per rank. A part has
`state_dict()` and `load_state_dict()` and is made known by `Training.remember(name, part)`; it is then saved and restored with the rest.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch

from megatron_skywork import __version__
from megatron_skywork.config.schema import Config
from megatron_skywork.data.identity import blend_position
from megatron_skywork.errors import CheckpointError
from megatron_skywork.metrics.wandb_follower import known_run_id

STATE_FILE = "state.json"


class HasState(Protocol):
    """A part of a run whose state is a few plain values, the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """How far a run has come. Steps count from 1; `step` is the last one that was done."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """What was read, see data/identity.py."""
    continues: str | None = None
    """The folder that `resume.mode=PATH` named when this run began with it; None for a run of its own."""
    extras: dict[str, Any] = field(default_factory=dict)
    """State of other parts, by name."""


@dataclass(frozen=True)
class SavedState:
    """Content of a checkpoint's state.json."""

    train: TrainState
    position: list[dict[str, int]]
    """Of each source of the blend, see `data.identity.blend_position`."""
    layout: dict[str, Any]
    versions: dict[str, Any]
    wandb_id: str | None


def describe_state(config: Config, state: TrainState) -> str:
    """The text of state.json."""
    content = {
        "step": state.step, "samples": state.samples, "tokens": state.tokens,
        "position": blend_position(state.data, config.data.seq_length, state.samples),
        "data": state.data, "continues": state.continues, "extras": state.extras,
        "layout": layout_of(config), "versions": versions(), "wandb_id": known_run_id(Path(config.run_dir)),
    }
    return json.dumps(content, indent=1)


def read_state(folder: Path) -> SavedState:
    """A checkpoint's state.json.

    Raises:
        CheckpointError: it is missing or not what this or an earlier version writes.
    """
    path = folder / STATE_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions wrote no more than the position and the layout.
        train = TrainState(saved["step"], saved["samples"], saved["tokens"], saved.get("data") or {}, saved.get("continues"), saved.get("extras") or {})
        if not all(isinstance(count, int) and count >= 0 for count in (train.step, train.samples, train.tokens)):
            raise ValueError(f"step={train.step}, samples={train.samples}, tokens={train.tokens}")
        return SavedState(train, saved.get("position") or [], dict(saved["layout"]), dict(saved["versions"]), saved.get("wandb_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as damage:
        raise CheckpointError(f"{path}: cannot be read ({damage}); use another checkpoint of this run") from damage


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

    return {
        "megatron_skywork": __version__, "torch": torch.__version__, "megatron_core": megatron.core.__version__, "numpy": numpy.__version__,
        "python": platform.python_version(), "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit this package is run from; None where it was installed from a wheel."""
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run([git, "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
