"""What ranks do in the tests of resuming: run, die, go on with one item of the state forgotten, and say which samples they read."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from training_bodies import records, release

from megatron_skywork.convert.check.item_digests import item_digests

# Fields of a step's record that are a function of the run alone.
FIELDS = ("step", "loss", "grad_norm", "learning_rate", "samples", "tokens", "router", "skipped")
# Items of the state, and which entries of a checkpoint each stands for.
ITEMS = {
    "weights": r"(embedding|decoder|output_layer)\.(?!.*(aux_coefficient|batch_means|expert_bias))",
    "expert_bias": r"decoder\..*\.expert_bias",
    "aux_coefficient": r"decoder\..*\.aux_coefficient",
    "batch_means": r"decoder\..*\.batch_means",
    "masters": r"optimizer\.state\.param\.",
    "exp_avg": r"optimizer\.state\.exp_avg\.",
    "exp_avg_sq": r"optimizer\.state\.exp_avg_sq\.",
    "optimizer_step": r"common",
    "loss_scale": r"common",
    "rng_python": r"rng/",
    "rng_numpy": r"rng/",
    "rng_torch": r"rng/",
    "rng_tracker": r"rng/",
    "probe": r"probe/",
    "step": "", "samples": "", "tokens": "", "extras": "",  # of state.json
}
OF_STATE_JSON = ("step", "samples", "tokens", "extras")


class Tally:
    """A part of a run with a state of its own, as a detector with a window would be."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])


class Died(Exception):
    """Stands for kill -9: nothing after it is written."""


def live(settings: dict[str, Any], forget: str | None = None, die_after: int | None = None) -> dict[int, list[int]]:
    """Run settings to their end, or to the death of all ranks after a step.

    Args:
        forget: an item of ITEMS that is not restored when the run resumes.
    Returns:
        for each step, the first token of every sample this rank read for it.
    """
    import numpy
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.load import check_config
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.loop import train as loop
    from megatron_skywork.train.signals import StopRequest
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    check_config(config, torch.distributed.get_world_size())
    place = parallel.start(config)
    with _forgetting(forget):
        training = Training(config, place)
    tally, read = Tally(), {}
    training.remember("tally", tally)
    one_step = training.train_one_step

    def counted() -> Any:
        number = training.state.step + 1
        if die_after is not None and number > die_after:
            raise Died
        read[number] = []
        _noting(training, read[number])
        tally.steps = [*tally.steps[-3:], number]
        random.random(), numpy.random.random()  # nothing of ours draws from these; a user's dataset may
        return one_step()

    loader = training.train_loader

    def _noting(training: Any, found: list[int]) -> None:
        def noted() -> Iterator[Any]:
            for batch in loader:
                found.extend(batch["tokens"][:, 0].tolist())
                yield batch

        training.train_loader = noted()

    training.train_one_step = counted
    with suppress(Died):
        loop(training, StopRequest())
    vars(training).pop("train_one_step")
    release(training)
    return read


def attempt(run: dict[str, Any]) -> str | None:
    """Run settings; the kind and words of an error a user is to see, or None."""
    from megatron_skywork.errors import UserError

    try:
        live(run)
    except UserError as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return None


def live_forgetting_each(settings: dict[str, Any], run_dirs: dict[str, str]) -> None:
    """Resume once for each item, from its own folder, without it."""
    from megatron.core import parallel_state

    for item, run_dir in run_dirs.items():
        live({**settings, "run_dir": run_dir}, forget=None if item == "nothing" else item)
        parallel_state.destroy_model_parallel()


@contextmanager
def _forgetting(item: str | None) -> Iterator[None]:
    """Inside, a checkpoint is loaded as if it had been saved without one item: that keeps what a new run has."""
    import megatron_skywork.train.training as module
    from megatron_skywork.checkpoint.state import TrainState

    real = module.load

    def load(config: Any, folder: Path, chunks: list[Any], optimizer: Any) -> Any:
        if item in OF_STATE_JSON:
            return replace(real(config, folder, chunks, optimizer), **{item: getattr(TrainState(), item)})
        put_back = _held(item, chunks, optimizer)
        state = real(config, folder, chunks, optimizer)
        put_back()
        return state

    module.load = load if item is not None else real
    try:
        yield
    finally:
        module.load = real


