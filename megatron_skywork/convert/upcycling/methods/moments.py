"""Mean and standard deviation of a weight, the same to the last bit whatever the number of torch threads.

    mean = s + S1/n,  std^2 = (S2 - S1^2/n) / (n - 1),  S1 = sum(w - s), S2 = sum((w - s)^2)

s is the first element: it keeps S2 from cancelling where the mean is large beside the deviation. torch splits a sum to one number among its threads, and
where it splits changes the rounding; sums of fixed short runs it does not split, and those are added exactly (math.fsum).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megatron_skywork.errors import CheckpointError

_RUN = 512


def moments(chunks: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over all elements of all chunks, in fp64; a few chunk-sized temporaries.

    Raises:
        CheckpointError: NaN or an infinity among the elements.
    """
    count, shift = 0, 0.0
    sums: list[float] = []
    squares: list[float] = []
    for chunk in chunks:
        wide = chunk.to(torch.float64, copy=True, memory_format=torch.contiguous_format).flatten()
        if count == 0:
            shift = wide[0].item()
        count += wide.numel()
        wide.sub_(shift)
        if wide.numel() % _RUN:
            wide = torch.nn.functional.pad(wide, (0, -wide.numel() % _RUN))
        sums += wide.view(-1, _RUN).sum(1).tolist()
        squares += wide.square_().view(-1, _RUN).sum(1).tolist()
    if not all(map(math.isfinite, sums)):
        raise CheckpointError("a weight whose mean and standard deviation are needed holds NaN or infinite values; the dense checkpoint is damaged")
    total = math.fsum(sums)
    variance = (math.fsum(squares) - total * total / count) / max(1, count - 1)
    return shift + total / count, math.sqrt(max(0.0, variance))
