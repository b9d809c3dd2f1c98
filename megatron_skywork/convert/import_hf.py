"""Hugging Face folder -> our weights-only folder: every box of every tensor, read, arranged and written one after another."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.checkpoint_folder import HF_FOLDER, carry_files, count_parameters, layout_summary, sha256_of, write_manifest, write_model_file
from megatron_skywork.convert.compare_names import check_hf, dtype_name, main_dtype
from megatron_skywork.convert.families import Description, read_config
from megatron_skywork.convert.hf_files import HfReader, read_json
from megatron_skywork.convert.layouts import Piece, numel
from megatron_skywork.convert.marker import write_marker
from megatron_skywork.convert.mcore_files import DistributedWriter
from megatron_skywork.convert.progress import Progress, human
from megatron_skywork.convert.staging import Staging
from megatron_skywork.convert.table import Weight, extra_states, weights
from megatron_skywork.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that was checked against the table."""

    folder: Path
    description: Description
    reader: HfReader

    @property
    def dtype(self) -> torch.dtype:
        """What most of its weights are stored in."""
        return main_dtype((info.shape, info.dtype) for info in self.reader.tensors.values())


def open_source(folder: Path | str) -> Source:
    """Read a folder's config and tensor names, and check both.

    Raises:
        CheckpointError: unsupported settings, or tensors that do not fit; all are listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a Hugging Face model folder with config.json and weights")
    description = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    reader = HfReader(folder)
    check_hf(reader, description.model, description.moe, description.naming)
    return Source(folder, description, reader)


# Makes the contents of one or more equal boxes: (weight, pieces that share their sources, source tensors) -> a box for each piece.
Make = Callable[[Weight, Sequence[Piece], list[torch.Tensor]], Iterable[torch.Tensor]]


def as_they_are(weight: Weight, pieces: Sequence[Piece], tensors: list[torch.Tensor]) -> Iterable[torch.Tensor]:
    """The plain conversion: pieces that share their sources are equal, so the box is made once."""
    block = weight.layout.pack(pieces[0], tensors)
    return [block] * len(pieces)


def write_weights(
    writer: DistributedWriter, model: Model, moe: Moe | None, read: Callable[[str], torch.Tensor | None], rename: Callable[[str], str], make: Make = as_they_are
) -> None:
    """Write every weight of a model. Each source tensor is read once for each of our tensors, however many boxes it fills.

    Args:
        writer: where boxes go; it is left open.
        model, moe: what is written.
        read: a source tensor by its name; None for a name that has no source, whose boxes `make` invents.
        rename: the table's Hugging Face name -> the name to read (upcycling reads one dense tensor for all experts).
        make: contents of the boxes.
    """
    for weight in weights(model, moe):
        groups: dict[tuple[str, ...], list[Piece]] = {}
        for piece in weight.layout.pieces:
            groups.setdefault(tuple(rename(weight.theirs[index]) for index in piece.parts), []).append(piece)
        for names, pieces in groups.items():
            tensors = [tensor for tensor in map(read, names) if tensor is not None]
            for piece, block in zip(pieces, make(weight, pieces, tensors), strict=True):
                writer.add(weight.ours, weight.layout.whole, piece.offset, block)
    for key in extra_states(model, moe):
        writer.add_empty_object(key)


def weight_bytes(model: Model, moe: Moe | None, dtype: torch.dtype) -> int:
    """Bytes of all weights in one dtype, vocabulary padding included."""
    return sum(numel(weight.layout.whole) for weight in weights(model, moe)) * dtype.itemsize


def check_space(out: Path, needed_bytes: int) -> int:
    """Free bytes where `out` will lie.

    Raises:
        CheckpointError: they do not suffice.
    """
    parent = next(folder for folder in [out.absolute(), *out.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise CheckpointError(f"{out}: needs {human(needed_bytes)}, and {human(free)} are free on that disk; free some, or choose another --out")
    return free


def finish_folder(folder: Path, source: Source, model: Model, moe: Moe | None, writer: DistributedWriter, method: dict[str, Any]) -> None:
    """Everything beside the weights: sections, carried files, manifest; the completion marker last."""
    writer.finish()
    write_model_file(folder, model, moe)
    carry_files(source.folder, folder / HF_FOLDER)
    manifest = {
        "kind": "weights",
        "method": method,
        "source": {
            "family": source.description.family,
            "files": {path.name: sha256_of(path) for path in [source.folder / "config.json", *source.reader.files]},
        },
        "layout": layout_summary(model, moe),
        "parameters": count_parameters(model, moe),
        "dtype": dtype_name(source.dtype),
    }
    write_manifest(folder, manifest, writer.sha256)
    write_marker(folder)


def import_hf(folder: Path | str, out: Path | str, overwrite: bool = False, progress: TextIO | None = None) -> dict[str, Any]:
    """Convert a Hugging Face folder (dense, Skywork-MoE or Mixtral) to a weights-only folder of ours, every tensor in its own dtype.

    Returns:
        family, layout, parameters, notes, bytes.

    Raises:
        CheckpointError: the source does not fit, `out` exists, or the disk is too small.
    """
    source = open_source(folder)
    model, moe = source.description.model, source.description.moe
    total = weight_bytes(model, moe, source.dtype)
    check_space(Path(out), total)
    with Staging(out, overwrite) as staged:
        bar = Progress("import", total, progress)
        writer = DistributedWriter(staged, bar)
        write_weights(writer, model, moe, source.reader.read, rename=lambda name: name)
        finish_folder(staged, source, model, moe, writer, {"name": "import"})
        bar.close()
    return {
        "family": source.description.family,
        "layout": layout_summary(model, moe),
        "parameters": count_parameters(model, moe),
        "notes": source.description.notes,
        "bytes": bar.done_bytes,
    }
