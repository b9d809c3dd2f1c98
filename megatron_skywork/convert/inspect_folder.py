"""What a checkpoint is, for people and for scripts: layout, parameters, dtype, step, and how alike the experts are.

Similarity of experts is the report's monitor of specialisation (appendix C): the cosine of flattened expert weights, mean over pairs. Copies give 1,
independent experts 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.checkpoint_folder import MANIFEST, count_parameters, describe, is_ours, layout_summary, step_of
from megatron_skywork.convert.compare_names import check_ours, dtype_name, main_dtype
from megatron_skywork.convert.hf_files import read_json
from megatron_skywork.convert.import_hf import open_source
from megatron_skywork.convert.mcore_files import DistributedReader
from megatron_skywork.convert.safe_pickle import check_metadata
from megatron_skywork.convert.table import Weight, weights


def inspect_folder(folder: Path | str, similarity: bool = True) -> dict[str, Any]:
    """Describe a Hugging Face folder or one of ours, after holding every tensor name and shape against the weight table.

    Returns:
        kind (`huggingface`, `weights`, `training`), family or step, layout, parameters, dtypes, bytes, expert_similarity (per MoE layer, and `mean`), method.

    Raises:
        CheckpointError: incomplete, damaged, or not what its config says.
    """
    folder = Path(folder)
    return _inspect_ours(folder, similarity) if is_ours(folder) else _inspect_hf(folder, similarity)


def _inspect_hf(folder: Path, similarity: bool) -> dict[str, Any]:
    source = open_source(folder)
    model, moe = source.description.model, source.description.moe
    infos = source.reader.tensors.values()
    result = {
        "kind": "huggingface",
        "family": source.description.family,
        "notes": source.description.notes,
        **_common(model, moe, [(info.shape, info.dtype) for info in infos]),
    }
    if moe is not None and similarity:
        result["expert_similarity"] = _similarity(model, moe, lambda weight, parts: (source.reader.read(weight.theirs[index]) for index in parts))
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
    }
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        result |= {"method": manifest.get("method"), "source": manifest.get("source"), "versions": manifest.get("versions")}
    if moe is not None and similarity:

        def boxes(weight: Weight, parts: tuple[int, ...]) -> Iterator[torch.Tensor]:
            for piece in weight.layout.pieces:
                if set(piece.parts) <= set(parts):
                    yield reader.read(weight.ours, piece.offset, piece.shape)

        result["expert_similarity"] = _similarity(model, moe, boxes)
    return result


def _common(model: Model, moe: Moe | None, tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for shape, dtype in tensors:
        dtypes[dtype_name(dtype)] = dtypes.get(dtype_name(dtype), 0) + torch.Size(shape).numel()
    total_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors)
    return {
        "layout": layout_summary(model, moe),
        "parameters": count_parameters(model, moe),
        "dtype": dtype_name(main_dtype(tensors)),
        "elements_by_dtype": dtypes,
        "bytes": total_bytes,
    }


def _similarity(model: Model, moe: Moe, read: Callable[[Weight, tuple[int, ...]], Iterator[torch.Tensor]]) -> dict[str, Any]:
    """Mean cosine over pairs of experts, layer by layer, without ever holding two experts.

    With unit vectors u_e, sum over pairs of u_e . u_f = (|sum u_e|^2 - E) / 2: one pass for the norms, one for the sum.
    """
    by_layer: dict[int, list[Weight]] = {}
    for weight in weights(model, moe):
        if weight.kind.startswith("expert_") and weight.layer is not None:
            by_layer.setdefault(weight.layer, []).append(weight)
    result: dict[str, float] = {}
    for layer, pair in by_layer.items():
        squares = [
            sum(float(block.double().square().sum()) for weight in pair for block in read(weight, _parts(weight, moe, expert)))
            for expert in range(moe.num_experts)
        ]
        summed_square = 0.0
        for weight in pair:
            sums: list[torch.Tensor] = []
            for expert, square in enumerate(squares):
                for index, block in enumerate(read(weight, _parts(weight, moe, expert))):
                    unit = block.float() / (square**0.5 or 1.0)
                    if expert == 0:
                        sums.append(unit)
                    else:
                        sums[index] += unit
            summed_square += sum(float(block.double().square().sum()) for block in sums)
        result[str(layer)] = (summed_square - moe.num_experts) / (moe.num_experts * (moe.num_experts - 1))
    return {"mean": sum(result.values()) / len(result), "layers": result}


def _parts(weight: Weight, moe: Moe, expert: int) -> tuple[int, ...]:
    each = len(weight.layout.parts) // moe.num_experts
    return tuple(range(expert * each, (expert + 1) * each))
