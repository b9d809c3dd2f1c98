"""A tensor as `torch.save` writes it, without a copy of the tensor: what comes before its numbers, and what comes after.

torch leaves room for the numbers when it is told to skip them (`torch.serialization.skip_data`, made for writing them in a second pass), and everything around
them depends on shape and dtype alone. So a record's length is known before anything is read, and a large box is written straight from where it lies. The
archive's CRC of the numbers is left at 0, as torch itself does with `set_crc32_options(False)`: torch does not check it, and every file has a SHA-256.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import IO, Any, cast

import torch

from megatron_skywork.convert.layouts import Shape


class _WithHole(io.RawIOBase):
    """Collects what is written before and after the one stretch that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = bytearray(), bytearray()
        self.hole_bytes: int | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        (self.before if self.hole_bytes is None else self.after).extend(content)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != io.SEEK_CUR or self.hole_bytes is not None:
            raise io.UnsupportedOperation(f"seek({offset}, {whence})")
        self.hole_bytes = offset
        return self.tell()

    def tell(self) -> int:
        return len(self.before) + (self.hole_bytes or 0) + len(self.after)


@lru_cache(maxsize=4096)
def around(shape: Shape, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Head and tail of the record of a contiguous tensor; its numbers lie between them."""
    tensor = torch.empty(shape, dtype=dtype)  # its memory is never touched
    file = _WithHole()
    with torch.serialization.skip_data():
        torch.save(tensor, cast(IO[bytes], file))
    if file.hole_bytes != tensor.nbytes:
        raise RuntimeError(f"torch.save skipped {file.hole_bytes} bytes of a tensor of {tensor.nbytes}; this version of torch is not supported")
    return bytes(file.before), bytes(file.after)


def record(value: Any) -> bytes:
    """A small object as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The numbers of a tensor, in order; a view where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
