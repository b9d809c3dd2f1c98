"""Where documents begin and end in a micro-batch, for attention that keeps them apart without a mask.

A sequence of S tokens holds several documents, one behind the other. "A token sees only its own document" is a mask of S^2 entries per sequence, nearly
all of them false, and no fused kernel takes it. Said as lengths it is a few numbers: attention runs over each document by itself and costs the sum of
their squares.

Lengths are made on the host with the sample. Python keeps them there, to cut by and to size kernels by, and the device gets the cumulative ones, so nothing
ever waits for a GPU. megatron-core carries them to every layer of every stage as `packed_seq_params`, also through recomputation.

Shapes: S sequence, B batch.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Documents(PackedSeqParams):
    """Document lengths of a micro-batch in megatron-core's clothes.

    The format is `sbhd`, not megatron-core's packed `thd`: sequences stay [S, B, ...] everywhere but inside attention, so that sequence parallelism, experts
    and rotary positions are what they are without documents.

    Args:
        lengths_BS: int, on the host: per sequence the lengths of its documents in order, which add up to S, then zeros.
        device: where attention runs.
    """

    def __init__(self, lengths_BS: Tensor, device: torch.device):
        self.lengths: list[list[int]] = [[length for length in row if length] for row in lengths_BS.tolist()]
        in_order = [length for row in self.lengths for length in row]
        self.longest = max(in_order)
        ends = torch.tensor([0, *accumulate(in_order)], dtype=torch.int32, pin_memory=device.type != "cpu").to(device, non_blocking=True)
        # megatron-core sizes its rotary angles by `max_seqlen`. Positions run over the whole sequence: attention sees only their differences.
        num_positions = lengths_BS.shape[1]
        super().__init__(qkv_format="sbhd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=num_positions, max_seqlen_kv=num_positions)
