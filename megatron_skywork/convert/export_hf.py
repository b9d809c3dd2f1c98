"""Our folder (weights-only, or a training checkpoint from any layout) -> a Hugging Face folder that transformers loads.

A mixture of experts goes out in the Skywork-MoE-Base layout with its configuration and modeling files inside, or in Mixtral's where the gate is plain;
a dense model as LLaMA, Mistral, Qwen2 or Qwen3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_skywork.config.schema import Moe
from megatron_skywork.config.yaml_strict import read_yaml
from megatron_skywork.convert.checkpoint_folder import (
    CONFIG_FILE,
    HF_FOLDER,
    TOKENIZER_FILES,
    carry_files,
    check_plain,
    count_parameters,
    describe,
    layout_summary,
    step_of,
)
from megatron_skywork.convert.compare_names import check_ours, dtype_name, main_dtype
from megatron_skywork.convert.families import choose_family, write_config
from megatron_skywork.convert.hf_files import SHARD_BYTES, HfWriter, read_json
from megatron_skywork.convert.import_hf import check_space
from megatron_skywork.convert.layouts import Shape, numel
from megatron_skywork.convert.mcore_files import DistributedReader
from megatron_skywork.convert.progress import Progress
from megatron_skywork.convert.staging import Staging, check_replaceable
from megatron_skywork.convert.table import Weight, weights
from megatron_skywork.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REMOTE_CODE = Path(__file__).parent / "skywork_moe_hf"
REMOTE_FILES = ("configuration_skywork_moe.py", "modeling_skywork_moe.py")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(
    folder: Path | str, out: Path | str, family: str = "auto", dtype: str = "auto", tokenizer: Path | str | None = None,
    overwrite: bool = False, shard_bytes: int = SHARD_BYTES, progress: TextIO | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a Hugging Face folder.

    Args:
        family: auto, or a Hugging Face model type that can hold the model.
        dtype: auto keeps every tensor as it is stored; bf16, fp16, fp32 casts all but a router that is stored in fp32,
            whose precision decides which expert a token goes to.
        tokenizer: folder with tokenizer files; by default the checkpoint's own, or those its config.yaml names.

    Returns:
        family, layout, parameters, dtype, step, bytes, names of the tokenizer files.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint, or a family or dtype that does not fit.
    """
    folder = Path(folder)
    check_replaceable(Path(out), overwrite)
    model, moe = describe(folder)
    check_plain(folder)
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"--dtype {dtype}: use auto, {', '.join(DTYPES)}")
    carried = _carried_folder(folder)
    original = read_json(carried / "config.json") if carried is not None and (carried / "config.json").is_file() else {}
    family = choose_family(model, moe, _default_family(original, moe) if family == "auto" else family)
    reader = DistributedReader(folder)
    check_ours(reader, model, moe)
    plan = [(name, shape, target) for weight in weights(model, moe) for name, shape, target in _targets(weight, reader, dtype)]
    total = sum(numel(shape) * kind.itemsize for _, shape, kind in plan)
    check_space(Path(out), total)
    stored = main_dtype((shape, kind) for _, shape, kind in plan)
    with Staging(out, overwrite) as staged:
        bar = Progress("export", total, progress)
        writer = HfWriter(staged, plan, shard_bytes, bar)
        for weight in weights(model, moe):
            for name, tensor in _tensors(weight, reader):
                writer.add(name, tensor.to(_target(weight, tensor.dtype, dtype)))
        writer.finish()
        token_ids = {key: original[key] for key in _TOKEN_IDS if original.get(key) is not None}
        config = write_config(model, moe, family, dtype_name(stored), token_ids)
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if family == "skywork_moe":
            for name in REMOTE_FILES:
                (staged / name).write_text((REMOTE_CODE / name).read_text(encoding="utf-8"), encoding="utf-8")
        names = (*TOKENIZER_FILES, "generation_config.json")
        copied = carry_files(Path(tokenizer), staged, names) if tokenizer is not None else carry_files(carried, staged, names) if carried is not None else []
        bar.close()
    return {
        "out": str(out), "family": family, "layout": layout_summary(model, moe), "parameters": count_parameters(model, moe), "dtype": dtype_name(stored),
        "step": step_of(folder), "bytes": total, "tokenizer_files": copied,
    }  # fmt: skip


def _default_family(original: dict[str, Any], moe: Moe | None) -> str:
    """Back to where the model came from, if it is still of that kind."""
    came_from = original.get("model_type")
    if moe is None and came_from in ("mistral", "qwen2", "qwen3"):
        return str(came_from)
    if moe is not None and came_from == "mixtral" and not moe.gate_norm:
        return "mixtral"
    return "auto"


def _carried_folder(folder: Path) -> Path | None:
    """Where tokenizer files and the source's config are: in the folder, beside the weights training began from, or where the run's tokenizer is."""
    if (folder / HF_FOLDER).is_dir():
        return folder / HF_FOLDER
    if not (folder / CONFIG_FILE).is_file():
        return None
    values = read_yaml((folder / CONFIG_FILE).read_text(encoding="utf-8"), CONFIG_FILE).values or {}
    began_from = (values.get("checkpoint") or {}).get("init_from")
    if began_from and (Path(began_from) / HF_FOLDER).is_dir():
        return Path(began_from) / HF_FOLDER
    tokenizer = (values.get("data") or {}).get("tokenizer")
    if tokenizer:
        path = Path(tokenizer)
        return path if path.is_dir() else path.parent if path.is_file() else None
    return None


def _target(weight: Weight, stored: torch.dtype, dtype: str) -> torch.dtype:
    if dtype == "auto" or (weight.kind == "router" and stored == torch.float32):
        return stored
    return DTYPES[dtype]


def _targets(weight: Weight, reader: DistributedReader, dtype: str) -> Iterator[tuple[str, Shape, torch.dtype]]:
    """Names, shapes and dtypes in the order in which `_tensors` brings them."""
    target = _target(weight, reader.tensors[weight.ours].dtype, dtype)
    for piece in weight.layout.pieces:
        for index in piece.parts:
            yield weight.theirs[index], weight.layout.parts[index], target


def _tensors(weight: Weight, reader: DistributedReader) -> Iterator[tuple[str, torch.Tensor]]:
    for piece in weight.layout.pieces:
        block = reader.read(weight.ours, piece.offset, piece.shape)
        yield from zip((weight.theirs[index] for index in piece.parts), weight.layout.unpack(piece, block), strict=True)
