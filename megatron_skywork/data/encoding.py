"""What one preprocessing worker does: a block of lines in, token ids out.

Kept apart from `preprocess` so that a worker process imports the tokenizer and numpy and little else: it starts in a moment and is small.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass

import numpy as np

from megatron_skywork.data.documents import BadLine, Block, parse_line
from megatron_skywork.data.tokenizers import Tokenizer, load_tokenizer

EMPTY = "empty_documents"


@dataclass(frozen=True)
class EncodingOptions:
    """Everything that decides a document's tokens and the file it goes to."""

    tokenizer: str
    field: str
    bos_id: int | None
    eod_id: int | None
    holdout: float
    seed: int
    max_line_bytes: int


@dataclass(frozen=True)
class Encoded:
    """The documents of one block.

    Attributes:
        path: the file.
        tokens, lengths: documents to keep: concatenated ids int32, one length each.
        held_tokens, held_lengths: documents held out.
        blank: lines without anything.
        num_lines: lines read.
        left_out: (line number, what it is counted as, why), in order: lines without a document, documents without a token, and where the file cannot
            be read further.
    """

    path: str
    tokens: np.ndarray
    lengths: np.ndarray
    held_tokens: np.ndarray
    held_lengths: np.ndarray
    blank: int
    num_lines: int
    left_out: list[tuple[int, str, str]]


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Whether a document belongs to the held-out part: by its content, so that copies of a document never stand on both sides."""
    if share <= 0:
        return False
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def encode_block(block: Block, tokenizer: Tokenizer, options: EncodingOptions) -> Encoded:
    """Tokenize every document of a block; the result depends on nothing but the arguments."""
    texts: list[str] = []
    numbers: list[int] = []
    left_out: list[tuple[int, str, str]] = []
    blank = 0
    for number, line in enumerate(block.lines, start=block.first_line):
        if isinstance(line, int):
            left_out.append((number, "too_long", f"{line:,} bytes, and --max-line-bytes is {options.max_line_bytes:,}; is there no line end in the file?"))
            continue
        try:
            text = parse_line(line, options.field)
        except BadLine as error:
            left_out.append((number, error.reason, str(error)))
            continue
        if text is None:
            blank += 1
        else:
            texts.append(text)
            numbers.append(number)
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for number, text, ids in zip(numbers, texts, tokenizer.encode_batch(texts), strict=True):
        if not len(ids):
            left_out.append((number, EMPTY, f"field {options.field!r} holds no token"))
            continue
        parts[is_held_out(text, options.holdout, options.seed)].append(ids)
    if block.damage is not None:
        left_out.append((block.first_line + len(block.lines), "unreadable_rest", block.damage))
    return Encoded(block.path, *_pack(parts[False], options), *_pack(parts[True], options), blank=blank, num_lines=len(block.lines),
                   left_out=sorted(left_out))


def _pack(documents: list[np.ndarray], options: EncodingOptions) -> tuple[np.ndarray, np.ndarray]:
    """Documents behind one another, each between the ids that begin and end it, and their lengths."""
    begin, end = (np.array([] if token is None else [token], dtype=np.int32) for token in (options.bos_id, options.eod_id))
    tokens = np.concatenate([np.array([], dtype=np.int32), *(part for ids in documents for part in (begin, ids, end))])
    return tokens, np.array([len(begin) + len(ids) + len(end) for ids in documents], dtype=np.int64)


_worker: tuple[Tokenizer, EncodingOptions] | None = None


def start_worker(options: EncodingOptions) -> None:
    """Prepare a worker process: load the tokenizer once, leave Ctrl-C to the parent, end when the parent is gone."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # N workers are N cores
    _worker = load_tokenizer(options.tokenizer), options


def encode_in_worker(block: Block) -> Encoded:
    """`encode_block` with what `start_worker` prepared."""
    if _worker is None:
        raise RuntimeError("start_worker was not called in this process")
    return encode_block(block, *_worker)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
