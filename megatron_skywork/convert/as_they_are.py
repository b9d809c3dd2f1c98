"""The plain conversion: every part is the source's tensor of that name, as it is or in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_skywork.convert.layouts import Piece
from megatron_skywork.convert.streaming.units import Ref, Unit
from megatron_skywork.convert.table import Weight


class AsTheyAre:
    """A recipe (`streaming.units.Recipe`) for a source whose names are those of the weights.

    Args:
        dtype: what each weight is written in.
    """

    def __init__(self, dtype: Callable[[Weight], torch.dtype]):
        self._dtype = dtype

    def sources(self, weight: Weight, piece: Piece) -> tuple[Ref, ...]:
        """One tensor for each part."""
        return tuple((0, weight.theirs[index]) for index in piece.parts)

    def dtype(self, weight: Weight) -> torch.dtype:
        """As it was given."""
        return self._dtype(weight)

    def make(self, unit: Unit, tensors: list[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        """Each piece has sources of its own, so there is one in a unit; or several boxes of padding, of no source at all."""
        for _ in unit.pieces:
            yield [tensor.to(unit.dtype) for tensor in tensors]
