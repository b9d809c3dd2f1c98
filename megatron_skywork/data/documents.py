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
_BLOCK_BYTES = 1 << 18
_BLOCK_LINES = 512


class BadLine(Exception):
    """A line that holds no document; the message says why."""


@dataclass(frozen=True)
class Block:
    """Neighbouring lines of one file: the unit of work of a preprocessing worker.

    Attributes:
        path: the file.
        first_line: number of lines[0], counted from 1.
        lines: without line ends.
        damage: why the file cannot be read beyond these lines; None where it can.
    """

    path: str
    first_line: int
    lines: list[bytes]
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


def read_blocks(path: str) -> Iterator[Block]:
    """The file's lines in blocks of at most 512 lines or about 256 KiB. Memory held: one block, and one line however long it is."""
    lines: list[bytes] = []
    first_line, size = 1, 0
    damage = None
    reader = _read_lines(path)
    while True:
        try:
            line = next(reader, None)
        except (zlib.error, EOFError, OSError, _zstd_error()) as error:
            damage, line = str(error), None
        if line is None:
            break
        lines.append(line)
        size += len(line)
        if size >= _BLOCK_BYTES or len(lines) >= _BLOCK_LINES:
            yield Block(path, first_line, lines)
            first_line, lines, size = first_line + len(lines), [], 0
    if lines or damage:
        yield Block(path, first_line, lines, damage)


def parse_line(line: bytes, field: str) -> str | None:
    """The document of one line; None for a blank line.

    Raises:
        BadLine: invalid UTF-8, invalid JSON, not an object, the field missing or not a text, or a text that is no Unicode.
    """
    if not line.strip():
        return None
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start} of the line") from error
    except RecursionError as error:
        raise BadLine("invalid JSON: nested too deeply") from error
    except ValueError as error:
        raise BadLine(f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadLine(f"expected a JSON object, found {type(record).__name__}")
    if field not in record:
        raise BadLine(f"no field {field!r}; the line has {', '.join(map(repr, list(record)[:8])) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise BadLine(f"field {field!r} is not a text but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"field {field!r} has half a surrogate pair at character {error.start}") from error
    return text


def _read_lines(path: str) -> Iterator[bytes]:
    """Lines without their ends; what precedes damage is given before the damage is raised, an unfinished line before damage is not."""
    rest: list[bytes] = []
    first = True
    for chunk in _read_chunks(path):
        pieces = chunk.split(b"\n")
        if len(pieces) == 1:
            rest.append(chunk)
            continue
        pieces[0] = b"".join([*rest, pieces[0]])
        rest = [pieces.pop()]
        if first:
            pieces[0] = pieces[0].removeprefix(b"\xef\xbb\xbf")
            first = False
        yield from pieces
    last = b"".join(rest)
    if last:
        yield last.removeprefix(b"\xef\xbb\xbf") if first else last


def _read_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        if path.endswith(".gz"):
            yield from _decode(stream, lambda: zlib.decompressobj(wbits=31), "gzip", padding=b"\0")
        elif path.endswith(".zst"):
            yield from _decode(stream, _zstd_decoder(path), "zstandard", padding=b"")
        else:
            while chunk := stream.read(_READ_BYTES):
                yield chunk


def _decode(stream: BinaryIO, new_decoder: Callable[[], Any], kind: str, padding: bytes) -> Iterator[bytes]:
    """Decoded bytes of a stream of concatenated members; EOFError where the last one is cut off."""
    decoder, seen = None, False
    while compressed := stream.read(_READ_BYTES):
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
