"""Which checkpoint a run goes on from, and whether it may: decided by one rank for all, before anything is loaded.

    resume.mode=auto     the newest checkpoint of the run folder that verifies; a new start only where the run never saved anything
    resume.mode=strict   the same, and a run without one is refused
    resume.mode=none     a new start, refused where the run folder has a checkpoint
    resume.mode=PATH     exactly this folder, of this run or another one; started again with the same command, the run goes on from its own newest checkpoint

A run never begins with fresh weights where it could have lost some: when its records say that something was saved and nothing usable is there, it is refused.
Which settings may differ from the checkpoint's stands in config/resume_rules.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_skywork import parallel
from megatron_skywork.checkpoint.folders import step_folders
from megatron_skywork.checkpoint.load import saved_config
from megatron_skywork.checkpoint.state import SavedState, read_state, versions
from megatron_skywork.checkpoint.together import from_first
from megatron_skywork.checkpoint.verify import newest, problem_of
from megatron_skywork.config.resume_rules import Change, compare, require_allowed
from megatron_skywork.config.schema import RESUME_MODES, Config
from megatron_skywork.data.identity import blend_position, data_identity
from megatron_skywork.errors import CheckpointError
from megatron_skywork.metrics.jsonl import FILE_NAME, parse_line
from megatron_skywork.metrics.wandb_follower import keep_run_id

# Settings under which a blend's position means something else; once they were allowed to change, the old position cannot be held against the new order.
_MOVE_THE_BLEND = {"data.train", "data.seq_length", "data.mock"}


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    folder: Path | None
    """The checkpoint it goes on from; None for a new start."""
    data: dict[str, Any]
    """What is read, see data/identity.py."""
    continues: str | None = None
    """The folder that resume.mode names, where the run begins with it."""
    changes: list[Change] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    restart: str | None = None
    """Why a run that had done steps starts anew."""

    def lines(self) -> list[str]:
        """What there is to say of it, for people."""
        about = [] if self.folder is None else [f"going on from {self.folder}", *(f"  changed since: {change}" for change in self.changes)]
        return [*about, *(f"warning: {text}" for text in ([self.restart] if self.restart else []) + self.warnings)]

    def record(self) -> dict[str, Any]:
        """The same for the run's record."""
        said = {"from_path": self.continues, "changed": {change.key: [change.old, change.new] for change in self.changes}, "warnings": self.warnings}
        return {"folder": str(self.folder), **{name: value for name, value in said.items() if value}}


def find_start(config: Config, place: parallel.Coordinates) -> Start:
    """Where this run begins, the same on every rank: the first one looks and decides, all of them verify what is chosen.

    Raises:
        CheckpointError: there is no checkpoint to go on from, or it is damaged.
        ConfigError: settings differ from the checkpoint's that may not, or were not allowed to.
        DataError: the data cannot be read.
    """
    data = from_first(lambda: data_identity(config))
    start = _newest(config, data) if config.resume.mode in RESUME_MODES else _from_path(config, Path(config.resume.mode), data)
    if place.is_first_rank:
        for line in start.lines():
            print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)
    return start


def _newest(config: Config, data: dict[str, Any]) -> Start:
    """resume.mode=auto, strict and none."""
    run_dir, mode = Path(config.run_dir), config.resume.mode
    if mode == "none":
        present = from_first(lambda: step_folders(run_dir))
        if present:
            raise CheckpointError(f"{present[-1]} exists and resume.mode is none; choose another run_dir, move the folder away, or set resume.mode=auto")
        return Start(None, data)
    folder, passed_over = newest(run_dir)
    if folder is not None:
        return from_first(lambda: _checked(config, folder, data, _passed_over(passed_over)))
    if passed_over:
        raise CheckpointError(
            "every checkpoint of this run is damaged; starting from nothing would hide that. Put a good one back, go on from another folder with "
            f"resume.mode=PATH, or choose another run_dir. {'; '.join(passed_over)}")
    if mode == "strict":
        raise CheckpointError(f"{run_dir / 'checkpoints'} holds no checkpoint and resume.mode is strict; correct run_dir={run_dir}, or set resume.mode=auto")
    evidence, steps = from_first(lambda: _what_was_saved(run_dir))
    if evidence:
        raise CheckpointError(
            f"{evidence}, and {run_dir / 'checkpoints'} holds no checkpoint: it was removed, or is not mounted. Put it back, go on from another folder with "
            "resume.mode=PATH, or choose another run_dir for a new start")
    restart = f"this run had done {steps} steps and saved none of them; it starts again from its initial weights" if steps else None
    return Start(None, data, restart=restart)


