"""Our folder (weights-only, or a training checkpoint from any layout) -> a Hugging Face folder that transformers loads.

A mixture of experts goes out in the Skywork-MoE-Base layout with its configuration and modeling files inside, or where it can be said in them as Mixtral,
Qwen2-MoE or Qwen3-MoE, which need no remote code; a dense model as LLaMA, Mistral, Qwen2 or Qwen3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.as_they_are import AsTheyAre
from megatron_skywork.convert.compare_names import dtype_name, main_dtype
from megatron_skywork.convert.families import choose_family, write_config
from megatron_skywork.convert.files.checkpoint_folder import TOKENIZER_FILES, carry_files, count_parameters, layout_summary, step_of, write_manifest
from megatron_skywork.convert.files.output_folder import check_outside
from megatron_skywork.convert.import_hf import origin
from megatron_skywork.convert.source import Source
from megatron_skywork.convert.sources import open_ours, under_names_of
from megatron_skywork.convert.streaming.hf_target import SHARD_BYTES, HfTarget
from megatron_skywork.convert.streaming.run import Job, Options, run
from megatron_skywork.convert.streaming.units import units_of
from megatron_skywork.convert.table import Weight, weights
from megatron_skywork.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REMOTE_CODE = Path(__file__).parent / "skywork_moe_hf"
REMOTE_FILES = ("configuration_skywork_moe.py", "modeling_skywork_moe.py")
_PLAIN = Options()


def export_hf(
    folder: Path | str, out: Path | str, family: str = "auto", dtype: str = "auto", tokenizer: Path | str | None = None, options: Options = _PLAIN,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:  # fmt: skip
    """Write a Hugging Face folder.

    Args:
        family: auto, or a Hugging Face model type that can hold the model.
        dtype: auto keeps every tensor as it is stored; bf16, fp16, fp32 casts all but a router that is stored in fp32,
            whose precision decides which expert a token goes to.
        tokenizer: folder with tokenizer files; by default the checkpoint's own, or those its config.yaml names.

    Returns:
        family, layout, parameters, dtype, step, names of the tokenizer files, and what `streaming.run.Outcome` tells.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint, or a family or dtype that does not fit.
    """
    if tokenizer is not None and not any((Path(tokenizer) / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"--tokenizer {tokenizer}: there is no tokenizer in it; give a folder with one of {', '.join(TOKENIZER_FILES)}")
    source = open_ours(folder)
    check_outside(out, source.folder)
    model, moe = source.model, source.moe
    family = choose_family(model, moe, source.description.family if family == "auto" else family)
    naming = family if moe is not None else "skywork_moe"
    source = under_names_of(source, naming)
    cast = cast_to(dtype, source.dtype_of)
    recipe = AsTheyAre(cast)
    target = HfTarget(units_of(weights(model, moe, naming), recipe), shard_bytes)
    stored = main_dtype((weight.layout.whole, cast(weight)) for weight in weights(model, moe, naming))
    method = {"name": "export", "family": family, "dtype": dtype, "step": step_of(Path(folder))}
    copied: list[str] = []
    outcome = run(
        Job(
            label="export", recipe=recipe, target=target, read=lambda ref: source.reader.read(ref[1]), decides={"method": method},
            source_files=source.files, complete=hf_folder(source, model, moe, family, stored, method, tokenizer, copied),
        ), out, options,
    )  # fmt: skip
    return {
        "out": str(out), "family": family, "layout": layout_summary(model, moe), "parameters": count_parameters(model, moe), "dtype": dtype_name(stored),
        "step": method["step"], "tokenizer_files": copied, **outcome.as_dict(),
    }  # fmt: skip


def cast_to(dtype: str, stored: Callable[[Weight], torch.dtype]) -> Callable[[Weight], torch.dtype]:
    """What each weight is written in: as it is stored, or in one dtype but for a router stored in fp32.

    Raises:
        CheckpointError: an unknown dtype.
    """
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"--dtype {dtype}: use auto, {', '.join(DTYPES)}")

    def chosen(weight: Weight) -> torch.dtype:
        found = stored(weight)
        return found if dtype == "auto" or (weight.kind == "router" and found == torch.float32) else DTYPES[dtype]

    return chosen


def hf_folder(
    source: Source, model: Model, moe: Moe | None, family: str, dtype: torch.dtype, method: dict[str, Any], tokenizer: Path | str | None, copied: list[str]
) -> Callable[[Path, Mapping[str, str], Mapping[str, str]], None]:
    """What lies beside the weights of a Hugging Face folder, as `Job.complete`; names of the tokenizer files go to `copied`."""

    def complete(folder: Path, hashes: Mapping[str, str], source_hashes: Mapping[str, str]) -> None:
        config = write_config(model, moe, family, dtype_name(dtype), source.description.token_ids)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if family == "skywork_moe":
            for name in REMOTE_FILES:
                (folder / name).write_text((REMOTE_CODE / name).read_text(encoding="utf-8"), encoding="utf-8")
        place = Path(tokenizer) if tokenizer is not None else source.carried
        copied[:] = carry_files(place, folder, (*TOKENIZER_FILES, "generation_config.json")) if place is not None else []
        write_manifest(folder, {"kind": "huggingface", **origin(source, model, moe, method, dtype, source_hashes)}, dict(hashes))

    return complete
