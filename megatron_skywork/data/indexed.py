"""A tokenized dataset on disk: megatron-core's indexed pair, and a side file that says what is in it.

`PREFIX.bin` (token ids, nothing else) and `PREFIX.idx` (where each document begins) are megatron-core's format, so its tools read them. Neither can
tell which tokenizer made them or that half of the .bin was never copied, and a wrong tokenizer trains without an error. `PREFIX.json` carries
these facts and is written last: a dataset without it is not finished. `check_dataset` compares it with the files and with the model.

Layout of an .idx with N sequences and D documents: 34 bytes of header, N int32 lengths, N int64 offsets, (D + 1) int64 document ends.
It is written here and not by megatron-core's builder, whose import brings torch: seconds of processor time for a command that needs neither.
A test compares the bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skywork.convert.files.marker import fsync
from megatron_skywork.errors import DataError

SIDE_FORMAT = 1
# Magic, version 1, code of the dtype, number of sequences, number of entries of the document index.
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {"uint16": 8, "int32": 4}
_LARGEST_UINT16_VOCABULARY = 65499
_HASH_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class SideFile:
    """Content of PREFIX.json.

    Attributes:
        bin_bytes, idx_bytes: sizes of the two files.
        bin_sha256, idx_sha256: their content, compared by `verify_content` only, since it reads everything.
        dtype: numpy name of the ids in .bin: uint16 below 65500 tokens of vocabulary, else int32.
        num_documents, num_sequences, num_tokens: what .idx describes; a document is one sequence.
        largest_token_id: must be below the model's vocabulary.
        tokenizer_name, tokenizer_fingerprint, vocab_size, eod_id: of the tokenizer that made it; eod_id None where documents carry no end token.
        sources: {"path", "bytes"} of each input file.
        options: settings that decide the content.
        counts: documents and lines that are not in the dataset, by reason.
    """

    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    dtype: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    largest_token_id: int
    tokenizer_name: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int | None
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    counts: dict[str, int]
    format: int = SIDE_FORMAT


def paths_of(prefix: str) -> dict[str, Path]:
    """The three files of a dataset: keys bin, idx, json."""
    return {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "idx", "json")}


class IndexedWriter:
    """Writes a dataset under temporary names; `publish` makes it visible, .json last.

    Args:
        prefix: final prefix; temporary files stand beside it as PREFIX.partial.*.
        vocab_size: decides the dtype.
    """

    def __init__(self, prefix: str, vocab_size: int):
        self.prefix = prefix
        self._final, self._partial = paths_of(prefix), paths_of(f"{prefix}.partial")
        self._dtype = np.dtype(np.uint16 if vocab_size <= _LARGEST_UINT16_VOCABULARY else np.int32)
        self._bin = open(self._partial["bin"], "wb")  # noqa: SIM115 - `finish` or `discard` closes it
        self._lengths: list[np.ndarray] = []
        self._hash = hashlib.sha256()
        self.num_documents = self.num_tokens = 0
        self.largest_token_id = -1

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` [sum of lengths] int32, one length >= 1 per document."""
        if not len(lengths):
            return
        stored = tokens.astype(self._dtype).tobytes()
        self._hash.update(stored)
        self._bin.write(stored)
        self._lengths.append(lengths.astype(np.int32))
        self.largest_token_id = max(self.largest_token_id, int(tokens.max()))
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def finish(self, tokenizer: dict[str, Any], sources: list[dict[str, Any]], options: dict[str, Any], counts: dict[str, int]) -> SideFile:
        """Complete all three temporary files and flush them to disk.

        Args:
            tokenizer: the fields tokenizer_name, tokenizer_fingerprint, vocab_size, eod_id of the side file.
        """
        self._bin.close()
        self._partial["idx"].write_bytes(self._index())
        side = SideFile(
            bin_bytes=self._partial["bin"].stat().st_size, idx_bytes=self._partial["idx"].stat().st_size,
            bin_sha256=self._hash.hexdigest(), idx_sha256=_sha256(self._partial["idx"]), dtype=self._dtype.name,
            num_documents=self.num_documents, num_sequences=self.num_documents, num_tokens=self.num_tokens, largest_token_id=self.largest_token_id,
            sources=sources, options=options, counts=counts, **tokenizer)
        self._partial["json"].write_text(json.dumps(dataclasses.asdict(side), indent=1) + "\n", encoding="utf-8")
        for path in self._partial.values():
            fsync(path)
        return side

    def _index(self) -> bytes:
        """Content of the .idx: a sequence is a document, so document n ends before sequence n + 1."""
        lengths = np.concatenate([np.array([], dtype=np.int32), *self._lengths])
        num_bytes = lengths.astype(np.int64) * self._dtype.itemsize
        offsets = np.cumsum(num_bytes) - num_bytes
        document_ends: np.ndarray = np.arange(len(lengths) + 1, dtype=np.int64)
        header = _IDX_HEADER.pack(_IDX_MAGIC, 1, _DTYPE_CODES[self._dtype.name], len(lengths), len(lengths) + 1)
        return b"".join((header, lengths.tobytes(), offsets.tobytes(), document_ends.tobytes()))

    def unpublish(self) -> None:
        """Remove the side file of an earlier dataset, so that a half-replaced one is never taken for finished."""
        self._final["json"].unlink(missing_ok=True)

    def publish(self) -> None:
        """Give the temporary files their names: .bin, .idx, then .json."""
        for kind in ("bin", "idx", "json"):
            os.replace(self._partial[kind], self._final[kind])
        fsync(self._final["json"].parent)

    def discard(self) -> None:
        """Remove what is left of the temporary files."""
        self._bin.close()
        for path in self._partial.values():
            path.unlink(missing_ok=True)


