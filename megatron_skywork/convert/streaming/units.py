"""What a conversion is made of: units, each the boxes of one of our tensors that come from the same source tensors, so that those are read once.

A recipe says which source tensors a box needs and what is made of them; it knows nothing of files. A target (`mcore_target`, `hf_target`) says where the
results lie in files; it knows nothing of how they are made. Importing, exporting, resharding and upcycling are a recipe and a target each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_skywork.convert.layouts import Piece, numel
from megatron_skywork.convert.table import Weight

# A tensor of a source: the source's number (upcycling may read several dense models), and the tensor's Hugging Face name.
Ref = tuple[int, str]


@dataclass(frozen=True)
class Unit:
    """Boxes of one weight that share their sources.

    Attributes:
        pieces: the boxes, in the order in which they are made and written.
        sources: what has to be read for them; nothing for what is invented (a new router, the padding of a vocabulary).
        dtype: of every box.
    """

    weight: Weight
    pieces: tuple[Piece, ...]
    sources: tuple[Ref, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the boxes' numbers."""
        return sum(numel(piece.shape) for piece in self.pieces) * self.dtype.itemsize


class Recipe(Protocol):
    """How the parts of a target's weights are made from source tensors."""

    def sources(self, weight: Weight, piece: Piece) -> tuple[Ref, ...]:
        """The tensors a box is made from."""
        ...

    def dtype(self, weight: Weight) -> torch.dtype:
        """What the weight is written in."""
        ...

    def make(self, unit: Unit, tensors: list[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        """For every piece of the unit its parts (`weight.layout.parts[index]` for each index of `piece.parts`), in the unit's dtype."""
        ...


def units_of(weights: Iterable[Weight], recipe: Recipe) -> list[list[Unit]]:
    """All units, in clusters that read the same tensors and therefore belong into one file; in the order of the layers."""
    clusters: list[list[Unit]] = []
    cluster_of: dict[Ref, int] = {}
    for weight in weights:
        groups: dict[tuple[Ref, ...], list[Piece]] = {}
        for piece in weight.layout.pieces:
            groups.setdefault(recipe.sources(weight, piece), []).append(piece)
        for refs, pieces in groups.items():
            unit = Unit(weight, tuple(pieces), refs, recipe.dtype(weight))
            at = next((cluster_of[ref] for ref in refs if ref in cluster_of), None)
            if at is None:
                at = len(clusters)
                clusters.append([])
            clusters[at].append(unit)
            cluster_of.update(dict.fromkeys(refs, at))
    return clusters


def into_files(clusters: Iterable[list[Unit]], file_bytes: int) -> list[list[Unit]]:
    """Clusters one after another into files of about `file_bytes`; only a single cluster can be larger than that."""
    files: list[list[Unit]] = []
    filled = file_bytes
    for cluster in clusters:
        size = sum(unit.num_bytes for unit in cluster)
        if not files or filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1] += cluster
        filled += size
    return files
