"""The first weights of a router, which no dense model has: rows [E, H] in fp32, logits = rows @ x.

* normal: every entry normal(0, std^2); the Skywork-MoE report's choice, std 0.01 (arXiv 2406.06563).
* zero: all experts equally likely; which are chosen is up to the top-k's order until the first step.
* orthogonal: rows at right angles and of one length, so that no two experts want the same tokens and none is favoured by its row's length.
* from_hidden: centroids of the router's inputs on real text, one per expert: experts begin with tokens that are alike. k-means (Lloyd 1982) from the start
  of Arthur and Vassilvitskii (k-means++, 2007). Cluster-aware upcycling (arXiv 2604.13508) sets routers to centroids too.
* from_texts: one text per expert, its mean hidden state as the row; what mergekit's MoE merge does in its mode `hidden_avg`, unit length included.

The last two are centred: the part that all rows share moves all logits alike, which neither softmax, top-k nor gate-logit normalization sees. Then they are
scaled so that the root mean square of the entries is std, as it is for the others.

Everything is the same for any number of torch threads: sums go row by row or over runs torch does not split. Matrix products, whose rounding may differ, only
decide which centroid is nearest, after rounding to fp32.

Shapes: E experts (rows), H hidden, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_skywork.errors import DataError

_TOKENS_PER_CHUNK = 1024
# Squared distances below this share of a token's squared length are rounding: the tokens are the same.
_SAME = 1e-12


def normal(num_rows: int, hidden: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Rows of independent normal(0, std^2) numbers."""
    return torch.empty(num_rows, hidden).normal_(generator=generator).mul_(std)


def zero(num_rows: int, hidden: int) -> torch.Tensor:
    """Rows of zeros."""
    return torch.zeros(num_rows, hidden)


def orthogonal(num_rows: int, hidden: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Rows at right angles to one another, each of length std * sqrt(hidden), in a random direction.

    Only `hidden` rows can be at right angles: more of them come in blocks of `hidden`, each block orthogonal in itself.
    """
    rows_EH = torch.empty(num_rows, hidden, dtype=torch.float64)
    for start in range(0, num_rows, hidden):
        _orthonormalize(rows_EH[start : start + hidden], generator)
    return rows_EH.mul_(std * math.sqrt(hidden)).float()


def _orthonormalize(block_EH: torch.Tensor, generator: torch.Generator) -> None:
    """Fill a block with orthonormal rows: Gram-Schmidt, each row twice, on normal numbers."""
    block_EH.normal_(generator=generator)
    columns_HE = torch.empty_like(block_EH.T, memory_format=torch.contiguous_format)
    for number, row_H in enumerate(block_EH):
        for _ in range(2):
            overlap_E = (block_EH[:number] * row_H).sum(1)
            row_H.sub_((columns_HE[:, :number] * overlap_E).sum(1))
        row_H.div_(math.sqrt(math.fsum(row_H.square().tolist())))
        columns_HE[:, number] = row_H


def from_hidden(hidden_TH: torch.Tensor, num_rows: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Centroids of the router's inputs, centred over experts and scaled to std.

    Args:
        hidden_TH: the router's inputs (after the norm) on some text, any float dtype. A few thousand tokens do: each round takes T * H * E multiplications.
        num_rows: experts; for virtual groups the copies.

    Raises:
        DataError: fewer different hidden states than rows, or values that are not finite.
    """
    return _centred(centroids(hidden_TH, num_rows, generator), std)


def centroids(hidden_TH: torch.Tensor, num_rows: int, generator: torch.Generator, rounds: int = 50) -> torch.Tensor:
    """k-means of the tokens, [E, H] in fp64: at most `rounds` rounds, fewer where no token changes its centroid any more.

    Raises:
        DataError: as from_hidden.
    """
    length_T = torch.cat([chunk.double().square().sum(1) for chunk in hidden_TH.split(_TOKENS_PER_CHUNK)])
    if not torch.isfinite(length_T).all():
        raise DataError("the router's inputs on the given text hold NaN or infinite values; the dense checkpoint is damaged, or its dtype too narrow")
    centroids_EH = _spread_start(hidden_TH, length_T, num_rows, generator)
    nearest_T = None
    for _ in range(rounds):
        distance_T, found_T = _distances(hidden_TH, length_T, centroids_EH).float().min(dim=1)
        _fill_empty(found_T, distance_T, num_rows)
        if nearest_T is not None and torch.equal(found_T, nearest_T):
            break
        nearest_T = found_T
        centroids_EH = _means(hidden_TH, nearest_T, num_rows)
    return centroids_EH


def _distances(hidden_TH: torch.Tensor, length_T: torch.Tensor, centroids_EH: torch.Tensor) -> torch.Tensor:
    """Squared distances [T, E] in fp64, zero where token and centroid are the same: |x|^2 - 2 x c + |c|^2."""
    length_E = centroids_EH.square().sum(1)
    product_TE = torch.cat([chunk.double() @ centroids_EH.T for chunk in hidden_TH.split(_TOKENS_PER_CHUNK)])
    distance_TE = length_T[:, None] - 2.0 * product_TE + length_E
    return distance_TE.masked_fill_(distance_TE <= _SAME * length_T[:, None], 0.0)


def _spread_start(hidden_TH: torch.Tensor, length_T: torch.Tensor, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each further centroid is a token drawn in proportion to its squared distance from the nearest so far."""
    num_tokens = hidden_TH.shape[0]
    chosen = [int(torch.randint(num_tokens, (1,), generator=generator))] if num_tokens else []
    distance_T = torch.full((num_tokens,), math.inf, dtype=torch.float64)
    while len(chosen) < num_rows:
        if chosen:
            distance_T = torch.minimum(distance_T, _distances(hidden_TH, length_T, hidden_TH[chosen[-1:]].double())[:, 0])
        reach_T = distance_T.cumsum(0)
        if not chosen or reach_T[-1] == 0.0:
            raise DataError(f"the text for the router gives {len(chosen)} different hidden states, and {num_rows} experts need one each; give a longer text")
        mark = torch.rand(1, dtype=torch.float64, generator=generator) * reach_T[-1]
        chosen.append(min(int(torch.searchsorted(reach_T, mark, right=True)), num_tokens - 1))
    return hidden_TH[chosen].double()


def _fill_empty(nearest_T: torch.Tensor, distance_T: torch.Tensor, num_rows: int) -> None:
    """Give each centroid that has lost all its tokens the token farthest from its own, among those that are not their centroid's only one; in place."""
    count_E = nearest_T.bincount(minlength=num_rows)
    for empty in (count_E == 0).nonzero()[:, 0].tolist():
        token = int(distance_T.masked_fill(count_E[nearest_T] < 2, -1.0).argmax())
        count_E[nearest_T[token]] -= 1
        count_E[empty] = 1
        nearest_T[token] = empty


def _means(hidden_TH: torch.Tensor, group_T: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean of each group's tokens [groups, H] in fp64, added token by token."""
    total_EH = torch.zeros(num_groups, hidden_TH.shape[1], dtype=torch.float64)
    for chunk, group in zip(hidden_TH.split(_TOKENS_PER_CHUNK), group_T.split(_TOKENS_PER_CHUNK), strict=True):
        total_EH.index_add_(0, group, chunk.double())
    return total_EH / group_T.bincount(minlength=num_groups)[:, None]


def from_texts(hidden: Sequence[torch.Tensor], std: float) -> torch.Tensor:
    """One row per text: its mean hidden state, made unit length, centred over the texts and scaled to std.

    Args:
        hidden: of each expert's text the router's inputs [T, H], any float dtype; the number of tokens may differ.

    Raises:
        DataError: a text without tokens, values that are not finite, or texts that cannot be told apart.
    """
    empty = [str(number) for number, hidden_TH in enumerate(hidden, start=1) if hidden_TH.shape[0] == 0]
    if empty:
        raise DataError(f"of the texts for the router number {', '.join(empty)} has no tokens; every expert needs a text")
    rows_EH = torch.cat([_means(hidden_TH, torch.zeros(len(hidden_TH), dtype=torch.int64), 1) for hidden_TH in hidden])
    length_E = rows_EH.square().sum(1).sqrt()
    damaged = [str(number) for number, length in enumerate(length_E.tolist(), start=1) if not math.isfinite(length)]
    if damaged:
        raise DataError(f"the hidden states of the router's text number {', '.join(damaged)} hold NaN or infinite values")
    return _centred(rows_EH / length_E.clamp_min(torch.finfo(torch.float64).tiny)[:, None], std)


def _centred(rows_EH: torch.Tensor, std: float) -> torch.Tensor:
    """Rows less their mean, scaled to a root mean square of std, fp32.

    Raises:
        DataError: the rows are all the same.
    """
    mean_H = torch.zeros(rows_EH.shape[1], dtype=torch.float64)
    for row_H in rows_EH:
        mean_H.add_(row_H)
    mean_H.div_(rows_EH.shape[0])
    centred_EH = rows_EH - mean_H
    size = math.sqrt(math.fsum(centred_EH.square().sum(1).tolist()) / centred_EH.numel())
    whole = math.sqrt(math.fsum(rows_EH.square().sum(1).tolist()) / rows_EH.numel())
    if size <= 1e-6 * whole:
        raise DataError(f"the {len(rows_EH)} texts give the router the same hidden state, so its rows would all be equal; give texts that differ")
    return centred_EH.mul_(std / size).float()
