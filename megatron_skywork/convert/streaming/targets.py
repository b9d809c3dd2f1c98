"""What the two kinds of checkpoint folders have in common as targets of a conversion: every byte has its place before the first one is made.

Because places follow from names, shapes and dtypes alone, any worker on any machine can write any file, and files that were finished before an interruption
fit together with those that are written after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_skywork.convert.layouts import Piece
from megatron_skywork.convert.streaming.units import Unit


@dataclass(frozen=True)
class PlannedFile:
    """A file before it is written.

    Attributes:
        head: its first bytes.
        units: what follows, in order.
        num_bytes: its size.
    """

    name: str
    head: bytes
    units: Sequence[Unit]
    num_bytes: int


class Target(Protocol):
    """A folder that is to be written."""

    files: list[PlannedFile]

    def encode(self, unit: Unit, piece: Piece, parts: Sequence[torch.Tensor]) -> Iterator[Any]:
        """The bytes of one box, as buffers in order."""
        ...

    def finish(self, folder: Path) -> Mapping[str, str]:
        """Write the index once all files are there; returns the SHA-256 of what was written, as far as it is known."""
        ...
