"""Restores a run from a checkpoint, or starts one from the weights of another; what does not fit is refused with what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_skywork.checkpoint.content import (
    MODEL_PARTS,
    NOT_WEIGHTS,
    OPTIMIZER_LAYOUT,
    merged,
    put_weights,
    rank_states,
    restore_probes,
    restore_rng,
    sharded_weights,
)
from megatron_skywork.checkpoint.state import TrainState, layout_of, read_state
from megatron_skywork.config.load import read_file
from megatron_skywork.config.resume_rules import read_saved
from megatron_skywork.config.schema import Config
from megatron_skywork.convert.files.marker import check_marker
from megatron_skywork.convert.safety.safe_pickle import check_metadata
from megatron_skywork.data.order import derive_key
from megatron_skywork.errors import CheckpointError
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import MEANS_NAME
from megatron_skywork.optim.build import apply_settings, take_rates
from megatron_skywork.optim.state import save_without_copies
from megatron_skywork.parallel import seed_everything


def saved_config(folder: Path) -> Config:
    """The settings a checkpoint was saved with.

    Raises:
        CheckpointError: its config.yaml is missing or cannot be read.
    """
    document = read_file(folder / "config.yaml")
    if document.problems:
        raise CheckpointError(f"{document.problems[0]}; use another checkpoint of this run")
    return read_saved(document.values, str(folder / "config.yaml"))


def load(config: Config, folder: Path, chunks: list[Any], optimizer: MegatronOptimizer) -> TrainState:
    """Restore weights, optimizer, router state and position; the random state too where the layout is the one that was saved.

    Under another layout random numbers are drawn anew, from the seed and the step, so that they are not those of the run's first steps.

    Raises:
        CheckpointError: the folder is damaged or does not fit the model.
    """
    check_metadata(folder)
    saved, old = read_state(folder), saved_config(folder)
    save_without_copies(optimizer)
    begins = tuple(name for name in (COEFFICIENT_NAME, MEANS_NAME) if _has(config, name) and not _has(old, name))
    weights = _without(begins, sharded_weights(chunks))
    wanted = {**weights, "optimizer": optimizer.sharded_state_dict(merged(weights), is_loading=True, metadata=OPTIMIZER_LAYOUT)}
    same_layout = saved.layout == layout_of(config)
    if same_layout:
        wanted["rank"] = rank_states(chunks)
    content = _read(wanted, folder)
    put_weights(chunks, content, absent=begins)
    take_rates(content["optimizer"], optimizer)
    optimizer.load_state_dict(content["optimizer"])
    apply_settings(optimizer, config.optim)
    if same_layout:
        restore_rng(content["rank"]["rng"])
        if _probe_of(old) == _probe_of(config):
            restore_probes(chunks, content["rank"]["probes"])
    else:
        seed_everything(derive_key(config.train.seed, saved.train.step) % 2**31)
    return saved.train


def _probe_of(config: Config) -> Any:
    """What decides which tokens an evaluation follows through the routers (the first micro-batch of the first validation set)."""
    data, train = config.data, config.train
    return data.valid, data.mock, data.seq_length, train.seed, train.micro_batch_size, config.metrics.router


def _has(config: Config, state: str) -> bool:
    """Whether routers under these settings carry a state."""
    if config.moe is None:
        return False
    if state == COEFFICIENT_NAME:
        return config.moe.adaptive.enabled
    return config.moe.aux_loss != "none" and "global_batch" in (config.moe.aux_scope, *(extra.scope for extra in config.moe.extra_aux_losses))


def load_weights(folder: Path, chunks: list[Any]) -> None:
    """Start from the weights of a folder; step, optimizer and adaptive coefficients begin anew.

    Raises:
        CheckpointError: the folder is not whole or does not fit the model.
    """
    check_marker(folder)
    check_metadata(folder)
    put_weights(chunks, _read(_without(NOT_WEIGHTS, sharded_weights(chunks)), folder), absent=NOT_WEIGHTS)


def _without(endings: tuple[str, ...], weights: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in content.items() if not key.endswith(endings)} for name, content in weights.items()}


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
