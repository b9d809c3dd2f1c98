"""Several dense models in one mixture: what there can only be one of is their mean.

    W = (1/n) * sum_i W_i

Branch-Train-MiX (Sukhbaatar et al., arXiv 2403.07816): each dense model's feed-forward becomes an expert (or several), and attention, norms and embeddings are
averaged. The models must come from one seed model: the mean of unrelated weights is no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_skywork.convert.upcycling.methods.row_chunks import CHUNK_ELEMENTS
from megatron_skywork.errors import CheckpointError


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of tensors of one shape and dtype, in that dtype; bit for bit the tensor itself where all are equal.

    Summed in fp64, a chunk at a time: there n * w of an fp32 w is exact, so equal tensors give themselves back, which fp32 sums do not for n = 3.

    Raises:
        CheckpointError: shapes or dtypes differ.
    """
    kinds = sorted({f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors})
    if len(kinds) > 1:
        raise CheckpointError(f"the dense models to be averaged differ in shape or dtype: {', '.join(kinds)}; they must be trained from one seed model")
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, out.numel(), CHUNK_ELEMENTS):
        total = flat[0][start : start + CHUNK_ELEMENTS].to(torch.float64, copy=True)
        for tensor in flat[1:]:
            total.add_(tensor[start : start + CHUNK_ELEMENTS])
        out.view(-1)[start : start + CHUNK_ELEMENTS] = total.div_(len(tensors))
    return out
