"""Upcycling: a dense checkpoint becomes a mixture of experts.

Copy (Skywork-MoE report, section 3, after Komatsuzaki et al., arXiv 2212.05055): every chosen layer's feed-forward is copied into all experts, the router
is new, normal(0, router_init_std). Experts are equal and the weights of the chosen ones sum to 1, so at step 0 the mixture computes exactly what the dense
model computes, whatever the router says. Copy with noise adds normal(0, noise * std of the tensor) to each expert, which breaks that equality on purpose.

Every random number depends on (seed, tensor, layer, expert) alone, so the result is the same whatever the order or the number of workers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from pydantic import ValidationError

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.checkpoint_folder import count_parameters, layout_summary
from megatron_skywork.convert.compare_names import dtype_name
from megatron_skywork.convert.import_hf import Source, as_they_are, check_space, finish_folder, open_source, weight_bytes, write_weights
from megatron_skywork.convert.layouts import Piece
from megatron_skywork.convert.mcore_files import DistributedWriter
from megatron_skywork.convert.progress import Progress
from megatron_skywork.convert.staging import Staging, check_replaceable
from megatron_skywork.convert.table import Weight
from megatron_skywork.errors import CheckpointError, ConfigError

_EXPERT = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.experts\.\d+\.(w[123])\.weight")
_DENSE_NAME = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_GATE = ".block_sparse_moe.gate.weight"


@dataclass(frozen=True)
class UpcycleOptions:
    """What the mixture looks like and how its random part is made.

    Attributes:
        num_experts, topk: experts of every MoE layer, and how many a token is sent to.
        layers: indices (from 0) of the layers that become mixtures; None for all.
        gate_norm, gate_norm_scale: gate-logit normalization and its lambda.
        router_init_std: standard deviation of the new router's weights.
        seed: of the router and the noise.
        noise: noise added to each expert, as a share of its tensor's standard deviation; 0 copies exactly.
    """

    num_experts: int
    topk: int = 2
    layers: tuple[int, ...] | None = None
    gate_norm: bool = True
    gate_norm_scale: float = 1.0
    router_init_std: float = 0.01
    seed: int = 1234
    noise: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the result computes what the source computes: a copy does, where the chosen experts' weights sum to 1, which top-1 leaves out."""
        return self.noise == 0.0 and self.topk > 1


def moe_section(model: Model, options: UpcycleOptions) -> Moe:
    """The Moe section of the result: the given choices, capacity unset, everything else at its default.

    Raises:
        ConfigError: choices that make no model.
    """
    problems = []
    if options.layers is not None:
        outside = [layer for layer in options.layers if not 0 <= layer < model.num_layers]
        if outside or not options.layers:
            problems.append(f"--moe-layers: {outside or 'none given'}; the model has layers 0 to {model.num_layers - 1}")
    if options.noise < 0:
        problems.append(f"--noise={options.noise}: must be 0 or above")
    fields: dict[str, Any] = {key: getattr(options, key) for key in ("num_experts", "topk", "gate_norm", "gate_norm_scale", "router_init_std")}
    if options.layers is not None and len(set(options.layers)) < model.num_layers:
        fields["layers"] = sorted(set(options.layers))
    try:
        moe = Moe(**fields)
    except ValidationError as error:
        problems += [f"--{'-'.join(str(part) for part in item['loc']).replace('_', '-')}: {item['msg']}".replace("--: ", "") for item in error.errors()]
    if problems:
        raise ConfigError(problems)
    return moe


def plan(dense: Path | str, out: Path | str, options: UpcycleOptions) -> dict[str, Any]:
    """What `upcycle` would write, from names and shapes alone; no weight is read."""
    source = open_source(dense)
    model, moe = _sections(source, options)
    needed = weight_bytes(model, moe, source.dtype)
    free = check_space(Path(out), 0)
    return {
        "family": source.description.family, "dtype": dtype_name(source.dtype), "exact": options.exact, "layout": layout_summary(model, moe),
        "dense_parameters": count_parameters(model, None)["total"], "parameters": count_parameters(model, moe), "bytes": needed, "free_bytes": free,
        "fits": needed <= free, "notes": source.description.notes,
    }  # fmt: skip


