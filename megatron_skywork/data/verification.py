"""Is this dataset whole, and does it fit the model? Cheaply at every start, and to the last bit on demand.

At start: the sizes of both files, the seal of the side file, and the whole structure of the .idx. On demand (`tools/preprocess_data.py verify`): the SHA-256 of
every byte. A pair that Megatron-LM wrote has no side file: its structure is checked all the same, but nobody can say which tokenizer made it, nor whether a
token changed, so `datasets` holds every id that is read against the vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_skywork.convert.files.marker import sha256_of
from megatron_skywork.data.index_structure import IDX_HEADER, Structure, read_structure
from megatron_skywork.data.indexed import SideFile, paths_of, read_side_file
from megatron_skywork.data.tokenizers import Tokenizer
from megatron_skywork.errors import DataError

_NO_SIDE_FILE = 0
_DOCUMENTS_LOOKED_AT = 32
_TOKENS_AT_ONCE = 1 << 20


def check_dataset(prefix: str, vocab_size: int, tokenizer: Tokenizer | None = None) -> SideFile:
    """Make sure that the dataset is whole and fits the model, by sizes, the side file and the .idx (the .bin is not read).

    Args:
        prefix: path without .bin, .idx, .json.
        vocab_size: tokens the model knows.
        tokenizer: the one the run uses; None where the run names none.
    Raises:
        DataError: naming the file, what was found and what was expected.
    """
    side, path = describe(prefix, tokenizer), paths_of(prefix)["json"]
    if side.largest_token_id is not None and side.largest_token_id >= vocab_size:
        raise DataError(f"{path}: token id {side.largest_token_id} is beyond the model's vocabulary of {vocab_size} (model.vocab_size); "
                        f"the dataset was made with {side.tokenizer_name} of {side.vocab_size} tokens: give the model that many, or write the dataset again")
    if tokenizer is not None and side.tokenizer_fingerprint is not None and tokenizer.fingerprint != side.tokenizer_fingerprint:
        raise DataError(f"{path}: made with another tokenizer ({side.tokenizer_name}, fingerprint {side.tokenizer_fingerprint[:12]}) than data.tokenizer "
                        f"({tokenizer.name}, fingerprint {tokenizer.fingerprint[:12]}); write the dataset again with this tokenizer, or name the one "
                        "that made it")
    return side


def describe(prefix: str, tokenizer: Tokenizer | None = None) -> SideFile:
    """What is in a dataset, after making sure that its files belong together; `tokenizer` is asked where there is no side file.

    Raises:
        DataError: a file is missing, unreadable, cut off, or not what the others say.
    """
    try:
        return _describe(prefix, tokenizer)
    except OSError as error:
        raise DataError(f"{error.filename or prefix}: cannot be read ({error.strerror or error})") from error


def _describe(prefix: str, tokenizer: Tokenizer | None) -> SideFile:
    paths = paths_of(prefix)
    if not paths["json"].exists() and paths["bin"].is_file() and paths["idx"].is_file():
        return _describe_pair(prefix, tokenizer)
    side = read_side_file(prefix)
    for kind, size in (("bin", side.bin_bytes), ("idx", side.idx_bytes)):
        if not paths[kind].is_file():
            raise DataError(f"{paths[kind]}: missing, though {paths['json']} says the dataset is complete; copy it again")
        found = paths[kind].stat().st_size
        if found != size:
            raise DataError(f"{paths[kind]}: {found} bytes, {paths['json']} says {size}; the file was cut off or replaced: copy or write the dataset again")
    said = Structure(side.dtype, side.num_sequences, side.num_documents, side.num_tokens)
    described = read_structure(paths["idx"], paths["bin"])
    if described != said:
        raise DataError(f"{paths['idx']}: describes {described}, {paths['json']} says {said}; these files do not belong together: "
                        "copy or write the dataset again")
    return side


def _describe_pair(prefix: str, tokenizer: Tokenizer | None) -> SideFile:
    """A .bin and .idx without a side file: what the .idx says, and the end token of `tokenizer` where the documents carry it."""
    paths = paths_of(prefix)
    if left := [str(path) for path in paths_of(f"{prefix}.partial").values() if path.exists()]:
        raise DataError(f"{paths['json']}: missing, and {', '.join(left)} beside it: tools/preprocess_data.py was stopped before this dataset was finished; "
                        "write it again with --overwrite, or remove these files if .bin and .idx are another program's")
    found = read_structure(paths["idx"], paths["bin"])
    eod_id = None if tokenizer is None or tokenizer.eos_id is None or not _documents_end_with(tokenizer.eos_id, paths, found) else tokenizer.eos_id
    return SideFile(
        bin_bytes=paths["bin"].stat().st_size, idx_bytes=paths["idx"].stat().st_size, bin_sha256=None, idx_sha256=sha256_of(paths["idx"]), dtype=found.dtype,
        num_documents=found.num_documents, num_sequences=found.num_sequences, num_tokens=found.num_tokens, largest_token_id=None, tokenizer_name=None,
        tokenizer_fingerprint=None, vocab_size=None, eod_id=eod_id, sources=[], options={}, counts={}, format=_NO_SIDE_FILE)


def _documents_end_with(token_id: int, paths: dict[str, Path], found: Structure) -> bool:
    """Whether up to 32 sequences from all over the dataset end with this id, as they do where an end token was appended to every document."""
    chosen = np.unique(np.linspace(0, found.num_sequences - 1, _DOCUMENTS_LOOKED_AT).astype(np.int64))
    lengths: np.ndarray = np.memmap(paths["idx"], dtype="<i4", mode="r", offset=IDX_HEADER.size, shape=(found.num_sequences,))
    offsets: np.ndarray = np.memmap(paths["idx"], dtype="<i8", mode="r", offset=IDX_HEADER.size + lengths.nbytes, shape=(found.num_sequences,))
    itemsize = np.dtype(found.dtype).itemsize
    last = np.array([offsets[n] // itemsize + lengths[n] - 1 for n in chosen if lengths[n] > 0], dtype=np.int64)
    if not len(last):
        return False
    tokens: np.ndarray = np.memmap(paths["bin"], dtype=found.dtype, mode="r")
    return bool((tokens[last] == token_id).all())


def verify_content(prefix: str, count: Callable[[int], None] | None = None) -> SideFile:
    """Read both files whole and compare their SHA-256 with the side file: finds a flipped bit, which sizes cannot.

    Without a side file there is no hash to compare; the structure is checked, and `largest_token_id` of the result is found by reading the .bin.

    Args:
        count: called with the number of bytes read since its last call.
    Raises:
        DataError: a file is missing or unreadable, or its content is not what was written.
    """
    side, paths = describe(prefix), paths_of(prefix)
    try:
        if not side.is_recorded:
            if count is not None:
                count(side.idx_bytes)  # `describe` has read it
            return dataclasses.replace(side, largest_token_id=_largest_id(paths["bin"], side.dtype, count))
        for kind, expected in (("bin", side.bin_sha256), ("idx", side.idx_sha256)):
            found = sha256_of(paths[kind], count)
            if found != expected:
                raise DataError(f"{paths[kind]}: sha256 {found[:12]}..., {paths['json']} says {str(expected)[:12]}...; the content was changed: "
                                "copy or write the dataset again")
    except OSError as error:
        raise DataError(f"{error.filename or paths['bin']}: cannot be read ({error.strerror or error})") from error
    return side


def bytes_to_verify(prefixes: Sequence[str]) -> int:
    """What `verify_content` will read of these datasets, as far as they are there."""
    files = [path for prefix in prefixes for kind, path in paths_of(prefix).items() if kind != "json"]
    return sum(os.path.getsize(path) for path in files if os.path.isfile(path))


def _largest_id(path: Path, dtype: str, count: Callable[[int], None] | None) -> int:
    """Largest token id.

    Raises:
        DataError: an id is below 0.
    """
    largest = position = 0
    with open(path, "rb") as stream:
        while content := stream.read(_TOKENS_AT_ONCE * np.dtype(dtype).itemsize):
            tokens = np.frombuffer(content, dtype=dtype)
            if tokens.min() < 0:
                n = int(np.argmax(tokens < 0))
                raise DataError(f"{path}: token {position + n} of the file is {tokens[n]}, and no id is below 0; the dataset is damaged: "
                                "copy or write it again")
            largest, position = max(largest, int(tokens.max())), position + len(tokens)
            if count is not None:
                count(len(content))
    return largest
