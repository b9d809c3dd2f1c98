"""What ranks do in the tests of training: build a small run from settings, train, and report in plain numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "vocab_size": 100,
        "max_position_embeddings": 32,
        "backend": "torch",
    },
    "moe": {"num_experts": 4, "topk": 2, "aux_loss": "report", "router_init_std": 0.1},
    "data": {"mock": True, "seq_length": 16, "num_workers": 0},
    "optim": {"lr": 3e-3, "schedule": "constant"},
    "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32"},
    "metrics": {"router": True},
}


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Settings laid over each other, section by section."""
    result: dict[str, Any] = {}
    for part in parts:
        for section, fields in part.items():
            result[section] = {**result.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return result


def train(settings: dict[str, Any]) -> None:
    """Run settings to their end, as launch/pretrain_moe.py does; everything to look at is in the run's folder."""
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.load import check_config
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.loop import train as loop
    from megatron_skywork.train.signals import StopRequest
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    check_config(config, torch.distributed.get_world_size())
    training = Training(config, parallel.start(config))
    loop(training, StopRequest())
    release(training)


def save_initial(settings: dict[str, Any]) -> None:
    """Write fresh weights as a checkpoint of step 0, for other layouts to start from."""
    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.save import save
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    save(config, training.state, training.chunks, training.optimizer)
    release(training)


def release(training: Any) -> None:
    """Close a run and take it apart: its gradient hooks form a cycle through autograd that Python's collector cannot see, and in it live groups."""
    training.close()
    parts = getattr(training.optimizer, "chained_optimizers", [])
    modules = [module for chunk in training.chunks for module in chunk.modules()]
    for owner in [*parts, training.optimizer, *modules]:
        vars(owner).clear()


def reseal(folder: Path) -> None:
    """Make a folder that was tampered with what its manifest and marker say again."""
    from megatron_skywork.convert.files.checkpoint_folder import MANIFEST, write_manifest
    from megatron_skywork.convert.files.marker import MARKER, write_marker

    (folder / MARKER).unlink()
    content = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, {key: content[key] for key in ("kind", "method", "step")}, {})
    write_marker(folder)


def records(run_dir: Path | str, kind: str = "step") -> list[dict[str, Any]]:
    """Records of a run, of one kind."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path | str) -> list[float]:
    """Loss of each step."""
    return [record["loss"] for record in records(run_dir)]