def _held(item: str | None, chunks: list[Any], optimizer: Any) -> Callable[[], None]:
    """Remember what an item holds now; the answer puts it back."""
    import numpy
    from megatron.core import tensor_parallel

    from megatron_skywork import device
    from megatron_skywork.moe.router_state import find_routers

    parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    tensors: dict[str, Callable[[], list[Any]]] = {
        "weights": lambda: [parameter.data for chunk in chunks for parameter in chunk.parameters()],
        "masters": lambda: [shard.data for part in parts for group in part.shard_fp32_from_float16_groups for shard in group],
        "exp_avg": lambda: [state["exp_avg"] for part in parts for state in part.optimizer.state.values()],
        "exp_avg_sq": lambda: [state["exp_avg_sq"] for part in parts for state in part.optimizer.state.values()],
        **{name: lambda name=name: [getattr(router, name) for router in find_routers(chunks)] for name in ("expert_bias", "aux_coefficient", "batch_means")},
    }
    if item in tensors:
        before = [tensor.clone() for tensor in tensors[item]()]
        assert before, f"this run has no {item}"

        def put_back() -> None:
            for tensor, value in zip(tensors[item](), before, strict=True):
                tensor.copy_(value)

        return put_back
    if item == "probe":
        return lambda: vars(find_routers(chunks)[0]).update(probe=None)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    groups = [group for part in parts for group in part.optimizer.param_groups]
    getters: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "optimizer_step": (
            lambda: [group["step"] for group in groups],
            lambda steps: [group.update(step=step) for part in parts for group, step in zip(part.optimizer.param_groups, steps, strict=False)]),
        "loss_scale": (
            lambda: [part.grad_scaler.state_dict() for part in parts],
            lambda states: [part.grad_scaler.load_state_dict(state) for part, state in zip(parts, states, strict=True)]),
        "rng_python": (random.getstate, random.setstate),
        "rng_numpy": (numpy.random.get_state, numpy.random.set_state),
        "rng_torch": (device.rng_state, device.set_rng_state),
        "rng_tracker": (tracker.get_states, tracker.set_states),
    }
    get, put = getters[str(item)]
    held = copy.deepcopy(get())
    return lambda: put(held)


def state_of(run_dir: Path, step: int) -> dict[str, Any]:
    """Everything a checkpoint holds, in a form that can be compared."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    said = json.loads((folder / "state.json").read_text())
    del said["versions"]  # the commit may move on while tests run
    return {**item_digests(folder), **{f"state.json {name}": value for name, value in said.items()}}


def differences(expected: Path, found: Path, step: int, first: int = 1) -> list[str]:
    """What two runs do not have in common: records of the steps from `first` on, and every item of the checkpoint of `step`."""
    theirs, ours = ([record for record in records(run) if record["step"] >= first] for run in (expected, found))
    differing = [f"steps {[record['step'] for record in ours]}"] if [r["step"] for r in theirs] != [r["step"] for r in ours] else []
    for one, other in zip(theirs, ours, strict=False):
        differing += [f"step {one['step']} {name}" for name in FIELDS if one.get(name) != other.get(name)]
    theirs, ours = ([record for record in records(run, "eval") if record["step"] >= first] for run in (expected, found))
    for one, other in itertools.zip_longest(theirs, ours, fillvalue={}):
        differing += [f"evaluation {name}" for name in ("step", "losses", "router") if one.get(name) != other.get(name)]
    one_state, other_state = state_of(expected, step), state_of(found, step)
    return differing + [name for name in sorted({*one_state, *other_state}) if one_state.get(name) != other_state.get(name)]


def load_and_save(settings: dict[str, Any], to: str) -> None:
    """Load the newest checkpoint, and save it again, unchanged, in another run's folder."""
    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.save import save
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    save(Config(**{**settings, "run_dir": to}), training.state, training.chunks, training.optimizer)
    release(training)


def next_random_numbers(settings: dict[str, Any]) -> list[float]:
    """What the first step of a start would draw: from Python's, NumPy's and torch's generators and those of megatron-core's tracker."""
    import numpy
    import torch
    from megatron.core import tensor_parallel

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    drawn = [random.random(), float(numpy.random.random()), float(torch.rand(()))]
    for name in sorted(tensor_parallel.get_cuda_rng_tracker().get_states()):
        with tensor_parallel.get_cuda_rng_tracker().fork(name):
            drawn.append(float(torch.rand(())))
    release(training)
    return drawn


def whole_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, put together from its pieces."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    torch.distributed.checkpoint.load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors
