"""Which sample comes when: a pure function of (seed, sample index), so that no run length, layout or restart can change it.

Two questions are answered for sample i, both without walking from sample 0:

1. Which dataset of the blend? The weights become whole numbers a_0..a_{K-1} with sum P, and one cycle of P samples is laid out so that
   after every n samples each dataset has served its share to within one sample:  | c_d(n) - n a_d / P | <= 1 - 1/(2K-2).
   This is Tijdeman's solution of the chairman assignment problem (R. Tijdeman, Discrete Mathematics 32, 1980): at step n, among the datasets
   with  n a_d/P - c_d(n-1) >= 1/(2K-2), the one that must be served soonest to keep the bound. After a cycle every error is 0, so
   sample i is place i mod P of cycle i div P, and it is the j-th sample of its dataset with  j = (i div P) a_d + rank(i mod P).
2. Which sample of that dataset? Dataset d with N samples is walked epoch by epoch: j is place p = j mod N of epoch e = j div N, and the
   sample is  permutation_{seed,d,e}(p). The permutation is a Feistel network over [0, 4^h), the smallest such range that holds N, whose round
   function is a 64-bit mix; results outside [0, N) are sent through again until they fall inside (cycle walking: J. Black and
   P. Rogaway, CT-RSA 2002). It needs no table, so the epochs of a dataset of any size cost no memory, and it does not depend on a random
   generator whose stream another version might change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_skywork.errors import DataError

MAX_CYCLE = 1 << 16
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_ROUNDS = 6


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014), elementwise: uint64 to uint64, a bijection that scatters neighbours."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """A 64-bit key from whole numbers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = (key + _GOLDEN * (1 + (part & _MASK64))) & _MASK64
        key = ((key ^ (key >> 30)) * _MULTIPLIER_1) & _MASK64
        key = ((key ^ (key >> 27)) * _MULTIPLIER_2) & _MASK64
        key ^= key >> 31
    return key


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of `positions` [N] (int64, each in [0, size)) under the permutation of [0, size) that `key` names.

    Distinct positions have distinct images; no table of `size` entries is made.
    """
    half_bits = max(2, -(-(size - 1).bit_length() // 2))
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    keys = [np.uint64(derive_key(key, number)) for number in range(_ROUNDS)]
    images = np.array(positions, dtype=np.uint64)
    pending = np.arange(images.size)
    while pending.size:
        left, right = images[pending] >> shift, images[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        images[pending] = (left << shift) | right
        pending = pending[images[pending] >= np.uint64(size)]
    return images.astype(np.int64)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights`, summing to the cycle length P <= 65536.

    The ratio is exact when such numbers exist (decimal weights with few digits: 0.7, 0.2, 0.1 give 7, 2, 1); else each share is rounded to a multiple
    of 1/65536 by largest remainder.

    Raises:
        DataError: a share is so small that it would round to nothing.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    if any(weight <= 0 for weight in exact):
        raise DataError(f"blend weights {list(weights)}: every weight must be above 0; leave the dataset out instead")
    shares = [weight / sum(exact) for weight in exact]
    cycle = lcm(*(share.denominator for share in shares))
    if cycle <= MAX_CYCLE:
        return [int(share * cycle) for share in shares]
    scaled = [share * MAX_CYCLE for share in shares]
    whole = [int(value) for value in scaled]
    by_remainder = sorted(range(len(whole)), key=lambda d: (whole[d] - scaled[d], d))
    for d in by_remainder[: MAX_CYCLE - sum(whole)]:
        whole[d] += 1
    if 0 in whole:
        d = whole.index(0)
        raise DataError(f"blend weight {weights[d]} is {float(shares[d]):.2g} of the blend; the smallest share that can be kept is 1/{MAX_CYCLE}: "
                        "raise it, or leave the dataset out")
    return whole


@functools.lru_cache(maxsize=32)
def blend_cycle(whole: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One cycle of a blend: (dataset [P], rank [P]), where rank counts earlier places of the same dataset in the cycle."""
    amounts_K = np.array(whole, dtype=np.int64)
    num_datasets, cycle = len(whole), int(amounts_K.sum())
    dataset_P: np.ndarray = np.zeros(cycle, dtype=np.int64)
    rank_P: np.ndarray = np.zeros(cycle, dtype=np.int64)
    counts_K: np.ndarray = np.zeros(num_datasets, dtype=np.int64)
    if num_datasets == 1:
        return dataset_P, np.arange(cycle, dtype=np.int64)
    # Everything is multiplied by P (2K-2), so that the comparison with 1/(2K-2) is one of whole numbers.
    scale = 2 * num_datasets - 2
    for place in range(cycle):
        deficit_K = scale * ((place + 1) * amounts_K - counts_K * cycle)
        slack_K = np.where(deficit_K >= cycle, (cycle * (scale - 1) - deficit_K) / amounts_K, np.inf)
        chosen = int(np.argmin(slack_K))
        dataset_P[place], rank_P[place] = chosen, counts_K[chosen]
        counts_K[chosen] += 1
    return dataset_P, rank_P


class SampleOrder:
    """The order in which a blend's samples are consumed.

    Args:
        sizes: samples in one epoch of each dataset.
        weights: share of each dataset; any positive scale.
        seed: another seed permutes every epoch anew; which dataset serves a sample does not depend on it.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        if len(sizes) != len(weights) or not sizes:
            raise ValueError(f"{len(sizes)} sizes and {len(weights)} weights")
        if min(sizes) < 1:
            raise ValueError(f"sizes {list(sizes)}: a dataset without samples cannot be walked")
        self.sizes, self.seed = [int(size) for size in sizes], seed
        self._whole = whole_weights(weights)
        self._dataset_P, self._rank_P = blend_cycle(tuple(self._whole))

    def drawn(self, samples: int) -> list[tuple[int, int]]:
        """Where each dataset stands after the first `samples` samples of the blend: its epoch, and how many samples of it are consumed."""
        cycles, place = divmod(samples, len(self._dataset_P))
        within_K = np.bincount(self._dataset_P[:place], minlength=len(self.sizes))
        drawn = [cycles * whole + int(within) for whole, within in zip(self._whole, within_K, strict=True)]
        return [divmod(count, size) for count, size in zip(drawn, self.sizes, strict=True)]

    def locate(self, indices: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and sample within it for each global sample index.

        Args:
            indices: [N] sample indices >= 0, in any order.
        Returns:
            (dataset [N], sample [N]), int64.
        """
        indices_N = np.asarray(indices, dtype=np.int64)
        cycles_N, places_N = np.divmod(indices_N, len(self._dataset_P))
        dataset_N, sample_N = self._dataset_P[places_N], np.empty_like(indices_N)
        for d in np.unique(dataset_N):
            mine = np.flatnonzero(dataset_N == d)
            drawn = cycles_N[mine] * self._whole[d] + self._rank_P[places_N[mine]]
            epochs, positions = np.divmod(drawn, self.sizes[d])
            for epoch in np.unique(epochs):
                here = epochs == epoch
                sample_N[mine[here]] = permute(positions[here], self.sizes[d], derive_key(self.seed, int(d), int(epoch)))
        return dataset_N, sample_N
