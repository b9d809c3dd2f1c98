"""Restores a run from a checkpoint, or starts one from the weights of another; what does not fit is refused with what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_skywork.checkpoint.content import MODEL_PARTS, NOT_WEIGHTS, OPTIMIZER_LAYOUT, merged, put_weights, random_states, restore_rng, sharded_weights
from megatron_skywork.checkpoint.state import TrainState, layout_of
from megatron_skywork.config.schema import Config
from megatron_skywork.convert.files.marker import check_marker
from megatron_skywork.convert.safety.safe_pickle import check_metadata
from megatron_skywork.errors import CheckpointError
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import MEANS_NAME
from megatron_skywork.optim.build import apply_settings
from megatron_skywork.optim.state import save_without_copies


def load(config: Config, folder: Path, chunks: list[Any], optimizer: MegatronOptimizer) -> TrainState:
    """Restore weights, optimizer, router state and position; the random state too where the layout is the one that was saved.

    Raises:
        CheckpointError: the folder is damaged or does not fit the model.
    """
    check_metadata(folder)
    try:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state = TrainState(saved["step"], saved["samples"], saved["tokens"])
    except (OSError, ValueError, KeyError) as damage:
        raise CheckpointError(f"{folder / 'state.json'}: cannot be read ({damage}); use another checkpoint of this run") from damage
    save_without_copies(optimizer)
    weights = sharded_weights(chunks)
    wanted = {**weights, "optimizer": optimizer.sharded_state_dict(merged(weights), is_loading=True, metadata=OPTIMIZER_LAYOUT)}
    same_layout = saved.get("layout") == layout_of(config)
    if same_layout:
        wanted["rng"] = random_states()
    content = _read(wanted, folder)
    put_weights(chunks, content)
    optimizer.load_state_dict(content["optimizer"])
    apply_settings(optimizer, config.optim)
    if same_layout:
        restore_rng(content["rng"])
    return state


def load_weights(folder: Path, chunks: list[Any]) -> None:
    """Start from the weights of a folder; step, optimizer and adaptive coefficients begin anew.

    Raises:
        CheckpointError: the folder is not whole or does not fit the model.
    """
    check_marker(folder)
    check_metadata(folder)
    wanted = {name: {key: value for key, value in content.items() if not key.endswith(NOT_WEIGHTS)} for name, content in sharded_weights(chunks).items()}
    put_weights(chunks, _read(wanted, folder), partial=True)


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    asked = {value.key for value in nested_values(wanted) if isinstance(value, ShardedBase)}
    try:
        content = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, ValueError, RuntimeError) as failure:
        raise CheckpointError(f"{folder} does not fit this model: {_gist(failure)}{_router_state_hint(_gist(failure))}") from failure
    _refuse_left_over(asked, folder)
    return content


def _refuse_left_over(asked: set[str], folder: Path) -> None:
    """megatron-core leaves out what no rank asks for. Weights that this model has no place for (more layers, biases, an output layer) are a mistake."""
    by_rank: list[set[str]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, asked)
    saved = {key for key in dist_checkpointing.load_tensors_metadata(str(folder)) if key.startswith(MODEL_PARTS) and not key.endswith(NOT_WEIGHTS)}
    left_over = sorted(saved.difference(*by_rank))
    if left_over:
        names = ", ".join(left_over[:3]) + (f" and {len(left_over) - 3} more" if len(left_over) > 3 else "")
        raise CheckpointError(f"{folder} does not fit this model, which has no place for its {names}; compare the settings of model and moe")


def _router_state_hint(failure: str) -> str:
    """What to do when routers ask for a state that the checkpoint has not."""
    for name, setting in ((COEFFICIENT_NAME, "moe.adaptive.enabled=true"), (MEANS_NAME, "an auxiliary loss with scope global_batch")):
        if f".router.{name}" in failure:
            return (
                f". The run was saved without {setting}, or its state was lost: go on with the settings it was saved with (its config.yaml), "
                "or start a new run_dir from its weights with checkpoint.init_from"
            )
    return ""


def _gist(failure: BaseException) -> str:
    """The last line of a long message, without the list of every name that is there."""
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return lines[-1].split(": [")[0][:400].strip().replace('"', "") if lines else type(failure).__name__
