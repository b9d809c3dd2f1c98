"""What an upcycling would write and about how long it would take, from names and shapes alone: no weight is read.

The dense model may be described only: by a folder with a config.json and no weights, by a config.json, or by a run's configuration with a section `model:`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.config.yaml_strict import read_yaml
from megatron_skywork.convert.compare_names import dtype_name
from megatron_skywork.convert.families import choose_family, read_config
from megatron_skywork.convert.files.checkpoint_folder import count_parameters, layout_summary
from megatron_skywork.convert.files.output_folder import free_bytes
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.layouts import numel
from megatron_skywork.convert.source import Source
from megatron_skywork.convert.streaming.file_writer import BLOCK_BYTES, FileWriter
from megatron_skywork.convert.table import Weight, weights
from megatron_skywork.convert.upcycling.options import UpcycleOptions, moe_section
from megatron_skywork.convert.upcycling.recipe import UpcycleRecipe
from megatron_skywork.convert.upcycling.upcycle import MCORE, Output, open_sources, refuse_mixture
from megatron_skywork.errors import CheckpointError

_PROBE_BLOCKS = 32
_WEIGHTS = ("*.safetensors", "*.bin", "*.distcp", "*.gguf", "*.index.json")


def plan(dense: Path | str, out: Path | str, options: UpcycleOptions, output: Output = MCORE, probe: bool = True) -> dict[str, Any]:
    """What `upcycle` would write.

    Args:
        probe: write and delete 256 MiB where `out` will lie, and estimate the time from that.

    Returns:
        family, dtype, method, exact, inexact_because, layout, dense_parameters, parameters, bytes, free_bytes, fits, seconds_estimate, bytes_per_second (both
        None where they could not be measured), notes.

    Raises:
        ConfigError, CheckpointError: as `upcycle`.
    """
    family, model, dtype, notes, sources = _describe(dense, options)
    moe = moe_section(model, options)
    written_in = UpcycleRecipe(sources, model, options, {}).dtype if sources else lambda weight: torch.float32 if weight.kind == "router" else dtype
    if output.form == "hf":
        choose_family(model, moe, output.family)
    needed, free = weight_bytes(model, moe, written_in, padded=output.form == "mcore"), free_bytes(Path(out))
    rate = write_rate(Path(out)) if probe and free > 2 * _PROBE_BLOCKS * BLOCK_BYTES else None
    return {
        "family": family, "format": output.form, "dtype": dtype_name(dtype), "method": options.method, "exact": not options.why_inexact(model.ffn_hidden_size),
        "inexact_because": options.why_inexact(model.ffn_hidden_size), "layout": layout_summary(model, moe),
        "dense_parameters": count_parameters(model, None)["total"], "parameters": count_parameters(model, moe), "bytes": needed, "free_bytes": free,
        "fits": needed <= free, "bytes_per_second": rate, "seconds_estimate": needed / rate if rate else None, "notes": notes,
    }  # fmt: skip


def weight_bytes(model: Model, moe: Moe | None, dtype: Callable[[Weight], torch.dtype], padded: bool) -> int:
    """Bytes of all weights."""
    total = 0
    for weight in weights(model, moe):
        count = numel(weight.layout.whole) if padded else sum(numel(shape) for shape in weight.layout.parts)
        total += count * dtype(weight).itemsize
    return total


def write_rate(out: Path) -> float | None:
    """Bytes a second that are written and hashed on the disk where `out` will lie, as the conversion does it; None where nothing can be written yet."""
    parent = next(folder for folder in [out.absolute(), *out.absolute().parents] if os.path.isdir(folder))
    block = os.urandom(BLOCK_BYTES)
    try:
        with tempfile.TemporaryDirectory(prefix=".rate-", dir=parent) as folder:
            started = time.monotonic()
            with FileWriter(Path(folder) / "probe") as file:
                for _ in range(_PROBE_BLOCKS):
                    file.write(block)
                file.finish()
            return _PROBE_BLOCKS * BLOCK_BYTES / (time.monotonic() - started)
    except OSError:
        return None


def _describe(dense: Path | str, options: UpcycleOptions) -> tuple[str, Model, torch.dtype, list[str], list[Source]]:
    """Family, section model, dtype, notes, and the sources where weights are there."""
    place = Path(dense)
    if place.suffix in (".yaml", ".yml"):
        return "configuration", _section(place), torch.bfloat16, [f"{place.name} names no dtype; counted as bfloat16"], []
    config = place if place.suffix == ".json" else place / "config.json"
    if config.is_file() and (config is place or not any(True for pattern in _WEIGHTS for _ in place.glob(pattern))):
        content = json_object(config)
        described = read_config(content, str(config))
        refuse_mixture(config, described.moe)
        named = str(content.get("torch_dtype") or content.get("dtype") or "bfloat16").removeprefix("torch.")
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(named, torch.bfloat16)
        return described.family, described.model, dtype, [*described.notes, "planned from its config alone; no weights are there"], []
    sources = open_sources(dense, options)
    return sources[0].description.family, sources[0].model, sources[0].dtype, sources[0].description.notes, sources


def _section(path: Path) -> Model:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        document = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read as YAML (no UTF-8 at byte {error.start})") from error
    if document.problems:
        raise CheckpointError("\n".join(document.problems))
    values = document.values if isinstance(document.values, dict) else {}
    if not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path}: has no section model:, so it describes no dense model")
    try:
        model = Model(**values["model"])
    except ValidationError as error:
        lines = [f"  model.{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise CheckpointError(f"{path}: the section model describes no model:\n" + "\n".join(lines)) from error
    if values.get("moe") is not None:
        raise CheckpointError(f"{path}: has a section moe:, so it describes a mixture of experts already; upcycling starts from a dense model")
    return model