def _from_path(config: Config, path: Path, data: dict[str, Any]) -> Start:
    """resume.mode=PATH. What the run saved since it began there comes first: a job that is started again must not lose it each time."""
    run_dir, wanted = Path(config.run_dir), str(path.resolve())
    own, passed_over = newest(run_dir)
    if own is not None and from_first(lambda: read_state(own).train.continues == wanted):
        return from_first(lambda: _checked(config, own, data, _passed_over(passed_over)))
    problem = problem_of(path)
    if problem is not None:
        raise CheckpointError(f"resume.mode={path}: {problem}")
    start = from_first(lambda: _checked(config, path, data, [], continues=wanted))
    aside = from_first(lambda: _set_aside(run_dir, path, read_state(path).train.step))
    return replace(start, warnings=[*start.warnings, *aside])


def _passed_over(lines: list[str]) -> list[str]:
    return [f"passed over a damaged checkpoint: {line}" for line in lines]


def _set_aside(run_dir: Path, path: Path, step: int) -> list[str]:
    """Give checkpoints of the run folder that are not of the past gone on from (all, where that is another folder's) another name.

    Neither `newest` nor a rewind must return to them.
    """
    notes = []
    is_own_past = path.resolve().parent == (run_dir / "checkpoints").resolve()
    for folder in step_folders(run_dir):
        number = folder.name.removeprefix("step_")
        if number.isdigit() and not (is_own_past and int(number) <= step):
            count, target = 1, folder.with_name(f"aside-{folder.name}")
            while target.exists():
                count, target = count + 1, folder.with_name(f"aside-{folder.name}-{count + 1}")
            folder.rename(target)
            notes.append(f"{folder} is not of the past of the checkpoint gone on from; it is now {target.name}, and nothing will load or remove it")
    return notes


def _checked(config: Config, folder: Path, data: dict[str, Any], warnings: list[str], continues: str | None = None) -> Start:
    """A start from a folder whose settings, data and versions have been looked at."""
    saved = read_state(folder)
    changes = compare(
        saved_config(folder), config, world_sizes=(saved.layout["world_size"], torch.distributed.get_world_size()), old_data=saved.train.data, new_data=data)
    require_allowed(changes, config, str(folder))
    _require_position(config, folder, saved, data, {change.key for change in changes})
    now = versions()
    others = [f"{name} {saved.versions.get(name)} -> {now[name]}" for name in now if saved.versions.get(name) != now[name]]
    if others:
        warnings = [*warnings, f"{folder} was saved by other versions, results may differ in rounding: {', '.join(others)}"]
    if saved.wandb_id is not None and folder.resolve().parent.parent == Path(config.run_dir).resolve():
        keep_run_id(Path(config.run_dir), saved.wandb_id)
    return Start(folder, data, continues, changes, warnings)


def _require_position(config: Config, folder: Path, saved: SavedState, data: dict[str, Any], changed: set[str]) -> None:
    """The place in each source that was written down must be the one that the number of samples leads to now."""
    if saved.position and not changed & _MOVE_THE_BLEND:
        implied = blend_position(data, config.data.seq_length, saved.train.samples)
        if implied != saved.position:
            raise CheckpointError(
                f"{folder}: after {saved.train.samples} samples its sources stood at {saved.position}, and in this version's order they stand at {implied}; "
                "going on would repeat samples and leave out others. Go on with the version that saved it")


def _what_was_saved(run_dir: Path) -> tuple[str | None, int]:
    """What in a run folder says that something was saved once (None: nothing does), and how many steps its record has."""
    evidence, steps = None, 0
    metrics = run_dir / FILE_NAME
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        record = parse_line(line) or {}
        if record.get("kind") == "step":
            steps = max(steps, record["step"])
        elif record.get("event") in ("save", "resume"):
            evidence = f"{metrics} says that step {record.get('step')} was {'saved' if record['event'] == 'save' else 'loaded'}"
    try:
        status = json.loads((run_dir / "run_status.json").read_text(encoding="utf-8"))
        status = (status.get("before") or {}) if status.get("step") is None else status
    except (OSError, ValueError, AttributeError):
        status = {}
    # A run that was stopped or is done has saved; one that began at a later step than 0 had loaded something.
    if evidence is None and status.get("status") in ("stopped", "done", "running") and status.get("step"):
        evidence = f"{run_dir / 'run_status.json'} says {status['status']} at step {status['step']}"
    return evidence, steps