def read_side_file(prefix: str) -> SideFile:
    """PREFIX.json.

    Raises:
        DataError: it is missing, is not JSON, or lacks a field.
    """
    path = paths_of(prefix)["json"]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(_missing(prefix, path)) from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); write the dataset again with tools/preprocess_data.py") from error
    if not isinstance(content, dict) or content.get("format") != SIDE_FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: expected a side file of format {SIDE_FORMAT}, found {found!r}; write the dataset again with tools/preprocess_data.py")
    names = {field.name for field in dataclasses.fields(SideFile)}
    if names != content.keys():
        raise DataError(f"{path}: fields missing: {sorted(names - content.keys())}, unknown: {sorted(content.keys() - names)}; write the dataset again")
    return SideFile(**content)


def check_dataset(prefix: str, vocab_size: int, tokenizer_fingerprint: str | None = None) -> SideFile:
    """Make sure that the dataset is whole and fits the model, by sizes and the side file alone (no token is read).

    Args:
        prefix: path without .bin, .idx, .json.
        vocab_size: tokens the model knows.
        tokenizer_fingerprint: of the tokenizer the run uses; None where the run names none.
    Raises:
        DataError: naming the file, what was found and what was expected.
    """
    side, paths = read_side_file(prefix), paths_of(prefix)
    expected = {"bin": side.bin_bytes, "idx": side.idx_bytes}
    for kind, size in expected.items():
        if not paths[kind].is_file():
            raise DataError(f"{paths[kind]}: missing, though {paths['json']} says the dataset is complete; copy it again")
        found = paths[kind].stat().st_size
        if found != size:
            raise DataError(f"{paths[kind]}: {found} bytes, {paths['json']} says {size}; the file was cut off or replaced: copy or write the dataset again")
    described = {"bin": side.num_tokens * np.dtype(side.dtype).itemsize, "idx": _IDX_HEADER.size + 12 * side.num_sequences + 8 * (side.num_documents + 1)}
    for kind, size in described.items():
        if expected[kind] != size:
            raise DataError(f"{paths['json']}: {kind}_bytes={expected[kind]}, but {side.num_documents} documents of {side.num_tokens} tokens take {size}; "
                            "the side file was changed: write the dataset again")
    if side.largest_token_id >= vocab_size:
        raise DataError(f"{paths['json']}: token id {side.largest_token_id} is beyond the model's vocabulary of {vocab_size} (model.vocab_size); "
                        f"the dataset was made with {side.tokenizer_name} of {side.vocab_size} tokens")
    if tokenizer_fingerprint is not None and tokenizer_fingerprint != side.tokenizer_fingerprint:
        raise DataError(f"{paths['json']}: made with another tokenizer ({side.tokenizer_name}, fingerprint {side.tokenizer_fingerprint[:12]}) than "
                        f"data.tokenizer (fingerprint {tokenizer_fingerprint[:12]}); write the dataset again with this tokenizer, or name the one that made it")
    return side


def verify_content(prefix: str) -> SideFile:
    """Read both files whole and compare their sha256 with the side file: finds a flipped bit, which sizes cannot.

    Raises:
        DataError: a file is missing, or its content is not what was written.
    """
    side, paths = read_side_file(prefix), paths_of(prefix)
    check_dataset(prefix, side.largest_token_id + 1)
    for kind, expected in (("bin", side.bin_sha256), ("idx", side.idx_sha256)):
        found = _sha256(paths[kind])
        if found != expected:
            raise DataError(f"{paths[kind]}: sha256 {found[:12]}..., {paths['json']} says {expected[:12]}...; the content was changed: "
                            "copy or write the dataset again")
    return side


def _missing(prefix: str, path: Path) -> str:
    paths = paths_of(prefix)
    if paths["bin"].is_file() and paths["idx"].is_file():
        return (f"{path}: missing beside {paths['bin'].name} and {paths['idx'].name}; the dataset was not finished, or another program made it: "
                "write it with tools/preprocess_data.py")
    suffix = Path(prefix).suffix
    hint = f"; give the prefix without {suffix}" if suffix in (".bin", ".idx", ".json") else ""
    return f"{path}: no such file; a dataset is PREFIX.bin, PREFIX.idx and PREFIX.json, written by tools/preprocess_data.py{hint}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
