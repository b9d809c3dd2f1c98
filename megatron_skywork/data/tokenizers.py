"""One small interface over the two tokenizer files a LLaMA-type model comes with.

A Hugging Face folder holds `tokenizer.json` (read through the `tokenizers` package), an original Skywork or LLaMA folder holds a
sentencepiece `tokenizer.model`. Preprocessing and training need the same few things from both: ids of a text, the end-of-document id,
the size of the vocabulary, and a fingerprint that tells whether two datasets were made with the same vocabulary.

Neither kind reads control tokens out of a text: a document that contains the characters `</s>` gets the ids of these characters,
never the id that ends a document. No id is added to a text either; `bos_id` and `eos_id` are for the caller to add.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skywork.data.pieces import pieces_of
from megatron_skywork.errors import DataError

HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: file the vocabulary was read from, without its folders beyond the last.
        vocab_size: largest id + 1, added tokens included.
        bos_id, eos_id: ids that begin and end a document; None where the tokenizer names none.
        fingerprint: sha256 over what decides the ids of a text; equal for files that differ in formatting only.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text (int32), without special tokens; a text does not see its neighbours."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included where the format can show them."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of a token given by its exact spelling, or None."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special tokens."""
        return self.encode_batch([text])[0].tolist()


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; its neighbours `tokenizer_config.json` and `special_tokens_map.json` name the special tokens."""

    def __init__(self, path: Path):
        import tokenizers

        content = _read_json(path)
        if not isinstance(content, dict) or "model" not in content:
            raise DataError(f"{path}: this is JSON but not a tokenizer.json (it has no `model`); give the folder or the file of a Hugging Face tokenizer")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception for every malformed file
            raise DataError(f"{path}: the tokenizers package cannot read it ({error}); was it written by a newer version?") from error
        # A file may carry the truncation and padding of whoever saved it last; a document must keep all its tokens and gain none.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path}: the vocabulary is empty")
        self.name = f"{path.parent.name}/{path.name}"
        self.vocab_size = max(vocabulary.values()) + 1
        special = _special_tokens(path.parent)
        self.bos_id = self._special_id(path, special, "bos_token")
        self.eos_id = self._special_id(path, special, "eos_token")
        decisive = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        self.fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        self._pieces = pieces_of(content, lambda piece: self._tokenizer.encode(piece, add_special_tokens=False).ids)

    def _special_id(self, path: Path, special: dict[str, str], key: str) -> int | None:
        token = special.get(key)
        if token is None:
            return None
        found = self.token_id(token)
        if found is None:
            raise DataError(f"{path}: the files beside it name {token!r} as {key}, which is not in the vocabulary; these files do not belong together")
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._pieces is None:
            return self._encode_whole(texts)
        by_pieces = [self._pieces.encode(text) for text in texts]
        whole = iter(self._encode_whole([text for text, ids in zip(texts, by_pieces, strict=True) if ids is None]))
        return [next(whole) if ids is None else ids for ids in by_pieces]

    def _encode_whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, dtype=np.int32) for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`; it names its own special ids."""

    def __init__(self, path: Path):
        import sentencepiece

        content = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError(f"{path}: not a sentencepiece model ({error})") from error
        if not loaded or self._model.GetPieceSize() == 0:
            raise DataError(f"{path}: not a sentencepiece model (it holds no pieces)")
        self.name = f"{path.parent.name}/{path.name}"
        self.vocab_size = self._model.GetPieceSize()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One thread: the processes of the caller are the parallelism.
        return [np.array(ids, dtype=np.int32) for ids in self._model.Encode(list(texts), out_type=int, num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.Decode([int(token) for token in ids])

    def token_id(self, token: str) -> int | None:
        found = self._model.PieceToId(token)
        return None if found == self._model.unk_id() and token != self._model.IdToPiece(found) else found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a folder, a `tokenizer.json`, or a sentencepiece `.model`.

    Raises:
        DataError: nothing is there, the folder holds neither file, or the file is not what its name says.
    """
    file = Path(path)
    if file.is_dir():
        candidates = [file / HF_FILE, file / SENTENCEPIECE_FILE]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise DataError(f"tokenizer {file}: the folder holds neither {HF_FILE} nor {SENTENCEPIECE_FILE}")
        file = found
    if not file.is_file():
        raise DataError(f"tokenizer {file}: no such file or folder; give a folder with {HF_FILE}, that file, or a sentencepiece .model")
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    raise DataError(f"tokenizer {file}: its name ends in neither .json (Hugging Face) nor .model (sentencepiece)")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and eos_token as spelled by the files beside a tokenizer.json; tokenizer_config.json has the last word."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        content = _read_json(file)
        if not isinstance(content, dict):
            raise DataError(f"{file}: expected a JSON object, found {type(content).__name__}")
        for key in ("bos_token", "eos_token"):
            value = content.get(key)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                found[key] = token
    return found
