"""Documents out of JSON-lines files, plain or compressed, with every damaged line named by file and number.

A gzip or zstandard stream is decoded member by member here instead of through their file objects, for two reasons: zstandard's reader ends a
truncated stream without a word, and a file object that fails may keep back lines it had already decoded, so the line number would be wrong.
This module imports neither torch nor megatron-core: each preprocessing worker loads it, and should start in a moment.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_skywork.errors import DataError

_READ_BYTES = 1 << 16
# A decoder is fed little at a time. Of 64 KiB zstandard can make 2 GiB (128 KiB of each 4 bytes) and gzip 64 MiB; of this much, 8 MiB and 4 MiB.
_ZSTD_BYTES, _GZIP_BYTES = 1 << 8, 1 << 12
_BLOCK_BYTES = 1 << 18
_BLOCK_LINES = 512
MAX_LINE_BYTES = 1 << 26
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


# What can be wrong with a line: what it is counted as.
BAD_LINE_REASONS = ("nul_byte", "invalid_utf8", "invalid_json", "no_object", "no_field", "no_text", "half_character", "too_long", "unreadable_rest")


class BadLine(Exception):
    """A line that holds no document.

    Attributes:
        reason: one of BAD_LINE_REASONS; the message says more.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Block:
    """Neighbouring lines of one file: the unit of work of a preprocessing worker.

    Attributes:
        path: the file.
        first_line: number of lines[0], counted from 1.
        lines: without line ends; of a line that was too long to be kept, its number of bytes.
        damage: why the file cannot be read beyond these lines; None where it can.
    """

    path: str
    first_line: int
    lines: list[bytes | int]
    damage: str | None = None


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files of the patterns: in the order of the patterns, sorted within each, a file that several of them name taken once.

    Raises:
        DataError: a pattern matches no file.
    """
    files: dict[str, str] = {}
    for pattern in patterns:
        # A name that exists is taken as it stands, so that brackets in it are not read as a pattern.
        matches = [pattern] if os.path.isfile(pattern) else sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        if not matches:
            raise DataError(f"--input {pattern!r}: no file matches; the pattern is taken relative to {os.getcwd()}")
        for name in matches:
            files.setdefault(os.path.realpath(name), name)
    return list(files.values())


def read_blocks(path: str, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Block]:
    """The file's lines in blocks of at most 512 lines or about 256 KiB. Memory held: one block, and one line of at most `max_line_bytes`."""
    lines: list[bytes | int] = []
    first_line, size = 1, 0
    damage = None
    reader = _read_lines(path, max_line_bytes)
    while True:
        try:
            line = next(reader, None)
        except (zlib.error, EOFError, OSError, _zstd_error()) as error:
            damage, line = str(error), None
        if line is None:
            break
        lines.append(line)
        size += len(line) if isinstance(line, bytes) else 0
        if size >= _BLOCK_BYTES or len(lines) >= _BLOCK_LINES:
            yield Block(path, first_line, lines)
            first_line, lines, size = first_line + len(lines), [], 0
    if lines or damage:
        yield Block(path, first_line, lines, damage)


def parse_line(line: bytes, field: str) -> str | None:
    """The document of one line; None for a blank line.

    Raises:
        BadLine: NUL bytes, invalid UTF-8, invalid JSON, not an object, the field missing or not a text, or a text that is no Unicode.
    """
    if not line.strip():
        return None
    if b"\0" in line:
        raise BadLine("nul_byte", f"NUL at byte {line.index(0)} of the line: a hole, as a crash or a failed copy leaves it, or no UTF-8")
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine("invalid_utf8", f"invalid UTF-8 at byte {error.start} of the line") from error
    except RecursionError as error:
        raise BadLine("invalid_json", "invalid JSON: nested too deeply") from error
    except ValueError as error:
        raise BadLine("invalid_json", f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadLine("no_object", f"expected a JSON object, found {type(record).__name__}")
    if field not in record:
        raise BadLine("no_field", f"no field {field!r}; the line has {', '.join(map(repr, list(record)[:8])) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise BadLine("no_text", f"field {field!r} is not a text but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine("half_character", f"field {field!r} has half a surrogate pair at character {error.start}") from error
    return text


def _read_lines(path: str, max_bytes: int) -> Iterator[bytes | int]:
    """Lines without their ends, or the length of one that has more than `max_bytes`; what precedes damage is given before the damage is raised, an
    unfinished line before damage is not.
    """
    begin: list[bytes] = []  # of the line under way, as long as it is not too long
    num_bytes = 0  # of the line under way
    mark = _BYTE_ORDER_MARK
    for chunk in _read_chunks(path):
        *ended, last = chunk.split(b"\n")
        for piece in ended:
            num_bytes += len(piece)
            yield num_bytes if num_bytes > max_bytes else b"".join([*begin, piece]).removeprefix(mark)
            begin, num_bytes, mark = [], 0, b""
        num_bytes += len(last)
        if num_bytes <= max_bytes:
            begin.append(last)
        else:
            begin.clear()
    if num_bytes:
        line = b"".join(begin).removeprefix(mark)
        if num_bytes > max_bytes or line:
            yield num_bytes if num_bytes > max_bytes else line


def _read_chunks(path: str) -> Iterator[bytes]:
    """The file's bytes in pieces short enough to be cut into lines: millions of empty ones may follow each other."""
    for decoded in _read_decoded(path):
        for begin in range(0, len(decoded), _READ_BYTES):
            yield decoded[begin : begin + _READ_BYTES]


def _read_decoded(path: str) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        if path.endswith(".gz"):
            yield from _decode(stream, lambda: zlib.decompressobj(wbits=31), "gzip", _GZIP_BYTES, padding=b"\0")
        elif path.endswith(".zst"):
            yield from _decode(stream, _zstd_decoder(path), "zstandard", _ZSTD_BYTES, padding=b"")
        else:
            while chunk := stream.read(_READ_BYTES):
                yield chunk


def _decode(stream: BinaryIO, new_decoder: Callable[[], Any], kind: str, num_bytes: int, padding: bytes) -> Iterator[bytes]:
    """Decoded bytes of a stream of concatenated members, fed `num_bytes` at a time; EOFError where the last one is cut off."""
    decoder, seen = None, False
    while compressed := stream.read(num_bytes):
        while compressed:
            if decoder is None:
                compressed = compressed.lstrip(padding) if padding and seen else compressed
                if not compressed:
                    break
                decoder, seen = new_decoder(), True
            decoded = decoder.decompress(compressed)
            if decoded:
                yield decoded
            compressed = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = None
    if decoder is not None or not seen:
        raise EOFError(f"the {kind} stream is cut off")


def _zstd_decoder(path: str) -> Callable[[], Any]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs the package zstandard; install it, or recompress the file with gzip") from error
    # Files written with `zstd --long=31` need a window of 2 GiB; memory is taken as the stream asks for it.
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    return zstandard.ZstdError
