"""Upcycling: a dense checkpoint becomes a mixture of experts, as a folder of ours or a Hugging Face one.

Copy (Skywork-MoE report, section 3, after Komatsuzaki et al., arXiv 2212.05055): every chosen layer's feed-forward is copied into all experts, the router is
new. Experts are equal and the weights of the chosen ones sum to 1, so at step 0 the mixture computes exactly what the dense model computes, whatever the router
says. The other methods are in `methods`, their settings in `options`, and how they are put together in `recipe`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.compare_names import dtype_name
from megatron_skywork.convert.export_hf import hf_folder
from megatron_skywork.convert.families import choose_family
from megatron_skywork.convert.files.checkpoint_folder import count_parameters, layout_summary
from megatron_skywork.convert.files.output_folder import check_outside
from megatron_skywork.convert.files.torch_record import raw_bytes
from megatron_skywork.convert.import_hf import our_folder
from megatron_skywork.convert.source import Source
from megatron_skywork.convert.sources import open_source
from megatron_skywork.convert.streaming.hf_target import SHARD_BYTES, HfTarget
from megatron_skywork.convert.streaming.mcore_target import FILE_BYTES, McoreTarget
from megatron_skywork.convert.streaming.run import Job, Options, run
from megatron_skywork.convert.streaming.staged import Staged
from megatron_skywork.convert.streaming.targets import Target
from megatron_skywork.convert.streaming.units import Ref, units_of
from megatron_skywork.convert.table import extra_states, weights
from megatron_skywork.convert.upcycling.options import UpcycleOptions, moe_section
from megatron_skywork.convert.upcycling.recipe import UpcycleRecipe
from megatron_skywork.errors import CheckpointError

_PLAIN = Options()
# What only training reads, and may differ between models that are put together.
_FREE_FIELDS = {"init_std", "max_position_embeddings", "vocab_divisible_by"}


@dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
        form: `mcore`, a folder of ours, or `hf`, a Hugging Face folder.
        family: of a Hugging Face folder, or auto.
        file_bytes: about the size of a file; None for the form's own.
    """

    form: str = "mcore"
    family: str = "auto"
    file_bytes: int | None = None


MCORE = Output()


def upcycle(
    dense: Path | str, out: Path | str, options: UpcycleOptions, output: Output = MCORE, run_options: Options = _PLAIN,
    accept: Callable[[Path], dict[str, Any]] | None = None, routers: Callable[[Moe], Mapping[int, torch.Tensor]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a mixture of experts made from a dense checkpoint (and from others, for `options.expert_sources`).

    Args:
        accept: called with the finished folder before it gets its name; what it returns is added to the answer, and an exception from it leaves no output.
        routers: for router_init text: the rows of each MoE layer.

    Returns:
        layout, parameters, exact, inexact_because, notes, what `streaming.run.Outcome` tells, and what `accept` returned under `verify`.

    Raises:
        ConfigError: options that make no model.
        CheckpointError: a source does not fit or is no dense model, `out` exists, or the disk is too small.
    """
    if run_options.ranks.rank == 0:
        Staged(out, "", run_options.overwrite).check_out()
    sources = open_sources(dense, options)
    for source in sources:
        check_outside(out, source.folder)
    model = sources[0].model
    moe = moe_section(model, options)
    rows = routers(moe) if routers is not None else {}
    recipe = UpcycleRecipe(sources, model, options, rows)
    method = options.recorded(model.ffn_hidden_size)
    family = choose_family(model, moe, output.family) if output.form == "hf" else "skywork_moe"
    source = _joined(sources, options)
    complete = (
        hf_folder(source, model, moe, family, source.dtype, method, None, []) if output.form == "hf" else our_folder(source, model, moe, method)
    )  # fmt: skip

    def read(ref: Ref) -> torch.Tensor:
        return sources[ref[0]].reader.read(ref[1])

    target = _target(model, moe, family, recipe, output)
    # Rows from text depend on more than the options: how much of the text was read, and on how many threads.
    drawn = {layer: hashlib.sha256(raw_bytes(rows_EH)).hexdigest() for layer, rows_EH in rows.items()}
    decides = {"method": method, "form": output.form, "family": family, "routers": drawn}
    job = Job("upcycle", recipe, target, read, decides, source.files, complete, accept)
    outcome = run(job, out, run_options)
    return {
        "out": str(out), "format": output.form, "layout": layout_summary(model, moe), "parameters": count_parameters(model, moe), "method": options.method,
        "exact": method["exact"], "inexact_because": options.why_inexact(model.ffn_hidden_size), "notes": source.description.notes, **outcome.as_dict(),
    }  # fmt: skip


def _target(model: Model, moe: Moe, family: str, recipe: UpcycleRecipe, output: Output) -> Target:
    clusters = units_of(weights(model, moe, family), recipe)
    if output.form == "hf":
        return HfTarget(clusters, output.file_bytes or SHARD_BYTES)
    return McoreTarget(clusters, extra_states(model, moe), output.file_bytes or FILE_BYTES)


def open_sources(dense: Path | str, options: UpcycleOptions) -> list[Source]:
    """The dense models, the main one first.

    Raises:
        CheckpointError: one of them is a mixture already, or they differ in what they compute with.
    """
    sources = [open_source(place) for place in (dense, *(place for place, _ in options.expert_sources))]
    for source in sources:
        refuse_mixture(source.folder, source.moe)
    problems = [line for other in sources[1:] for line in _differences(sources[0], other)]
    if problems:
        raise CheckpointError("dense models of one mixture must come from one seed model:\n" + "\n".join("  " + line for line in problems))
    return sources


def refuse_mixture(place: Path | str, moe: Moe | None) -> None:
    """Raise a CheckpointError for a source that has experts already."""
    if moe is not None:
        raise CheckpointError(
            f"{place}: is a mixture of experts already; upcycling starts from a dense model (tools/convert_checkpoint.py import takes this one as it is)"
        )


def _differences(first: Source, other: Source) -> list[str]:
    names = [name for name in type(first.model).model_fields if name not in _FREE_FIELDS]
    pairs = [(name, getattr(first.model, name), getattr(other.model, name)) for name in names]
    found = [f"{other.folder}: model.{name} is {there}, and {here} in {first.folder}" for name, here, there in pairs if here != there]
    if first.dtype != other.dtype:
        found.append(f"{other.folder}: is stored in {dtype_name(other.dtype)}, and {first.folder} in {dtype_name(first.dtype)}")
    return found


def _joined(sources: Sequence[Source], options: UpcycleOptions) -> Source:
    """The main source, with the files of all that decides the result: those of the others under their folders' names, and the texts for the routers."""
    files = dict(sources[0].files)
    for number, source in enumerate(sources[1:], start=1):
        files |= {f"{number}-{source.folder.name}/{name}": path for name, path in source.files.items()}
    files |= {f"router-text-{number}/{Path(text).name}": Path(text) for number, text in enumerate(options.router_texts, start=1)}
    return replace(sources[0], files=files)
