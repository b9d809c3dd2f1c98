"""A dataset whose samples say their own number: every document is one sample long and repeats one token, so the first token of a sample names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_skywork.data.indexed import IndexedWriter


def write_numbered(prefix: Path, num_samples: int, seq_length: int, tokenizer: str = "t", first: int = 0) -> str:
    """A dataset with `num_samples` samples an epoch, numbered from `first` but for one number (the last sample would need one token more for its label).

    Returns:
        the prefix, as a setting.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = IndexedWriter(str(prefix), first + num_samples + 1)
    numbers = np.arange(first, first + num_samples + 1, dtype=np.int32)
    writer.add(np.repeat(numbers, seq_length), np.full(len(numbers), seq_length))
    identity = {"tokenizer_name": tokenizer, "tokenizer_fingerprint": tokenizer * 64, "vocab_size": first + num_samples + 1, "eod_id": None}
    writer.finish(identity, sources=[], options={}, counts={})
    writer.publish()
    return str(prefix)
