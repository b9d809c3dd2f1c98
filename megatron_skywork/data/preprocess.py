"""JSON-lines documents to an indexed dataset, on many processes, in bounded memory, all or nothing.

The parent reads lines and writes tokens, workers tokenize. Blocks of lines go out in order and come back in order, and what a block becomes depends on the
block alone, so the files are the same bytes for any number of workers. At most a few blocks per worker are under way. The files carry
temporary names until everything has been written; a run that dies leaves nothing that looks like a dataset.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

from megatron_skywork.data.documents import BAD_LINE_REASONS, MAX_LINE_BYTES, Block, expand_inputs, read_blocks
from megatron_skywork.data.encoding import EMPTY, Encoded, EncodingOptions, encode_block, encode_in_worker, start_worker
from megatron_skywork.data.file_lock import exclusive
from megatron_skywork.data.indexed import IndexedWriter, SideFile, paths_of
from megatron_skywork.data.tokenizers import Tokenizer, load_tokenizer
from megatron_skywork.errors import ConfigError, DataError

_BLOCKS_PER_WORKER = 4
_LEFT_OUT_SHOWN = 10
_LEFT_OUT_LISTED = 100
_COUNTED = ("lines", "documents", "held_out", EMPTY, "blank_lines", "bad_lines", *BAD_LINE_REASONS)
_PLAIN_SECONDS = 10.0
_LIVE_SECONDS = 0.2


@dataclass(frozen=True)
class PreprocessOptions:
    """Arguments of tools/preprocess_data.py; see its --help for each."""

    inputs: list[str]
    tokenizer: str
    output: str
    workers: int = 1
    field: str = "text"
    append_eod: bool = True
    eod_token: str | None = None
    prepend_bos: bool = False
    on_bad_line: str = "stop"
    on_empty: str = "skip"
    max_line_bytes: int = MAX_LINE_BYTES
    holdout: float = 0.0
    holdout_output: str | None = None
    seed: int = 1234
    overwrite: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the arguments, all of it."""
        found = []
        if self.workers < 1:
            found.append(f"--workers {self.workers}: at least 1")
        for name, choice in (("--on-bad-line", self.on_bad_line), ("--on-empty", self.on_empty)):
            if choice not in ("stop", "skip"):
                found.append(f"{name} {choice}: stop or skip")
        if self.max_line_bytes < 1:
            found.append(f"--max-line-bytes {self.max_line_bytes}: at least 1")
        if not 0 <= self.holdout < 1:
            found.append(f"--holdout {self.holdout}: a share from 0 up to, not including, 1")
        if (self.holdout > 0) != (self.holdout_output is not None):
            found.append("--holdout and --holdout-output go together: the share, and the prefix it is written to")
        if self.holdout_output is not None and os.path.abspath(self.holdout_output) == os.path.abspath(self.output):
            found.append(f"--holdout-output {self.holdout_output}: the same as --output")
        if not 0 <= self.seed < 2**63:
            found.append(f"--seed {self.seed}: from 0 to 2^63 - 1")
        if self.eod_token is not None and not self.append_eod:
            found.append("--eod-token needs --append-eod")
        return found


