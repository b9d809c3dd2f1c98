"""A large matrix a few rows at a time, so that fp32 work on a bf16 matrix never needs the whole of it in fp32.

The chunks depend on the shape alone. Random numbers are drawn chunk by chunk, so another chunk size would be another result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_skywork.errors import CheckpointError

CHUNK_ELEMENTS = 1 << 20


def rows_per_chunk(row_elements: int) -> int:
    """Rows of `row_elements` each that make one chunk, at least 1."""
    return max(1, CHUNK_ELEMENTS // max(1, row_elements))


def row_chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of `matrix` [rows, columns], first rows first."""
    yield from matrix.split(rows_per_chunk(matrix.shape[1]))


def scaled(matrix: torch.Tensor, scale: float) -> torch.Tensor:
    """`matrix` times `scale`, computed in fp32, in the dtype of `matrix`; a power of two changes exponents alone and rounds nothing.

    Raises:
        CheckpointError: the product does not fit the dtype (fp16 ends at 65504).
    """
    if scale == 1.0:
        return matrix
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for source, target in zip(row_chunks(matrix), row_chunks(out), strict=True):
        target.copy_(source.to(torch.float32, copy=True).mul_(scale))
        if not torch.isfinite(target).all() and torch.isfinite(source).all():
            raise CheckpointError(
                f"a weight of {source.abs().max().item():g} times {scale:g} does not fit {str(matrix.dtype).removeprefix('torch.')}; "
                "convert the dense checkpoint to bfloat16 or float32 first"
            )
    return out
