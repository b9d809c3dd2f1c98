"""A checkpoint that was opened and checked: what a conversion reads from, whatever kind of folder or file it is (`sources` opens them)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.compare_names import main_dtype
from megatron_skywork.convert.families import Description
from megatron_skywork.convert.files.tensors import Reader
from megatron_skywork.convert.table import Weight
from megatron_skywork.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """A checkpoint that was opened and checked.

    Attributes:
        folder: where it lies.
        description: its family and its sections.
        reader: its tensors; `read` may be called from any thread.
        files: what a manifest names it by, each with its SHA-256; of our own folders the small files that name all others.
        carried: folder with its tokenizer and Hugging Face configs, where there is one.
        keep: whatever must live as long as the source.
    """

    folder: Path
    description: Description
    reader: Reader
    files: dict[str, Path]
    carried: Path | None
    keep: Any = field(default=None, repr=False)

    @property
    def model(self) -> Model:
        """What it is without its experts."""
        return self.description.model

    @property
    def moe(self) -> Moe | None:
        """Its experts, if it has any."""
        return self.description.moe

    @property
    def dtype(self) -> torch.dtype:
        """What most of its weights are stored in."""
        return main_dtype((info.shape, info.dtype) for info in self.reader.tensors.values())

    def dtype_of(self, weight: Weight) -> torch.dtype:
        """What the parts of a weight of this source are stored in.

        Raises:
            CheckpointError: they differ, and one tensor of ours holds them all.
        """
        found = {self.reader.tensors[name].dtype for name in weight.theirs}
        if len(found) > 1:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise CheckpointError(
                f"{self.folder}: the parts of {weight.ours} ({weight.theirs[0]}, ...) are stored as {kinds}; one tensor of ours holds them, convert them to one"
            )
        return found.pop()
