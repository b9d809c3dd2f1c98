"""Which data a run has read, and how far: what a checkpoint says of them, so that a resume under others is noticed.

Known by content, not by path: a dataset that was moved is the same one, and another one under the old path is not. What is compared is what the side
files say (sizes and hashes from when the dataset was written), so nothing large is read; that the files are what their side files say is the affair of
`indexed.check_dataset` at every start and of `tools/preprocess_data.py verify` on demand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from megatron_skywork.config.schema import Config
from megatron_skywork.data.order import SampleOrder
from megatron_skywork.data.tokenizers import load_tokenizer
from megatron_skywork.data.verification import describe


def data_identity(config: Config) -> dict[str, Any]:
    """What the tokenizer and the training blend of a run are, by content.

    Returns:
        `tokenizer`: fingerprint, None where nothing names one; `train`: for each source `sha256` (of both files, or of the .idx where no side file says
        the other), `bin_bytes`, `idx_bytes`, `num_tokens` and `weight`; None with data.mock.
    Raises:
        DataError: a side file or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
    sides = [] if config.data.mock else [describe(source.path, tokenizer) for source in config.data.train]
    sources = [
        {"sha256": hashlib.sha256(f"{side.bin_sha256 or ''}{side.idx_sha256}".encode()).hexdigest(), "bin_bytes": side.bin_bytes, "idx_bytes": side.idx_bytes,
         "num_tokens": side.num_tokens, "weight": source.weight}
        for source, side in zip(config.data.train, sides, strict=False)
    ]
    fingerprint = tokenizer.fingerprint if tokenizer is not None else sides[0].tokenizer_fingerprint if sides else None
    return {"tokenizer": fingerprint, "train": sources or None}


def blend_position(data: Mapping[str, Any], seq_length: int, samples: int) -> list[dict[str, int]]:
    """Where each source of a blend stands after `samples` samples of the run: whole `epochs`, and `samples` of the one it is in; empty for mock data.

    Args:
        data: as `data_identity` gives it.
        seq_length: tokens per sample.
        samples: consumed by all ranks together since the run began.
    """
    sources = data.get("train") or []
    if not sources:
        return []
    # An epoch is cut every seq_length tokens, and the last sample needs one more for its label; see datasets.OneEpochDataset.
    sizes = [(source["num_tokens"] - 1) // seq_length for source in sources]
    order = SampleOrder(sizes, [source["weight"] for source in sources], seed=0)
    return [{"epochs": epochs, "samples": within} for epochs, within in order.drawn(samples)]