@dataclass
class Result:
    """What was done.

    Attributes:
        outputs: side file of each prefix written.
        counts: lines and documents, and those left out by reason; bad_lines is the sum of the reasons behind it.
        left_out: "file:line: reason" of the first hundred bad lines and empty documents.
        seconds: wall clock from the first line read to the last file published.
    """

    outputs: dict[str, SideFile] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens in all outputs."""
        return sum(side.num_tokens for side in self.outputs.values())


class Progress:
    """Documents and tokens per second: one line that is rewritten on a terminal, a plain line now and then elsewhere."""

    def __init__(self, stream: TextIO):
        self._stream, self._live = stream, stream.isatty()
        self._begin = time.monotonic()
        self._next = self._begin + (_LIVE_SECONDS if self._live else _PLAIN_SECONDS)

    def show(self, documents: int, tokens: int, path: str) -> None:
        """Called often; writes seldom."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_LIVE_SECONDS if self._live else _PLAIN_SECONDS)
        line = f"{documents:,} documents, {tokens:,} tokens, {tokens / (now - self._begin):,.0f} tokens/s, {os.path.basename(path)}"
        self._stream.write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
        self._stream.flush()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.close()
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """Clear the live line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begin


def preprocess(options: PreprocessOptions, stream: TextIO | None = None) -> Result:
    """Write the dataset (and the held-out one) that `options` asks for.

    Args:
        stream: where progress goes; stderr by default.
    Raises:
        ConfigError: arguments that contradict each other.
        DataError: an input cannot be read, a line is bad (unless skipped), an output exists, nothing is left to write, a disk or worker fails.
    """
    if problems := options.problems():
        raise ConfigError(problems)
    prefixes = [options.output, *([options.holdout_output] if options.holdout_output else [])]
    files = expand_inputs(options.inputs)
    tokenizer = load_tokenizer(options.tokenizer)
    encoding = _encoding_options(options, tokenizer)
    with ExitStack() as stack:
        for prefix in prefixes:
            _reserve(prefix, options.overwrite, stack)
        try:
            writers = []
            for prefix in prefixes:
                writers.append(IndexedWriter(prefix, tokenizer.vocab_size))
                stack.callback(writers[-1].discard)
            progress = Progress(stream or sys.stderr)
            stack.callback(progress.close)
            result = _write_documents(options, encoding, files, writers, tokenizer, progress)
            _finish(options, encoding, files, writers, tokenizer, result)
            result.seconds = progress.seconds()
        except BrokenProcessPool as error:
            raise DataError(f"a worker process died (out of memory, or killed); nothing was written: try fewer than {options.workers} workers") from error
        except OSError as error:
            raise DataError(f"{error.filename or options.output}: {error.strerror or error}; nothing was written") from error
    return result


def _encoding_options(options: PreprocessOptions, tokenizer: Tokenizer) -> EncodingOptions:
    eod_id = None
    if options.append_eod:
        eod_id = tokenizer.eos_id if options.eod_token is None else tokenizer.token_id(options.eod_token)
        if eod_id is None and options.eod_token is not None:
            raise DataError(f"--eod-token {options.eod_token!r}: not in the vocabulary of {options.tokenizer}")
        if eod_id is None:
            raise DataError(f"tokenizer {options.tokenizer}: names no end-of-sequence token (tokenizer_config.json, special_tokens_map.json); "
                            "give --eod-token TOKEN or --no-append-eod")
    if options.prepend_bos and tokenizer.bos_id is None:
        raise DataError(f"tokenizer {options.tokenizer}: names no beginning-of-sequence token; leave --prepend-bos out")
    return EncodingOptions(tokenizer=options.tokenizer, field=options.field, bos_id=tokenizer.bos_id if options.prepend_bos else None, eod_id=eod_id,
                           holdout=options.holdout, seed=options.seed, max_line_bytes=options.max_line_bytes)


def _reserve(prefix: str, overwrite: bool, stack: ExitStack) -> None:
    """Make the folder, refuse what exists, and keep other processes away from the prefix."""
    existing = [str(path) for path in paths_of(prefix).values() if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{', '.join(existing)}: already there; choose another prefix, or give --overwrite to replace the dataset")
    folder = Path(prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive(f"{prefix}.partial.lock", wait=False))
    except BlockingIOError as error:
        raise DataError(f"{prefix}: another process is writing this dataset") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot write there ({error.strerror})") from error


def _write_documents(options: PreprocessOptions, encoding: EncodingOptions, files: list[str], writers: list[IndexedWriter], tokenizer: Tokenizer,
                     progress: Progress) -> Result:
    result = Result()
    blocks = (block for file in files for block in read_blocks(file, options.max_line_bytes))
    encoded = _encode_on_workers(blocks, encoding, options.workers) if options.workers > 1 else _encode_here(blocks, tokenizer, encoding)
    counts = result.counts
    with closing(encoded):  # ends the workers at once where a bad line stops the run
        for block in encoded:
            writers[0].add(block.tokens, block.lengths)
            if options.holdout_output:
                writers[1].add(block.held_tokens, block.held_lengths)
            counts["lines"] += block.num_lines
            counts["documents"] += len(block.lengths)
            counts["held_out"] += len(block.held_lengths)
            counts["blank_lines"] += block.blank
            for number, reason, why in block.left_out:
                _leave_out(options, reason, f"{block.path}:{number}: {why}", result, progress)
            progress.show(counts["documents"] + counts["held_out"], sum(writer.num_tokens for writer in writers), block.path)
    return result


def _leave_out(options: PreprocessOptions, reason: str, line: str, result: Result, progress: Progress) -> None:
    option, choice = ("--on-empty", options.on_empty) if reason == EMPTY else ("--on-bad-line", options.on_bad_line)
    if choice == "stop":
        raise DataError(f"{line}; nothing was written: mend the file, or give {option} skip to leave such lines out")
    result.counts[reason] += 1
    if reason != EMPTY:
        result.counts["bad_lines"] += 1
    count = result.counts["bad_lines"] + result.counts[EMPTY]
    if count <= _LEFT_OUT_LISTED:
        result.left_out.append(line)
    if count <= _LEFT_OUT_SHOWN:
        progress.say(f"skipped {line}")
    elif count == _LEFT_OUT_SHOWN + 1:
        progress.say("more lines are skipped and counted without being shown")


def _finish(options: PreprocessOptions, encoding: EncodingOptions, files: list[str], writers: list[IndexedWriter], tokenizer: Tokenizer,
            result: Result) -> None:
    """Complete every output, then publish them together."""
    for writer in writers:
        if not writer.num_documents:
            summary = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result.counts.items() if count)
            advice = f"raise --holdout {options.holdout} or give more documents" if len(writers) > 1 else f"is --field {options.field!r} right?"
            raise DataError(f"{writer.prefix}: no document would be in it ({summary}); {advice}")
    facts = {"tokenizer_name": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eod_id": encoding.eod_id}
    sources = [{"path": file, "bytes": os.path.getsize(file)} for file in files]
    for role, writer in zip(("train", "holdout"), writers, strict=False):
        chosen: dict[str, Any] = {
            "field": options.field, "append_eod": options.append_eod, "prepend_bos": options.prepend_bos, "on_bad_line": options.on_bad_line,
            "on_empty": options.on_empty, "max_line_bytes": options.max_line_bytes, "holdout": options.holdout,
            "part": role if options.holdout else "all", "seed": options.seed}
        result.outputs[writer.prefix] = writer.finish(facts, sources, chosen, result.counts)
    for writer in writers:
        writer.unpublish()
    for writer in writers:
        writer.publish()


def _encode_here(blocks: Iterable[Block], tokenizer: Tokenizer, encoding: EncodingOptions) -> Generator[Encoded, None, None]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers 1 means one core
    for block in blocks:
        yield encode_block(block, tokenizer, encoding)


def _encode_on_workers(blocks: Iterator[Block], encoding: EncodingOptions, workers: int) -> Generator[Encoded, None, None]:
    """Blocks encoded by `workers` processes, in the order they came, with a bounded number under way."""
    # spawn, not fork: the caller may have threads (torch's, for one), and a forked copy of a held lock never opens.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(encoding,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(encode_in_worker, block))
            if len(pending) >= workers * _BLOCKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
