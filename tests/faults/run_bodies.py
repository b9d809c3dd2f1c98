"""What children of the warm process do in the faults of training: a small run that saves, is killed, and goes on, and a naive one that must be caught losing.

The run is an ordinary one of one rank, with all that has a state: experts, dropout, moments, a schedule.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warm import wait_for_tracer

STEPS = 3
SETTINGS: dict[str, Any] = {
    "model": {
        "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 2, "vocab_size": 32,
        "max_position_embeddings": 16, "backend": "torch", "hidden_dropout": 0.1,
    },
    "moe": {"num_experts": 4, "topk": 2, "router_init_std": 0.1},
    "data": {"mock": True, "seq_length": 8, "num_workers": 0},
    "optim": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 1},
    "train": {"steps": STEPS, "global_batch_size": 2, "micro_batch_size": 1, "precision": "fp32"},
    "checkpoint": {"every": 1, "keep": 1, "background": False},
}  # fmt: skip


@contextlib.contextmanager
def in_memory(folder: Path) -> Iterator[Path]:
    """A folder for many small runs. In memory where that is possible: a process that is killed leaves the same there, and a busy disk takes a second for each
    fsync."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 50 << 20
    with tempfile.TemporaryDirectory(dir=memory if usable else folder, prefix="faults-") as made:
        yield Path(made)


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Settings laid over each other, section by section."""
    from training_bodies import merged

    return merged(*parts)


def _build(settings: dict[str, Any]) -> Any:
    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    return Training(config, parallel.start(config))


# -------------------------------------------------------------------------------------------------------------------------------- saves


def undisturbed(settings: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The run as it should be; what each of its checkpoints holds, by folder."""
    from megatron_skywork.convert.check.item_digests import item_digests
    from megatron_skywork.train.loop import train
    from megatron_skywork.train.signals import StopRequest

    training = _build(settings)
    train(training, StopRequest())
    training.close()
    return {folder.name: item_digests(folder) for folder in sorted(Path(settings["run_dir"], "checkpoints").glob("step_*"))}


def one_more_save(settings: dict[str, Any]) -> None:
    """Go on from the last checkpoint by a step, and save it under the eyes of the tracer."""
    training = _build(settings)
    training.train_one_step()
    wait_for_tracer()
    training.save()
    training.settle_save(wait=True)
    training.close()


def go_on(settings: dict[str, Any]) -> dict[str, Any]:
    """Start the run again, as after any death, and let it come to its end. What it went on from, what it holds now, and what lies there."""
    from training_bodies import records

    found = undisturbed(settings)
    run_dir = Path(settings["run_dir"])
    resumed = [event["step"] for event in records(run_dir, "event") if event["event"] == "resume"]
    return {"resumed": resumed[-1] if resumed else None, "holds": found, "lies": sorted(path.name for path in (run_dir / "checkpoints").iterdir())}


def looks(run_dir: str) -> tuple[str | None, dict[str, str]]:
    """What a start takes for the newest checkpoint, and what that holds."""
    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.verify import newest
    from megatron_skywork.config.schema import Config
    from megatron_skywork.convert.check.item_digests import item_digests

    parallel.start(Config(**SETTINGS))
    folder, _ = newest(Path(run_dir))
    return (None, {}) if folder is None else (folder.name, item_digests(folder))


# -------------------------------------------------------------------------------------------------------------------------------- kills


def run_command(config: str, where: str | None = None, count: int = 1) -> None:
    """`pretrain_moe.py --config ...` of one rank; killed at the `count`-th time it comes to `module:Class.function` or `module:function`, before it is done."""
    if where is not None:
        die_at(where, count)
    from megatron_skywork.cli import pretrain

    pretrain(["--config", config])


def die_at(where: str, count: int) -> None:
    """Put a SIGKILL to itself before (`where`) or after (`where` with a + at its end) a function."""
    module, _, path = where.rstrip("+").partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    plain, calls = getattr(owner, name), [0]

    def dying(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        dies = calls[0] == count
        if dies and not where.endswith("+"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*args, **options)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


# -------------------------------------------------------------------------------------------------------------------------------- naive


def naive_write(path: Path, content: Any) -> None:
    """Under its last name, without a thought."""
    import torch

    torch.save(content, path)


def naive_save(run_dir: Path, step: int, weights: Any, moments: Any) -> None:
    """What many scripts do: the folder is made under its name, filled, and the one before is removed."""
    folder = run_dir / f"step_{step}"
    folder.mkdir(parents=True)
    naive_write(folder / "weights.pt", weights)
    naive_write(folder / "moments.pt", moments)
    shutil.rmtree(run_dir / f"step_{step - 1}", ignore_errors=True)


def naive_load(run_dir: Path) -> tuple[int, Any, Any]:
    """The newest folder, whatever is in it."""
    import torch

    folders = sorted(run_dir.glob("step_*"), key=lambda folder: int(folder.name.split("_")[1]))
    if not folders:
        return 0, torch.zeros(200), torch.zeros(200)
    return int(folders[-1].name.split("_")[1]), *(torch.load(folders[-1] / name, weights_only=True) for name in ("weights.pt", "moments.pt"))


def naive_step(step: int, weights: Any, moments: Any) -> tuple[Any, Any]:
    import torch

    gradient = torch.randn(200, generator=torch.Generator().manual_seed(step)) + weights
    moments = 0.9 * moments + gradient
    return weights - 0.01 * moments, moments


def naive_one_more_save(run_dir: str) -> None:
    step, weights, moments = naive_load(Path(run_dir))
    weights, moments = naive_step(step + 1, weights, moments)
    wait_for_tracer()
    naive_save(Path(run_dir), step + 1, weights, moments)


def naive_run(run_dir: str, steps: int, where: str | None = None, count: int = 1) -> None:
    """Train to the end, from what is there."""
    if where is not None:
        die_at(where, count)
    me = importlib.import_module("run_bodies")
    Path(run_dir).mkdir(exist_ok=True)
    step, weights, moments = naive_load(Path(run_dir))
    while step < steps:
        step += 1
        weights, moments = naive_step(step, weights, moments)
        with open(Path(run_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": "step", "step": step, "loss": float(weights.sum())}) + "\n")
        me.naive_save(Path(run_dir), step, weights, moments)
