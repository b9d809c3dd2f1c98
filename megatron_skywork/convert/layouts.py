"""How tensors of a Hugging Face checkpoint lie inside ours: invertible operations, and nothing else.

A layout knows the shape of our tensor (`whole`), the shapes of the source tensors (`parts`), and cuts our tensor into boxes (`pieces`), each made
from some of the parts. Streaming code works box by box, so that neither side is ever whole in memory; `forward` and `inverse` do all boxes at once.
`inverse(forward(parts)) == parts`, bit for bit: nothing here computes with values.

Shape letters: N query heads, G query groups (key/value heads), D head width, H hidden, F ffn, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of our tensor: where it starts, how large it is, and which parts it is made from."""

    offset: Shape
    shape: Shape
    parts: tuple[int, ...]


class Layout(ABC):
    """An invertible arrangement of source tensors in one of our tensors."""

    whole: Shape
    parts: tuple[Shape, ...]

    @property
    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """Boxes that cover `whole` without overlap; every part belongs to exactly one. A box without parts is padding."""

    def pack(self, piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The box's content from its parts, shape `piece.shape`. Plain boxes hold one part as it is."""
        return tensors[0].reshape(piece.shape)

    def unpack(self, piece: Piece, block: torch.Tensor) -> list[torch.Tensor]:
        """Inverse of `pack`."""
        return [block.reshape(self.parts[piece.parts[0]])]

    def forward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor, shape `whole`, from all parts."""
        whole = tensors[0].new_empty(self.whole)
        for piece in self.pieces:
            whole[box(piece)] = self.pack(piece, [tensors[index] for index in piece.parts])
        return whole

    def inverse(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """All parts from our tensor; inverse of `forward`."""
        found: dict[int, torch.Tensor] = {}
        for piece in self.pieces:
            found.update(zip(piece.parts, self.unpack(piece, whole[box(piece)]), strict=True))
        return [found[index].contiguous() for index in range(len(self.parts))]


def box(piece: Piece) -> tuple[slice, ...]:
    """The piece as an index into our tensor."""
    return tuple(slice(start, start + length) for start, length in zip(piece.offset, piece.shape, strict=True))


class Same(Layout):
    """One source tensor, unchanged."""

    def __init__(self, shape: Shape):
        self.whole, self.parts = shape, (shape,)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (Piece((0,) * len(self.whole), self.whole, (0,)),)


class PaddedVocab(Layout):
    """[V, H] with zero rows below it, up to the padded vocabulary; the inverse cuts them off."""

    def __init__(self, vocab: int, padded: int, hidden: int):
        self.vocab = vocab
        self.whole, self.parts = (padded, hidden), ((vocab, hidden),)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The rows as they are, and the padding as a box of its own: the largest matrix of a model is not copied."""
        padding = self.whole[0] - self.vocab
        rows = Piece((0, 0), self.parts[0], (0,))
        return (rows, Piece((self.vocab, 0), (padding, self.whole[1]), ())) if padding else (rows,)

    def pack(self, piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0] if piece.parts else torch.zeros(piece.shape)

    def unpack(self, piece: Piece, block: torch.Tensor) -> list[torch.Tensor]:
        return [block] if piece.parts else []


class QkvByGroup(Layout):
    """Query, key and value projections as megatron-core keeps them: for each query group its query heads, its key head, its value head.

    Parts: [N*D, ...], [G*D, ...], [G*D, ...] with the same trailing axes (H for weights, none for biases). Whole: [(N+2G)*D, ...].
    Both sides use the half-rotation form of rotary positions, so rows inside a head keep their order.
    """

    def __init__(self, heads: int, groups: int, head_dim: int, trailing: Shape = ()):
        self.groups, self.heads_per_group, self.head_dim, self.trailing = groups, heads // groups, head_dim, trailing
        self.parts = ((heads * head_dim, *trailing), (groups * head_dim, *trailing), (groups * head_dim, *trailing))
        self.whole = ((heads + 2 * groups) * head_dim, *trailing)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (Piece((0,) * len(self.whole), self.whole, (0, 1, 2)),)

    def pack(self, piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        by_group = [tensor.reshape(self.groups, -1, self.head_dim, *self.trailing) for tensor in tensors]
        return torch.cat(by_group, dim=1).reshape(self.whole)

    def unpack(self, piece: Piece, block: torch.Tensor) -> list[torch.Tensor]:
        by_group = block.reshape(self.groups, self.heads_per_group + 2, self.head_dim, *self.trailing)
        split = torch.split(by_group, [self.heads_per_group, 1, 1], dim=1)
        return [tensor.reshape(shape) for tensor, shape in zip(split, self.parts, strict=True)]


class Stacked(Layout):
    """Equal matrices below one another: the gate rows of a SwiGLU, then its up rows. Each is a box of its own, as megatron-core stores them."""

    def __init__(self, count: int, shape: Shape):
        self.parts = (shape,) * count
        self.whole = (count * shape[0], *shape[1:])

    @property
    def pieces(self) -> tuple[Piece, ...]:
        rest = (0,) * (len(self.whole) - 1)
        return tuple(Piece((index * shape[0], *rest), shape, (index,)) for index, shape in enumerate(self.parts))


class Experts(Layout):
    """The same layout for every expert, with the expert axis in front: [E, ...]. Parts are ordered expert by expert."""

    def __init__(self, experts: int, inner: Layout):
        self.inner = inner
        self.whole = (experts, *inner.whole)
        self.parts = inner.parts * experts
        self._experts = experts

    @property
    def pieces(self) -> tuple[Piece, ...]:
        each = len(self.inner.parts)
        return tuple(
            Piece((expert, *piece.offset), (1, *piece.shape), tuple(expert * each + index for index in piece.parts))
            for expert in range(self._experts)
            for piece in self.inner.pieces
        )

    def _inner_piece(self, piece: Piece) -> Piece:
        each = len(self.inner.parts)
        return Piece(piece.offset[1:], piece.shape[1:], tuple(index % each for index in piece.parts))

    def pack(self, piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.inner.pack(self._inner_piece(piece), tensors).unsqueeze(0)

    def unpack(self, piece: Piece, block: torch.Tensor) -> list[torch.Tensor]:
        return self.inner.unpack(self._inner_piece(piece), block.squeeze(0))


def numel(shape: Shape) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)
