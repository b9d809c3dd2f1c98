"""Small checkpoint folders for the tests of `convert`, written without the code under test: by safetensors, by torch.distributed.checkpoint and by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.config_json import write_config
from megatron_skywork.convert.files.checkpoint_folder import write_model_file
from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.convert.table import weights

Tensors = dict[str, torch.Tensor]

MODEL = Model(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=50, vocab_divisible_by=32, init_std=0.3)
MOE = Moe(num_experts=4, topk=2)


def random_tensors(model: Model, moe: Moe | None, naming: str = "skywork_moe", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Hugging Face tensors by name; norms near 1, the rest with a spread at which every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for weight in weights(model, moe, naming):
        for name, shape in zip(weight.theirs, weight.layout.parts, strict=True):
            value = torch.empty(shape).normal_(0.0, 0.3, generator=generator)
            found[name] = (1 + value if "norm" in name else value).to(dtype)
    return found


def ours_of(tensors: Tensors, model: Model, moe: Moe | None, naming: str = "skywork_moe") -> Tensors:
    """The same weights under our names."""
    return {weight.ours: weight.layout.forward([tensors[name] for name in weight.theirs]) for weight in weights(model, moe, naming)}


def upcycled(dense: Tensors, model: Model, moe: Moe, naming: str = "skywork_moe", seed: int = 1) -> Tensors:
    """Experts that are copies of the dense feed-forward, under a mixture's names; what has no dense source is random."""
    words = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    found = random_tensors(model, moe, naming, next(iter(dense.values())).dtype, seed)
    for name in found:
        head, _, tail = name.partition(".experts.")
        word = tail.split(".")[1] if tail else ""
        source = f"{head.rpartition('.')[0]}.mlp.{words.get(word, word)}.weight" if tail else name
        if source in dense:
            found[name] = dense[source].clone()
    return found


def write_hf(folder: Path, tensors: Tensors, model: Model, moe: Moe | None, family: str, shards: int = 1) -> Path:
    """A Hugging Face folder, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(write_config(model, moe, family, "float32")))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder


def write_ours(folder: Path, tensors: Tensors, model: Model, moe: Moe | None, extra: dict[str, Any] | None = None) -> Path:
    """A weights-only folder of ours from tensors under our names; `extra` are further items, as training keeps them beside the weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.distributed.checkpoint.save({**tensors, **(extra or {})}, checkpoint_id=str(folder), no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({}, folder / "common.pt")
    write_model_file(folder, model, moe)
    write_marker(folder)
    return folder
