"""Whether an .idx and a .bin belong together, by their own content: each sequence begins where the one before it ends, and the last one ends with the .bin.

Layout of an .idx with N sequences and D documents: 34 bytes of header, N int32 lengths, N int64 offsets in bytes, (D + 1) int64 document ends. Offsets repeat
what lengths say, so a cut of either file and any single changed bit of the lengths or offsets is noticed without a side file; so is a pair of two datasets.
The whole .idx is read, a hundredth of the .bin, in parts: 0.1 s for ten million sequences.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_skywork.errors import DataError

# Magic, version 1, code of the dtype, number of sequences, number of entries of the document index.
IDX_HEADER = struct.Struct("<9sQBQQ")
IDX_MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}  # megatron-core's; 6 and 7 are floating point, which no id is
_SEQUENCES_AT_ONCE = 1 << 20
_AGAIN = "the dataset is damaged: copy or write it again"


@dataclass(frozen=True)
class Structure:
    """What an .idx describes.

    Attributes:
        dtype: numpy name of the ids in the .bin.
        num_sequences, num_documents, num_tokens: a document is one or more sequences.
    """

    dtype: str
    num_sequences: int
    num_documents: int
    num_tokens: int


def read_structure(idx_path: Path, bin_path: Path) -> Structure:
    """Read the whole .idx and hold it against the size of the .bin.

    Raises:
        DataError: a file is missing or unreadable, or the two do not belong together; names the first sequence or document that is wrong.
    """
    try:
        bin_bytes, idx_bytes = bin_path.stat().st_size, idx_path.stat().st_size
        with open(idx_path, "rb") as stream:
            dtype, num_sequences, num_ends = _header(stream, idx_path, idx_bytes)
            num_bytes = _check_sequences(stream, idx_path, num_sequences, np.dtype(dtype).itemsize, bin_bytes)
            _check_documents(stream, idx_path, num_sequences, num_ends)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such file; a dataset is PREFIX.bin and PREFIX.idx") from error
    except OSError as error:
        raise DataError(f"{error.filename or idx_path}: cannot be read ({error.strerror or error})") from error
    if num_bytes != bin_bytes:
        raise DataError(f"{bin_path}: {bin_bytes} bytes, {idx_path.name} describes {num_bytes}; the two do not belong together, or {_AGAIN}")
    return Structure(dtype, num_sequences, num_ends - 1, num_bytes // np.dtype(dtype).itemsize)


def _header(stream: BinaryIO, path: Path, size: int) -> tuple[str, int, int]:
    """(dtype, sequences, document ends)."""
    head = stream.read(IDX_HEADER.size)
    if len(head) < IDX_HEADER.size:
        raise DataError(f"{path}: {size} bytes, less than its header of {IDX_HEADER.size}; {_AGAIN}")
    magic, version, code, num_sequences, num_ends = IDX_HEADER.unpack(head)
    if (magic, version) != (IDX_MAGIC, 1):
        raise DataError(f"{path}: begins with {magic!r}, version {version}, not with {IDX_MAGIC!r}, version 1; it is no index of megatron-core, or {_AGAIN}")
    dtype = next((name for name, number in DTYPE_CODES.items() if number == code), None)
    if dtype is None:
        raise DataError(f"{path}: token type {code}, known are {DTYPE_CODES} (floating point is for no token id); {_AGAIN}")
    expected = IDX_HEADER.size + 12 * num_sequences + 8 * num_ends
    if size != expected:
        more = " (with one byte more for each sequence it would be a multimodal dataset, which is not supported)" if size == expected + num_sequences else ""
        raise DataError(f"{path}: {size} bytes, {num_sequences} sequences and {num_ends} document ends take {expected}{more}; {_AGAIN}")
    if not num_sequences or not num_ends:
        raise DataError(f"{path}: describes {num_sequences} sequences and {num_ends} document ends; there is nothing to train on")
    return dtype, num_sequences, num_ends


def _check_sequences(stream: BinaryIO, path: Path, num_sequences: int, itemsize: int, bin_bytes: int) -> int:
    """Bytes that the sequences take in the .bin."""
    end = 0
    for first in range(0, num_sequences, _SEQUENCES_AT_ONCE):
        count = min(_SEQUENCES_AT_ONCE, num_sequences - first)
        num_bytes: np.ndarray = _read(stream, path, IDX_HEADER.size + 4 * first, "<i4", count).astype(np.int64) * itemsize
        offsets = _read(stream, path, IDX_HEADER.size + 4 * num_sequences + 8 * first, "<i8", count)
        ends = end + np.cumsum(num_bytes)
        wrong = (num_bytes < 0) | (offsets != ends - num_bytes) | (ends > bin_bytes)
        if wrong.any():
            n = int(np.argmax(wrong))
            raise DataError(f"{path}: sequence {first + n} has {num_bytes[n] // itemsize} tokens from byte {offsets[n]} on, the one before it ends at byte "
                            f"{ends[n] - num_bytes[n]}, and the .bin has {bin_bytes} bytes; {_AGAIN}")
        end = int(ends[-1])
    return end


def _check_documents(stream: BinaryIO, path: Path, num_sequences: int, num_ends: int) -> None:
    """Document ends go from 0 to the number of sequences and never back."""
    before = 0
    for first in range(0, num_ends, _SEQUENCES_AT_ONCE):
        count = min(_SEQUENCES_AT_ONCE, num_ends - first)
        ends = _read(stream, path, IDX_HEADER.size + 12 * num_sequences + 8 * first, "<i8", count)
        wrong = (ends < np.concatenate([[before], ends[:-1]])) | (ends > num_sequences)
        if not first:
            wrong[0] |= ends[0] != 0
        if first + count == num_ends:
            wrong[-1] |= ends[-1] != num_sequences
        if wrong.any():
            n = int(np.argmax(wrong))
            raise DataError(f"{path}: document end {first + n} is {ends[n]}; ends go from 0 to the {num_sequences} sequences and never back; {_AGAIN}")
        before = int(ends[-1])


def _read(stream: BinaryIO, path: Path, position: int, dtype: str, count: int) -> np.ndarray:
    stream.seek(position)
    content = stream.read(count * np.dtype(dtype).itemsize)
    if len(content) != count * np.dtype(dtype).itemsize:
        raise DataError(f"{path}: became shorter while it was read; {_AGAIN}")
    return np.frombuffer(content, dtype=dtype)
