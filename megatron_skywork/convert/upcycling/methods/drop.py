"""Drop-Upcycling: each expert forgets a share r of its feed-forward's inner columns, so that experts differ from the start and keep what they know.

    S ~ floor(r F) of the F inner columns, drawn anew for every expert, the same S for its gate, up and down projection
    W~ = I_S * R + (1 - I_S) * W,   R ~ normal(mean(W_S), std(W_S)^2),   for each of the three matrices with its own statistics

Nakamura et al., Drop-Upcycling, arXiv 2502.19261, section 3; r = 0.5 was best there. W_S is the selected part: rows of gate and up [F, H], columns of
down [H, F]. The statistics are of the source weights, one mean and one deviation (n - 1) for the whole selected part. The authors' published script also
permutes the inner columns, which changes no output, and draws S for each matrix anew, where the paper has one S per expert: this follows the paper. It
matters: a column that is new in one matrix and old in another computes nothing the dense model knew, so three sets would forget 1 - (1 - r)^3 of the columns.

The mixture is not the dense model at step 0; `--verify` measures the distance.

Shapes: F inner width, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatron_skywork.convert.upcycling.methods.moments import moments
from megatron_skywork.convert.upcycling.methods.row_chunks import rows_per_chunk
from megatron_skywork.errors import ConfigError


def drop_problem(ffn: int, ratio: float) -> str | None:
    """What is wrong with a ratio of columns to re-initialize for an inner width of `ffn`, or None."""
    if not 0.0 < ratio <= 1.0:
        return f"--drop-ratio={ratio}: a share of the feed-forward's inner columns, above 0 and at most 1; the paper's choice is 0.5"
    if _num_dropped(ffn, ratio) == 0:
        return f"--drop-ratio={ratio}: is less than one of {ffn} inner columns; use at least {1 / ffn:.2g}, or leave it out to copy"
    return None


def _num_dropped(ffn: int, ratio: float) -> int:
    # 0.29 * 100 is 28.999999999999996 in binary.
    return math.floor(ffn * ratio + 1e-6)


def dropped_columns(ffn: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """The index set S of one expert: floor(ratio * ffn) different columns, int64, sorted.

    Args:
        generator: of this expert, not of a matrix: made from the same names for gate, up and down, it gives the three one set.

    Raises:
        ConfigError: the ratio drops no column, or is no ratio.
    """
    problem = drop_problem(ffn, ratio)
    if problem:
        raise ConfigError(problem)
    return torch.randperm(ffn, generator=generator)[: _num_dropped(ffn, ratio)].sort().values


def reinitialize(matrix: torch.Tensor, columns: torch.Tensor, ffn_axis: int, generator: torch.Generator) -> torch.Tensor:
    """A copy of `matrix` with the inner columns `columns` drawn anew from the statistics they have in `matrix`; the rest is bit for bit the same.

    Args:
        matrix: gate or up projection [F, H] with ffn_axis 0, down projection [H, F] with ffn_axis 1.
        columns: int64, from `dropped_columns`.
        generator: of this expert's matrix: the three must not share their numbers.

    Raises:
        CheckpointError: the selected part holds NaN or infinities.
    """
    mean, std = moments(matrix[where].index_select(ffn_axis, picked) for where, picked in _parts(matrix, columns, ffn_axis))
    out = matrix.clone(memory_format=torch.contiguous_format)
    for where, picked in _parts(matrix, columns, ffn_axis):
        target = out[where]
        shape = list(target.shape)
        shape[ffn_axis] = len(picked)
        drawn = torch.empty(shape).normal_(generator=generator).mul_(std).add_(mean)
        target.index_copy_(ffn_axis, picked, drawn.to(matrix.dtype))
    return out


def _parts(matrix: torch.Tensor, columns: torch.Tensor, ffn_axis: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The selected part chunk by chunk: rows of `matrix`, and which inner columns of them."""
    if ffn_axis == 0:
        for picked in columns.split(rows_per_chunk(matrix.shape[1])):
            yield slice(None), picked
        return
    rows = rows_per_chunk(len(columns))
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, start + rows), columns
