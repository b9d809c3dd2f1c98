"""A tensor's numbers straight from their place in a file: no mapping that grows with what was read, and one copy in memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_skywork.convert.layouts import Shape
from megatron_skywork.errors import CheckpointError


def read_tensor(path: Path, offset: int, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor from `offset` on.

    Raises:
        CheckpointError: the file ends before it, or cannot be read.
    """
    tensor = torch.empty(shape, dtype=dtype)
    view = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset + done}, {offset + len(view)} were expected; the file is damaged")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return tensor


def read_part(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, or as many as there are."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)
