"""Training checkpoints: everything a run needs to go on, in a folder that counts only when it is whole, loadable under any other layout.

    step_00001000/
      *.distcp, .metadata, metadata.json, common.pt    megatron-core's distributed checkpoint: weights, fp32 master weights, moments, router state, RNG
      config.yaml     the run's settings                state.json    step, samples, tokens, layout, versions
      complete.json   the size of every file, written last

Weights are saved once, under names that say nothing of the layout; the optimizer's state is gathered to the shape of the weights (`fully_reshardable`),
so that tensor, pipeline, expert and data parallelism may all be different at the next start.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from megatron_skywork.checkpoint.content import OPTIMIZER_LAYOUT, merged, random_states, sharded_weights
from megatron_skywork.checkpoint.folders import folder_of, retain
from megatron_skywork.checkpoint.state import STATE_FILE, TrainState, describe_state
from megatron_skywork.config.load import dump_config
from megatron_skywork.config.schema import Config
from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.errors import CheckpointError
from megatron_skywork.optim.state import save_without_copies


class InProcessSave(TorchDistSaveShardedStrategy):
    """Writes with torch's own writer, in this process.

    megatron-core hands the writing to processes that it starts for it: seconds of start-up at each save, and orphans when a rank is killed.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save(config: Config, state: TrainState, chunks: list[Any], optimizer: MegatronOptimizer) -> Path:
    """Save on all ranks together; returns when the folder is whole.

    Raises:
        CheckpointError: the folder could not be written; what is there has no completion marker.
    """
    folder = folder_of(Path(config.run_dir), state.step)
    is_writer = torch.distributed.get_rank() == 0
    if is_writer:
        with _writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    torch.distributed.barrier()
    save_without_copies(optimizer)
    weights = sharded_weights(chunks)
    content = {
        **weights,
        "optimizer": optimizer.sharded_state_dict(merged(weights), is_loading=False, metadata=OPTIMIZER_LAYOUT),
        "rng": random_states(),
    }
    with _writing(folder):
        dist_checkpointing.save(content, str(folder), sharded_strategy=InProcessSave())
        if is_writer:
            (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            (folder / STATE_FILE).write_text(describe_state(config, state), encoding="utf-8")
            write_marker(folder)
            retain(Path(config.run_dir), config.checkpoint.keep, folder)
    torch.distributed.barrier()
    return folder


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as failure:
        raise CheckpointError(f"{folder}: could not be written: {failure}") from failure
