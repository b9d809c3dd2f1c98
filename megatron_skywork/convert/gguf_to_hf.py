"""GGUF file -> Hugging Face folder in bfloat16: the folder is then the reference that everything that follows is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_skywork.convert.as_they_are import AsTheyAre
from megatron_skywork.convert.files.checkpoint_folder import CARRIED_FILES, carry_files, write_manifest
from megatron_skywork.convert.gguf import open_gguf
from megatron_skywork.convert.import_hf import origin
from megatron_skywork.convert.streaming.hf_target import HfTarget
from megatron_skywork.convert.streaming.run import Job, Options, run
from megatron_skywork.convert.streaming.units import units_of
from megatron_skywork.convert.table import weights


def convert_gguf(gguf: Path | str, out: Path | str, options: Options | None = None) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors (bfloat16), tokenizer files, generation_config.json, manifest.json.

    Raises:
        CheckpointError: as `open_gguf`, or `out` exists.
    """
    source = open_gguf(gguf)
    recipe = AsTheyAre(source.dtype_of)
    method: dict[str, Any] = {"name": "gguf"}

    def complete(folder: Path, hashes: Mapping[str, str], source_hashes: Mapping[str, str]) -> None:
        assert source.carried is not None
        carry_files(source.carried, folder, CARRIED_FILES)
        write_manifest(folder, {"kind": "huggingface", **origin(source, source.model, source.moe, method, source.dtype, source_hashes)}, dict(hashes))

    target = HfTarget(units_of(weights(source.model, source.moe, source.description.naming), recipe))
    job = Job("gguf", recipe, target, lambda ref: source.reader.read(ref[1]), {"method": method}, source.files, complete)
    run(job, out, options or Options())
