"""A tokenized dataset on disk: megatron-core's indexed pair, and a sealed side file that says what is in it.

`PREFIX.bin` (token ids, nothing else) and `PREFIX.idx` (where each document begins, see `index_structure`) are megatron-core's format, so its tools read
them. Neither can tell which tokenizer made them or that a bit of them changed, and a wrong tokenizer trains without an error. `PREFIX.json` carries
these facts, with the SHA-256 of both files and of its own text, and is written last: a dataset is finished when it is there.

The .idx is written here and not by megatron-core's builder, whose import brings torch: seconds of processor time for a command that needs neither.
A test compares the bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skywork.convert.files.marker import SEAL, fsync, seal_holds, sealed, sha256_of
from megatron_skywork.data.index_structure import DTYPE_CODES, IDX_HEADER, IDX_MAGIC
from megatron_skywork.errors import DataError

SIDE_FORMAT = 2
_UNSEALED_FORMAT = 1  # the same fields without a seal; still read, since a dataset may have taken days to write
_LARGEST_UINT16_VOCABULARY = 65499


@dataclasses.dataclass(frozen=True)
class SideFile:
    """Content of PREFIX.json. For a pair that another program wrote without one, `verification.describe` fills in what the .idx says, and leaves the rest None.

    Attributes:
        bin_bytes, idx_bytes: sizes of the two files.
        bin_sha256, idx_sha256: their content, compared by `verify_content` only, since it reads everything.
        dtype: numpy name of the ids in .bin: uint16 below 65500 tokens of vocabulary, else int32.
        num_documents, num_sequences, num_tokens: what .idx describes; a document is one sequence.
        largest_token_id: must be below the model's vocabulary.
        tokenizer_name, tokenizer_fingerprint, vocab_size, eod_id: of the tokenizer that made it; eod_id None where documents carry no end token.
        sources: {"path", "bytes"} of each input file.
        options: settings that decide the content.
        counts: documents and lines read, and those left out by reason.
    """

    bin_bytes: int
    idx_bytes: int
    bin_sha256: str | None
    idx_sha256: str
    dtype: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    largest_token_id: int | None
    tokenizer_name: str | None
    tokenizer_fingerprint: str | None
    vocab_size: int | None
    eod_id: int | None
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    counts: dict[str, int]
    format: int = SIDE_FORMAT

    @property
    def is_recorded(self) -> bool:
        """Whether a side file says so, rather than the .idx alone."""
        return self.bin_sha256 is not None


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
            bin_sha256=self._hash.hexdigest(), idx_sha256=sha256_of(self._partial["idx"]), dtype=self._dtype.name,
            num_documents=self.num_documents, num_sequences=self.num_documents, num_tokens=self.num_tokens, largest_token_id=self.largest_token_id,
            sources=sources, options=options, counts=counts, **tokenizer)
        self._partial["json"].write_text(sealed(dataclasses.asdict(side)), encoding="utf-8")
        for path in self._partial.values():
            fsync(path)
        return side

    def _index(self) -> bytes:
        """Content of the .idx: a sequence is a document, so document n ends before sequence n + 1."""
        lengths = np.concatenate([np.array([], dtype=np.int32), *self._lengths])
        num_bytes = lengths.astype(np.int64) * self._dtype.itemsize
        offsets = np.cumsum(num_bytes) - num_bytes
        document_ends: np.ndarray = np.arange(len(lengths) + 1, dtype=np.int64)
        header = IDX_HEADER.pack(IDX_MAGIC, 1, DTYPE_CODES[self._dtype.name], len(lengths), len(lengths) + 1)
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
    """PREFIX.json, after holding its text against its seal.

    Raises:
        DataError: it is missing, is not what was written, or lacks a field.
    """
    path = paths_of(prefix)["json"]
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError as error:
        raise DataError(_missing(prefix, path)) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again, or write the dataset again with tools/preprocess_data.py") from error
    version = content.get("format") if isinstance(content, dict) else type(content).__name__
    if version not in (SIDE_FORMAT, _UNSEALED_FORMAT):
        raise DataError(f"{path}: expected a side file of format {SIDE_FORMAT}, found {version!r}; write the dataset again with tools/preprocess_data.py")
    if version == SIDE_FORMAT:
        if not seal_holds(text, content):
            raise DataError(f"{path}: its text is not the one its seal was made for, so it was changed after it was written; copy or write the dataset again")
        del content[SEAL]
    names = {field.name for field in dataclasses.fields(SideFile)}
    if names != content.keys():
        raise DataError(f"{path}: fields missing: {sorted(names - content.keys())}, unknown: {sorted(content.keys() - names)}; write the dataset again")
    if odd := [name for name, value in content.items() if not _has_type(name, value)]:
        raise DataError(f"{path}: {odd[0]}={content[odd[0]]!r} is of the wrong type; write the dataset again")
    return SideFile(**content)


def _has_type(name: str, value: Any) -> bool:
    if name == "eod_id" and value is None:
        return True
    annotation = next(str(field.type) for field in dataclasses.fields(SideFile) if field.name == name)
    kind = {"int": int, "str": str, "list": list, "dict": dict}[annotation.split("[")[0].split(" ")[0]]
    return isinstance(value, kind) and (name != "dtype" or value in DTYPE_CODES)


def _missing(prefix: str, path: Path) -> str:
    suffix = Path(prefix).suffix
    hint = f"; give the prefix without {suffix}" if suffix in (".bin", ".idx", ".json") else ""
    return f"{path}: no such file; a dataset is PREFIX.bin, PREFIX.idx and PREFIX.json, written by tools/preprocess_data.py{hint}"
