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
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from megatron_skywork import __version__, device
from megatron_skywork.config.load import dump_config
from megatron_skywork.config.schema import Config
from megatron_skywork.convert.files.marker import check_marker, is_complete, write_marker
from megatron_skywork.convert.safety.safe_pickle import check_metadata
from megatron_skywork.errors import CheckpointError
from megatron_skywork.model.build import unwrap
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import MEANS_NAME
from megatron_skywork.optim.build import apply_settings
from megatron_skywork.optim.state import save_without_copies

# `non_homogeneous_layers`: one key per layer, so that a layer's key does not depend on how layers are spread over stages.
LAYOUT_FREE = {"non_homogeneous_layers": True, "singleton_local_shards": False}
OPTIMIZER_LAYOUT = {**LAYOUT_FREE, "chained_optim_avoid_prefix": True, "distrib_optim_sharding_type": "fully_reshardable"}

# Keys of weights begin with these; what ends so is state of a module, and a model may be without it.
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")
NOT_WEIGHTS = ("_extra_state", COEFFICIENT_NAME, MEANS_NAME)


@dataclass
class TrainState:
    """How far a run has come. Steps count from 1; `step` is the last one that was done."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


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


# ---------------------------------------------------------------------------------------------------------------------------- folders


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_folders(run_dir: Path) -> list[Path]:
    """Folders with a completion marker, oldest first."""
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step_*") if is_complete(folder))


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest folder whose files are all there in full size, and a line about each newer one that was passed over."""
    passed_over = []
    for folder in reversed(complete_folders(run_dir)):
        try:
            check_marker(folder)
        except CheckpointError as damage:
            passed_over.append(str(damage))
            continue
        return folder, passed_over
    return None, passed_over


def retain(run_dir: Path, keep: int, saved: Path) -> list[Path]:
    """Remove all but the newest `keep` complete folders up to `saved`, the one just written, and what died saves left behind.

    A folder of a later step was passed over as damaged when this run started; counted as one to keep, it could push out the good ones.
    """
    complete = [folder for folder in complete_folders(run_dir) if folder.name <= saved.name]
    removed = [folder for folder in (run_dir / "checkpoints").glob("step_*") if folder not in complete[-keep:]]
    for folder in removed:
        # The marker goes first: a removal that is interrupted must not leave a folder that looks whole.
        (folder / "complete.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
    return removed


# ----------------------------------------------------------------------------------------------------------------------------- saving


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
    weights = _weights(chunks)
    content = {
        **weights,
        "optimizer": optimizer.sharded_state_dict(_merged(weights), is_loading=False, metadata=OPTIMIZER_LAYOUT),
        "rng": _rng(),
    }
    with _writing(folder):
        dist_checkpointing.save(content, str(folder), sharded_strategy=InProcessSave())
        if is_writer:
            (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            (folder / "state.json").write_text(json.dumps({**asdict(state), "layout": _layout(config), "versions": versions()}, indent=1), encoding="utf-8")
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


# ---------------------------------------------------------------------------------------------------------------------------- loading


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
    weights = _weights(chunks)
    wanted = {**weights, "optimizer": optimizer.sharded_state_dict(_merged(weights), is_loading=True, metadata=OPTIMIZER_LAYOUT)}
    same_layout = saved.get("layout") == _layout(config)
    if same_layout:
        wanted["rng"] = _rng()
    content = _read(wanted, folder)
    _put_weights(chunks, content)
    optimizer.load_state_dict(content["optimizer"])
    apply_settings(optimizer, config.optim)
    if same_layout:
        _restore_rng(content["rng"])
    return state


def load_weights(folder: Path, chunks: list[Any]) -> None:
    """Start from the weights of a folder; step, optimizer and adaptive coefficients begin anew.

    Raises:
        CheckpointError: the folder is not whole or does not fit the model.
    """
    check_marker(folder)
    check_metadata(folder)
    wanted = {name: {key: value for key, value in content.items() if not key.endswith(NOT_WEIGHTS)} for name, content in _weights(chunks).items()}
    _put_weights(chunks, _read(wanted, folder), partial=True)


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


# ------------------------------------------------------------------------------------------------------------------------- state dicts


def _weights(chunks: list[Any]) -> dict[str, Any]:
    """`model` or `model0`, `model1`, ...: the sharded weights of each chunk of this rank."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: unwrap(chunk).sharded_state_dict(metadata=dict(LAYOUT_FREE)) for name, chunk in zip(names, chunks, strict=True)}


def _merged(weights: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer looks weights up in: megatron-core wants the chunks as they are named when there are several."""
    return weights.get("model", weights)


def _put_weights(chunks: list[Any], content: dict[str, Any], partial: bool = False) -> None:
    for number, chunk in enumerate(chunks):
        tensors = content["model" if len(chunks) == 1 else f"model{number}"]
        outcome = unwrap(chunk).load_state_dict(tensors, strict=not partial)
        if partial:
            missing = [key for key in outcome.missing_keys if not key.endswith(NOT_WEIGHTS)]
            if missing or outcome.unexpected_keys:
                raise CheckpointError(f"weights do not fit the model: missing {missing}, unexpected {outcome.unexpected_keys}")


def _rng() -> dict[str, Any]:
    """This rank's random states, under its own place among the ranks."""
    states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": device.rng_state(),
        "tracker": {name: state.clone() for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {"states": ShardedObject("rng", states, (world,), (rank,), replica_id=0)}


def _restore_rng(content: dict[str, Any]) -> None:
    states = content["states"]
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    device.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _layout(config: Config) -> dict[str, Any]:
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
