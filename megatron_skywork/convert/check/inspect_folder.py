"""What a checkpoint is, for people and for scripts: layout, parameters, dtype, step, how it was made, and how alike the experts are.

Similarity of experts is the report's monitor of specialisation (appendix C): the cosine of flattened expert weights, mean over pairs. Copies give 1,
independent experts 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.compare_names import check_ours, dtype_name, main_dtype
from megatron_skywork.convert.files.checkpoint_folder import MANIFEST, count_parameters, describe, is_ours, layout_summary, step_of
from megatron_skywork.convert.files.marker import MARKER, list_files
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.safety.safe_pickle import check_metadata
from megatron_skywork.convert.sources import open_hf
from megatron_skywork.convert.table import Weight, weights

# What training keeps beside the weights, by the item's name; the first that fits.
_STATE = (
    (re.compile(r".*_extra_state(/.*)?"), "empty module states"),
    (re.compile(r"optimizer\.state\.param\..*"), "fp32 master weights"),
    (re.compile(r"(chained_\d+\.)?optimizer\..*"), "optimizer moments"),
    (re.compile(r".*\.router\.aux_coefficient"), "adaptive coefficients"),
    (re.compile(r".*\.router\..*"), "other router state"),
    (re.compile(r"rng(_state)?(/.*)?"), "random states"),
    (re.compile(r"probe(/.*)?"), "routing of the last evaluation"),
)
_CHUNK_NUMBERS = 1 << 22
# The tensors of some of the experts' parts, one after another: (weight, numbers of the parts).
Read = Callable[[Weight, tuple[int, ...]], Iterable[torch.Tensor]]


def inspect_folder(folder: Path | str, similarity: bool = True) -> dict[str, Any]:
    """Describe a Hugging Face folder or one of ours, after holding every tensor name and shape against the weight table.

    Args:
        similarity: also compare the experts, which reads every one of them twice.

    Returns:
        kind (`huggingface`, `weights`, `training`), family or step, layout, parameters, dtype, elements_by_dtype, bytes, expert_similarity (`mean`, and by
        MoE layer from 0), state (a sentence about what training keeps beside the weights), method, source, versions, manifest (whether the files have the
        sizes recorded there; `verify` compares contents).

    Raises:
        CheckpointError: incomplete, damaged, or not what its config says.
    """
    folder = Path(folder)
    return {**(_inspect_ours(folder, similarity) if is_ours(folder) else _inspect_hf(folder, similarity)), **_origin(folder)}


def _inspect_hf(folder: Path, similarity: bool) -> dict[str, Any]:
    source = open_hf(folder)
    described = source.description
    infos = source.reader.tensors.values()
    result = {
        "kind": "huggingface",
        "family": described.family,
        "notes": described.notes,
        **_common(described.model, described.moe, [(info.shape, info.dtype) for info in infos]),
    }
    if described.moe is not None and similarity:

        def read(weight: Weight, parts: tuple[int, ...]) -> Iterator[torch.Tensor]:
            return (source.reader.read(weight.theirs[index]) for index in parts)

        result["expert_similarity"] = expert_similarity(weights(described.model, described.moe, described.naming), described.moe.num_experts, read)
    return result


def _inspect_ours(folder: Path, similarity: bool) -> dict[str, Any]:
    model, moe = describe(folder)
    check_metadata(folder)
    reader = DistributedReader(folder)
    check_ours(reader, model, moe)
    step = step_of(folder)
    result = {
        "kind": "weights" if step is None else "training",
        "step": step,
        **_common(model, moe, [(info.shape, info.dtype) for info in reader.tensors.values()]),
        "state": state_sentence(reader.other_keys),
    }
    if moe is not None and similarity:

        def read(weight: Weight, parts: tuple[int, ...]) -> Iterator[torch.Tensor]:
            return (reader.read(weight.ours, piece.offset, piece.shape) for piece in weight.layout.pieces if set(piece.parts) <= set(parts))

        result["expert_similarity"] = expert_similarity(weights(model, moe), moe.num_experts, read)
    return result


def _common(model: Model, moe: Moe | None, tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for shape, dtype in tensors:
        dtypes[dtype_name(dtype)] += torch.Size(shape).numel()
    return {
        "layout": layout_summary(model, moe),
        "parameters": count_parameters(model, moe),
        "dtype": dtype_name(main_dtype(tensors)),
        "elements_by_dtype": dict(dtypes),
        "bytes": sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors),
    }


def state_sentence(keys: Iterable[str]) -> str:
    """What else a checkpoint holds, for people: kinds of items with their numbers."""
    counts: Counter[str] = Counter()
    for key in keys:
        counts[next((kind for pattern, kind in _STATE if pattern.fullmatch(key)), f"unknown items ({key.partition('.')[0]}...)")] += 1
    del counts["empty module states"]  # names that megatron-core asks for, with nothing behind them
    return "holds also " + ", ".join(f"{kind} ({count})" for kind, count in counts.items()) if counts else "holds weights only"


def _origin(folder: Path) -> dict[str, Any]:
    """How the folder came to be, where a manifest says it."""
    if not (folder / MANIFEST).is_file():
        return {"manifest": "none, so what this was made from is not recorded"}
    manifest = json_object(folder / MANIFEST)
    recorded = manifest.get("files")
    entries = recorded if isinstance(recorded, dict) else {}
    there = {name: (folder / name).stat().st_size for name in list_files(folder) if name not in (MANIFEST, MARKER)}
    expected = {name: entry.get("bytes") if isinstance(entry, dict) else None for name, entry in entries.items()}
    differing = sorted(name for name in there.keys() | expected.keys() if there.get(name) != expected.get(name))
    said = f"files differ from it: {', '.join(differing)}" if differing else f"its {len(expected)} files are there in their recorded sizes"
    return {"manifest": said, **{key: manifest[key] for key in ("method", "source", "versions") if key in manifest}}


# ------------------------------------------------------------------------------------------------------------------------------- similarity


def expert_similarity(all_weights: Iterable[Weight], num_experts: int, read: Read) -> dict[str, Any]:
    """Mean cosine over pairs of experts, layer by layer, without ever holding two experts.

    With unit vectors u_e, sum over pairs of u_e . u_f = (|sum u_e|^2 - E) / 2: one pass for the norms, one for the sum. An expert of zeros counts as
    orthogonal to all. Squares are summed in fp64, a few million numbers at a time.
    """
    by_layer: dict[int, list[Weight]] = {}
    for weight in all_weights:
        if weight.kind.startswith("expert_") and weight.layer is not None:
            by_layer.setdefault(weight.layer, []).append(weight)
    result: dict[str, float] = {}
    for layer, matrices in by_layer.items():
        squares = [
            sum(_square(block) for weight in matrices for block in read(weight, _parts(weight, num_experts, expert))) for expert in range(num_experts)
        ]
        summed_square = 0.0
        for weight in matrices:
            sums: list[torch.Tensor] = []
            for expert, square in enumerate(squares):
                for index, block in enumerate(read(weight, _parts(weight, num_experts, expert))):
                    if expert == 0:
                        sums.append(torch.zeros(block.shape))
                    for total, piece in zip(sums[index].view(-1).split(_CHUNK_NUMBERS), block.reshape(-1).split(_CHUNK_NUMBERS), strict=True):
                        total.add_(piece.float(), alpha=square**-0.5 if square else 0.0)
            summed_square += sum(_square(block) for block in sums)
        nonzero = sum(square > 0 for square in squares)
        result[str(layer)] = (summed_square - nonzero) / (num_experts * (num_experts - 1))
    return {"mean": sum(result.values()) / len(result), "layers": result}


def _square(block: torch.Tensor) -> float:
    return sum(float(piece.double().square().sum()) for piece in block.reshape(-1).split(_CHUNK_NUMBERS))


def _parts(weight: Weight, num_experts: int, expert: int) -> tuple[int, ...]:
    each = len(weight.layout.parts) // num_experts
    return tuple(range(expert * each, (expert + 1) * each))