def upcycle(
    dense: Path | str,
    out: Path | str,
    options: UpcycleOptions,
    overwrite: bool = False,
    progress: TextIO | None = None,
    accept: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a mixture of experts made from a dense Hugging Face folder.

    Args:
        accept: called with the finished folder before it gets its name; what it returns is added to the answer, and an exception from it leaves no output.

    Returns:
        layout, parameters, bytes, seconds, exact, notes, and what `accept` returned under `verify`.

    Raises:
        ConfigError: options that make no model.
        CheckpointError: the source does not fit or is no dense model, `out` exists, or the disk is too small.
    """
    check_replaceable(Path(out), overwrite)
    source = open_source(dense)
    model, moe = _sections(source, options)
    total = weight_bytes(model, moe, source.dtype)
    check_space(Path(out), total)
    with Staging(out, overwrite) as staged:
        bar = Progress("upcycle", total, progress)
        writer = DistributedWriter(staged, bar)
        write_weights(writer, model, moe, lambda name: None if name.endswith(_GATE) else source.reader.read(name), dense_name, _Maker(options))
        method = {"name": "copy with noise" if options.noise else "copy", "exact": options.exact, **asdict(options)}
        finish_folder(staged, source, model, moe, writer, method)
        seconds = bar.close()
        verified = {"verify": accept(staged)} if accept is not None else {}
    return {
        "out": str(out), "layout": layout_summary(model, moe), "parameters": count_parameters(model, moe), "bytes": bar.done_bytes,
        "seconds": round(seconds, 3), "exact": options.exact, "notes": source.description.notes, **verified,
    }  # fmt: skip


def _sections(source: Source, options: UpcycleOptions) -> tuple[Model, Moe]:
    if source.description.moe is not None:
        raise CheckpointError(
            f"{source.folder}: is a mixture of experts already; upcycling starts from a dense model "
            "(tools/convert_checkpoint.py import takes this one as it is)"
        )
    return source.description.model, moe_section(source.description.model, options)


def dense_name(name: str) -> str:
    """The dense tensor that an expert's tensor is copied from; any other name unchanged."""
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}mlp.{_DENSE_NAME[match[2]]}.weight" if match else name


class _Maker:
    """Contents of boxes: the router from its seed, experts with noise if asked for, the rest as it is."""

    def __init__(self, options: UpcycleOptions):
        self._options = options

    def __call__(self, weight: Weight, pieces: Sequence[Piece], tensors: list[torch.Tensor]) -> Iterable[torch.Tensor]:
        options = self._options
        if weight.kind == "router":
            shape = weight.layout.whole
            return (
                [torch.empty(shape).normal_(0.0, options.router_init_std, generator=_generator(options.seed, weight.ours, 0))]
                if options.router_init_std
                else [torch.zeros(shape)]
            )
        if weight.kind.startswith("expert_") and options.noise:
            block = weight.layout.pack(pieces[0], tensors)
            return (self._noisy(block, weight.ours, piece) for piece in pieces)
        return as_they_are(weight, pieces, tensors)

    def _noisy(self, block: torch.Tensor, name: str, piece: Piece) -> torch.Tensor:
        generator = _generator(self._options.seed, name, *piece.offset)
        noise = torch.empty(block.shape).normal_(0.0, 1.0, generator=generator)
        wide = block.float()
        return (wide + noise * (self._options.noise * wide.std())).to(block.dtype)


def _generator(seed: int, name: str, *numbers: int) -> torch.Generator:
    """A generator of its own for every box, so that no result depends on what was made before."""
    digest = hashlib.sha256(f"{seed}/{name}/{numbers}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
