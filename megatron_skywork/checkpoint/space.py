"""Will the checkpoints of a run fit on its disk? Asked before the first step, and before each save; one rank asks, all know."""

from __future__ import annotations

from pathlib import Path

from megatron_skywork.checkpoint.folders import complete_folders
from megatron_skywork.config.schema import Config
from megatron_skywork.convert.files.output_folder import free_bytes
from megatron_skywork.convert.progress import human
from megatron_skywork.errors import CheckpointError
from megatron_skywork.plan.checkpoint_interval import checkpoint_size

# Indices, random states, rounding of blocks: more than there is in any checkpoint that was looked at.
_ROOM = 1.01
_ROOM_BYTES = 1 << 20


def estimated_bytes(config: Config) -> int:
    """About the size of a checkpoint of this run."""
    return with_room(checkpoint_size(config).total)


def with_room(tensor_bytes: int) -> int:
    """Bytes to have for a checkpoint of so many bytes of tensors."""
    return int(tensor_bytes * _ROOM) + _ROOM_BYTES


def problem_before_training(config: Config, step: int) -> str | None:
    """What is missing on the disk for the checkpoints that this run will hold at the same time: those it keeps, and the one that is being written.

    Args:
        step: the last one that was done.
    """
    saves, last_step = config.checkpoint, min(config.train.steps, config.train.stop_at_step or config.train.steps)
    steps_left = max(last_step - step, 0)
    coming = min(steps_left, 1) + (steps_left - 1) // saves.every if saves.every and steps_left else min(steps_left, 1)
    there = len(complete_folders(Path(config.run_dir)))
    at_once = min(saves.keep + 1, there + coming)
    needed, free = estimated_bytes(config) * max(at_once - there, 0), free_bytes(Path(config.run_dir))
    if needed <= free:
        return None
    return (
        f"run_dir={config.run_dir}: up to {at_once} checkpoints of about {human(estimated_bytes(config))} lie there at the same time (checkpoint.keep="
        f"{saves.keep}, and the one being written); {there} are there, the others need {human(needed)}, and {human(free)} are free on that disk. "
        "Free some, lower checkpoint.keep, or choose another run_dir"
    )


def check_space_for_save(folder: Path, tensor_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        CheckpointError: names both numbers.
    """
    needed, free = with_room(tensor_bytes), free_bytes(folder)
    if needed > free:
        raise CheckpointError(f"it needs {human(needed)}, and {human(free)} are free on that disk; free some, or lower checkpoint.keep")
