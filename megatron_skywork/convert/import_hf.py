"""Hugging Face folder, GGUF file or folder of ours -> our weights-only folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.as_they_are import AsTheyAre
from megatron_skywork.convert.compare_names import dtype_name
from megatron_skywork.convert.files.checkpoint_folder import HF_FOLDER, carry_files, count_parameters, layout_summary, write_manifest, write_model_file
from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.convert.files.output_folder import check_outside
from megatron_skywork.convert.source import Source
from megatron_skywork.convert.sources import open_source
from megatron_skywork.convert.streaming.mcore_target import FILE_BYTES, McoreTarget
from megatron_skywork.convert.streaming.run import Job, Options, run
from megatron_skywork.convert.streaming.units import units_of
from megatron_skywork.convert.table import extra_states, weights

_PLAIN = Options()


def import_hf(place: Path | str, out: Path | str, options: Options = _PLAIN, file_bytes: int = FILE_BYTES) -> dict[str, Any]:
    """Convert a checkpoint to a weights-only folder of ours, every tensor in its own dtype.

    Args:
        place: Hugging Face folder (dense, Skywork-MoE, Mixtral, Qwen2-MoE, Qwen3-MoE) or GGUF file.

    Returns:
        family, layout, parameters, notes, and what `streaming.run.Outcome` tells.

    Raises:
        CheckpointError: the source does not fit, `out` exists, or the disk is too small.
    """
    source = open_source(place)
    check_outside(out, source.folder)
    model, moe = source.model, source.moe
    recipe = AsTheyAre(source.dtype_of)
    target = McoreTarget(units_of(weights(model, moe, source.description.naming), recipe), extra_states(model, moe), file_bytes)
    method = {"name": "import"}
    outcome = run(
        Job(
            label="import", recipe=recipe, target=target, read=lambda ref: source.reader.read(ref[1]), decides={"method": method},
            source_files=source.files, complete=our_folder(source, model, moe, method),
        ), out, options,
    )  # fmt: skip
    return {
        "out": str(out), "family": source.description.family, "layout": layout_summary(model, moe), "parameters": count_parameters(model, moe),
        "notes": source.description.notes, **outcome.as_dict(),
    }  # fmt: skip


def our_folder(source: Source, model: Model, moe: Moe | None, method: dict[str, Any]) -> Callable[[Path, Mapping[str, str], Mapping[str, str]], None]:
    """What lies beside the weights of a folder of ours, as `Job.complete`: sections, carried files, manifest; the completion marker last."""

    def complete(folder: Path, hashes: Mapping[str, str], source_hashes: Mapping[str, str]) -> None:
        write_model_file(folder, model, moe)
        if source.carried is not None:
            carry_files(source.carried, folder / HF_FOLDER)
        write_manifest(folder, {"kind": "weights", **origin(source, model, moe, method, source.dtype, source_hashes)}, dict(hashes))
        write_marker(folder)

    return complete


def origin(
    source: Source, model: Model, moe: Moe | None, method: dict[str, Any], dtype: torch.dtype, source_hashes: Mapping[str, str]
) -> dict[str, Any]:  # fmt: skip
    """The manifest's account of where weights come from; further sources (`FURTHER/NAME` in `Source.files`) have a list each, so that each can be verified."""
    files: dict[str, dict[str, str]] = {"": {}}
    for name, digest in source_hashes.items():
        further, _, rest = name.rpartition("/")
        files.setdefault(further, {})[rest] = digest
    account: dict[str, Any] = {"family": source.description.family, "files": files.pop("")}
    if files:
        account["further"] = [{"name": further, "files": digests} for further, digests in files.items()]
    return {
        "method": method, "source": account, "layout": layout_summary(model, moe), "parameters": count_parameters(model, moe), "dtype": dtype_name(dtype),
    }  # fmt: skip
