"""Holds a folder's tensors against the weight table: what is missing, left over, of a wrong shape or dtype, all at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.files.tensors import Reader, TensorInfo
from megatron_skywork.convert.layouts import Shape, numel
from megatron_skywork.convert.safety.shown import brief, first_lines
from megatron_skywork.convert.table import HF_BUFFERS, moe_layers, weights
from megatron_skywork.errors import CheckpointError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_UNLISTED = 10_000
_BUFFERS = re.compile("|".join(re.escape(name).replace(re.escape("{layer}"), r"\d+") for name in HF_BUFFERS))


def check_hf(reader: Reader, model: Model, moe: Moe | None, naming: str = "skywork_moe") -> None:
    """Hugging Face tensors against the table.

    Args:
        naming: whose words a mixture's tensors have, as for `table.weights`.

    Raises:
        CheckpointError: with one line for each tensor that is wrong, up to `SHOWN_LINES` of them.
    """
    sparse = len(moe_layers(model, moe))
    _check_count(str(reader.folder), model.num_layers + (3 * moe.num_experts * sparse if moe is not None else 0), len(reader.tensors))
    expected = {name: shape for weight in weights(model, moe, naming) for name, shape in zip(weight.theirs, weight.layout.parts, strict=True)}
    found = {name: info for name, info in reader.tensors.items() if not _BUFFERS.fullmatch(name)}
    if model.tie_embeddings and "lm_head.weight" in found:
        _check_tied(reader)
        del found["lm_head.weight"]
    _compare(str(reader.folder), expected, found)


def check_ours(reader: DistributedReader, model: Model, moe: Moe | None) -> None:
    """Tensors of a distributed checkpoint against the table; errors as in `check_hf`."""
    _check_count(str(reader.folder), model.num_layers, len(reader.tensors))
    if moe is not None:
        # All experts of a layer are one tensor, whose first axis counts them.
        _check_count(str(reader.folder), moe.num_experts, max((info.shape[0] for info in reader.tensors.values() if info.shape), default=0))
    _compare(str(reader.folder), {weight.ours: weight.layout.whole for weight in weights(model, moe)}, reader.tensors)


def _check_count(where: str, claimed: int, there: int) -> None:
    """A description of a few bytes can claim layers and experts by the billion: their names are made only where about as many tensors are there."""
    if claimed > 2 * there + _UNLISTED:
        raise CheckpointError(f"{where}: its description claims {claimed:,} or more tensors of layers and experts, and the files hold {there:,}; "
                              "correct the numbers of layers and experts, or complete the files")  # fmt: skip


def _check_tied(reader: Reader) -> None:
    """Some writers store a tied output layer too. It must be the embedding, or the model is not tied."""
    if not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")):
        raise CheckpointError(
            f"{reader.folder}: tie_word_embeddings is true, and lm_head.weight differs from model.embed_tokens.weight; "
            "set it to false in config.json, or remove lm_head.weight"
        )


def _compare(where: str, expected: dict[str, Shape], found: dict[str, TensorInfo]) -> None:
    problems = [f"{name}: missing, shape {shape} expected" for name, shape in expected.items() if name not in found]
    problems += [
        f"{brief(name)}: left over, shape {info.shape}; the model described by the config has no place for it"
        for name, info in found.items()
        if name not in expected
    ]
    for name, shape in expected.items():
        info = found.get(name)
        if info is not None and info.shape != shape:
            problems.append(f"{name}: shape {info.shape}, {shape} expected")
        if info is not None and info.dtype not in FLOATS:
            problems.append(f"{name}: dtype {dtype_name(info.dtype)}; float32, bfloat16 or float16 expected")
    if problems:
        lines = first_lines([f"  {line}" for line in problems])
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit the model:\n" + "\n".join(lines))


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def main_dtype(infos: Iterable[tuple[Shape, torch.dtype]]) -> torch.dtype:
    """The dtype that most elements have."""
    counts: Counter[torch.dtype] = Counter()
    for shape, dtype in infos:
        counts[dtype] += numel(shape)
    return counts.most_common(1)[0][0]
