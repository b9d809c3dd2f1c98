"""Where a conversion reads from: a Hugging Face folder, one of our folders (weights-only or saved by training), or a GGUF file; all by Hugging Face names.

A source is checked against the weight table when it is opened: names, shapes and dtypes, everything that does not fit at once. No weight is read for that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.config.yaml_strict import read_yaml
from megatron_skywork.convert.compare_names import check_hf, check_ours
from megatron_skywork.convert.families import ARCHITECTURES, Description, read_config, why_not
from megatron_skywork.convert.files.checkpoint_folder import CONFIG_FILE, HF_FOLDER, MANIFEST, MODEL_FILE, STATE_FILE, check_plain, describe, is_ours
from megatron_skywork.convert.files.hf_files import HfReader
from megatron_skywork.convert.files.marker import MARKER
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.files.tensors import TensorInfo
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.layouts import Piece
from megatron_skywork.convert.safety.safe_pickle import BACKEND, METADATA
from megatron_skywork.convert.source import Source
from megatron_skywork.convert.table import Weight, weights
from megatron_skywork.errors import CheckpointError

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def open_source(place: Path | str) -> Source:
    """Any checkpoint to read from.

    Raises:
        CheckpointError: nothing that can be read, unsupported settings, or tensors that do not fit; all are listed.
    """
    if not str(place):
        raise CheckpointError("the place of a checkpoint is empty; give a folder or a .gguf file")
    place = Path(place)
    if place.is_file() and place.suffix != ".gguf":
        only = "; a description like this is enough for --dry-run alone" if place.suffix in (".json", ".yaml", ".yml") else ""
        raise CheckpointError(f"{place}: is a file, and no .gguf; give the folder with the weights{only}")
    if place.suffix == ".gguf" and not place.is_dir():
        from megatron_skywork.convert.gguf import open_gguf

        return open_gguf(place)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; give a Hugging Face model folder with config.json and weights, a folder of ours, or a .gguf file")
    return open_ours(place) if is_ours(place) else open_hf(place)


def open_hf(folder: Path | str) -> Source:
    """A Hugging Face folder; errors as in `open_source`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a Hugging Face model folder with config.json and weights")
    description = read_config(json_object(folder / "config.json"), str(folder / "config.json"))
    reader = HfReader(folder)
    check_hf(reader, description.model, description.moe, description.naming)
    return Source(folder, description, reader, {path.name: path for path in [folder / "config.json", *reader.files]}, folder)


def open_ours(folder: Path | str) -> Source:
    """A folder of ours, its tensors under the names of its description.

    Raises:
        CheckpointError: incomplete, damaged, not what its sections say, or trained with settings no other format knows.
    """
    folder = Path(folder)
    model, moe = describe(folder)
    check_plain(folder)
    reader = DistributedReader(folder)
    check_ours(reader, model, moe)
    carried = carried_folder(folder)
    config = json_object(carried / "config.json") if carried is not None and (carried / "config.json").is_file() else {}
    family = default_family(config, model, moe)
    description = Description(family, model, moe, {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None})
    names = (METADATA, BACKEND, MARKER, MANIFEST, MODEL_FILE, CONFIG_FILE, STATE_FILE)
    files = {name: folder / name for name in names if (folder / name).is_file()}
    return Source(folder, description, OurTensors(reader, model, moe, description.naming), files, carried)


def under_names_of(source: Source, naming: str) -> Source:
    """The same source of ours with its tensors under the names of another family, a key of `table.NAMINGS`."""
    assert isinstance(source.reader, OurTensors)
    return replace(source, reader=OurTensors(source.reader.boxes, source.model, source.moe, naming))


def default_family(config: dict[str, Any], model: Model, moe: Moe | None) -> str:
    """Back to where the model came from if it is still of that kind; else the first family that can hold it."""
    came_from = config.get("model_type")
    backwards = (str(came_from),) if came_from in ("mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe") else ()
    usual = ("llama", "qwen2", "qwen3") if moe is None else ("skywork_moe",)
    return next((family for family in (*backwards, *usual, *ARCHITECTURES) if not why_not(family, model, moe)), usual[0])


def carried_folder(folder: Path) -> Path | None:
    """Where tokenizer files and the source's config are: in the folder, beside the weights training began from, or where the run's tokenizer is."""
    if (folder / HF_FOLDER).is_dir():
        return folder / HF_FOLDER
    if not (folder / CONFIG_FILE).is_file():
        return None
    values = read_yaml((folder / CONFIG_FILE).read_text(encoding="utf-8"), CONFIG_FILE).values or {}
    began_from = (values.get("checkpoint") or {}).get("init_from")
    if began_from and (Path(began_from) / HF_FOLDER).is_dir():
        return Path(began_from) / HF_FOLDER
    tokenizer = (values.get("data") or {}).get("tokenizer")
    if tokenizer:
        path = Path(tokenizer)
        return path if path.is_dir() else path.parent if path.is_file() else None
    return None


class OurTensors:
    """A distributed checkpoint under Hugging Face names: the boxes of ours, taken apart.

    Args:
        naming: whose names a mixture's tensors have, a key of `table.NAMINGS`.
    """

    def __init__(self, reader: DistributedReader, model: Model, moe: Moe | None, naming: str = "skywork_moe"):
        self.boxes, self.folder = reader, reader.folder
        self.tensors: dict[str, TensorInfo] = {}
        self._place_of: dict[str, tuple[Weight, Piece]] = {}
        self._last: tuple[Piece, Weight, list[torch.Tensor]] | None = None
        for weight in weights(model, moe, naming):
            dtype = reader.tensors[weight.ours].dtype
            for piece in weight.layout.pieces:
                for index in piece.parts:
                    self.tensors[weight.theirs[index]] = TensorInfo(weight.layout.parts[index], dtype)
                    self._place_of[weight.theirs[index]] = (weight, piece)

    def read(self, name: str) -> torch.Tensor:
        """One tensor; neighbours out of one box (query, key and value) cost one read."""
        if name not in self._place_of:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        weight, piece = self._place_of[name]
        last = self._last
        if last is None or last[0] is not piece or last[1] is not weight:
            parts = weight.layout.unpack(piece, self.boxes.read(weight.ours, piece.offset, piece.shape))
            last = (piece, weight, parts)
            self._last = last if len(parts) > 1 else None
        return last[2][[weight.theirs[index] for index in piece.parts].index(name)]
