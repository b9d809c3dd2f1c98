"""Where the documents of a sample end: as lengths, which attention keeps them apart by.

A sample is cut from documents laid end to end, so its first and last may be parts. megatron-core would say the same with an [S, S] mask, made in Python once
per sample; at S = 8192 that is 64 MiB a sample to make, collate and copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_lengths(tokens_S: Tensor, eod_id: int) -> Tensor:
    """Lengths of the documents in order, then zeros, so that samples stack: int32 [S]. The token that ends a document belongs to it."""
    num_tokens = len(tokens_S)
    ends = (tokens_S == eod_id).nonzero().flatten() + 1
    lengths = torch.diff(ends, prepend=ends.new_tensor([0]), append=ends.new_tensor([num_tokens]))
    lengths = lengths[lengths > 0]  # nothing is left behind the last end where the sample ends with a document
    lengths_S = torch.zeros(num_tokens, dtype=torch.int32)
    lengths_S[: len(lengths)] = lengths
    return lengths_S
