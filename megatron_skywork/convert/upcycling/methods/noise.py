"""Copy with noise: experts that start as slightly different copies of the dense feed-forward.

    W_e = W + normal(0, (share * std(W))^2),   drawn anew for every expert and matrix

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) makes all experts the same copy, and the router alone has to tell them apart. Noise on the copies is the
usual remedy, and a baseline of Drop-Upcycling (arXiv 2502.19261), whose published script adds normal(0, 0.02^2) to half of each expert's inner columns. Noise
in shares of the matrix's own standard deviation disturbs every layer alike.

The mixture is no longer the dense model: the distance is for `--verify` to measure.
"""

from __future__ import annotations

import torch

from megatron_skywork.convert.upcycling.methods.moments import moments
from megatron_skywork.convert.upcycling.methods.row_chunks import row_chunks
from megatron_skywork.errors import ConfigError


def noise_problem(share: float) -> str | None:
    """What is wrong with a share of noise, or None."""
    return None if 0.0 <= share <= 100.0 else f"--noise={share}: a share of the weight's standard deviation, 0 to 100; 0.01 to 0.1 are usual"


def with_noise(matrix: torch.Tensor, share: float, generator: torch.Generator, std: float | None = None) -> torch.Tensor:
    """A noisy copy of `matrix` [rows, columns] in its dtype (bf16, fp16, fp32).

    Args:
        share: standard deviation of the noise, as a share of the matrix's; 0 gives `matrix` itself.
        generator: of this expert's matrix (seeds.generator).
        std: the matrix's standard deviation where it is known already, `moments(row_chunks(matrix))[1]`; saves a pass for each further expert.

    Raises:
        ConfigError: a negative share.
        CheckpointError: the matrix holds NaN or infinities.
    """
    problem = noise_problem(share)
    if problem:
        raise ConfigError(problem)
    if share == 0.0:
        return matrix
    deviation = share * (moments(row_chunks(matrix))[1] if std is None else std)
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for source, target in zip(row_chunks(matrix), row_chunks(out), strict=True):
        # Product and sum apart: fused, they round once or twice depending on where torch's threads split the chunk.
        noise = torch.empty(source.shape).normal_(generator=generator).mul_(deviation)
        target.copy_(noise.add_(source))
    return out
