"""Metrics that know how they are reduced, so that ranks talk to each other only when something is logged.

Every rank adds what it measured, on whatever device it was measured, and nothing waits for the device or for another rank until `reduce`. There, all sums and
weighted means travel in one SUM collective and all maxima, minima and equalities in one MAX collective, packed as float64, however many metrics there are:

    sum    S = sum_r x_r                            mean   sum_r w_r x_r / sum_r w_r
    max    max_r x_r                                min    -max_r (-x_r)
    same   max_r x_r, which must equal -max_r (-x_r)

A third one of two numbers says whether all ranks packed the same names; were they not, the packed numbers would land under wrong names without a word.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

Reduction = Literal["sum", "mean", "max", "min", "same"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

# What a rank knows of a name, ordered so that the largest wins under MAX. NaN is carried here because backends disagree on the maximum of a NaN and a number.
_ABSENT, _PRESENT, _NAN = 0.0, 1.0, 2.0
# Two ranks compute "the same" number in the same order; this forgives nothing but a last-digit difference between kernels.
_SAME_TOLERANCE = 1e-5


@dataclass
class _Entry:
    """One name: how it is reduced, its shape, and what has been added since the last reduce (None: nothing)."""

    reduction: str
    shape: tuple[int, ...]
    value: torch.Tensor | None = None
    weight: torch.Tensor | None = None


class MetricBuffer:
    """Collects values between two log lines and reduces them over ranks all at once.

    All ranks of the group must know the same names when `reduce` is called. A rank that has no value for a name (the loss, on a pipeline stage that is not the
    last) must `declare` it; declaring is harmless where a value follows.

    Args:
        device: where the packed numbers are put for the collective: the device of the communication backend.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = torch.device(device)
        self._entries: dict[str, _Entry] = {}

    def declare(self, name: str, reduction: Reduction, shape: tuple[int, ...] = ()) -> None:
        """Announce a name that this rank may have no value for.

        Raises:
            ValueError: the name is known with another reduction or shape, or there is no such reduction.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"metric {name}: reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
        entry = self._entries.setdefault(name, _Entry(reduction, tuple(shape)))
        if (entry.reduction, entry.shape) != (reduction, tuple(shape)):
            raise ValueError(f"metric {name}: {reduction} of shape {tuple(shape)}, but it is known as {entry.reduction} of shape {entry.shape}")

    @torch.no_grad()
    def add(self, name: str, value: float | torch.Tensor, reduction: Reduction, *, weight: float | torch.Tensor | None = None) -> None:
        """Add a value; it stays on its device.

        Values of one name accumulate until the next `reduce`: sums add up, means are weighted together, maxima and minima keep the extreme, `same` keeps
        the last.

        Args:
            value: a number or a tensor of any shape, the same shape on all ranks.
            weight: for means, what the value counts for (say, its tokens); a number, or a tensor that broadcasts to the value. A weight of 0 adds nothing,
                even where the value is NaN.

        Raises:
            ValueError: a weight for something that is not a mean, or a name that changed its reduction or shape.
        """
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        self.declare(name, reduction, shape)
        if weight is not None and reduction != "mean":
            raise ValueError(f"metric {name}: only a mean has a weight, and this is a {reduction}")
        entry = self._entries[name]
        device = entry.value.device if entry.value is not None else value.device if isinstance(value, torch.Tensor) else self._device
        new = _as_float64(value, device)
        if reduction == "mean":
            counts = _as_float64(1.0 if weight is None else weight, device).expand(shape)
            weighted = torch.where(counts == 0, torch.zeros_like(new), new * counts)
            entry.value = weighted if entry.value is None else entry.value + weighted
            entry.weight = counts if entry.weight is None else entry.weight + counts
        elif entry.value is None or reduction == "same":
            entry.value = new.clone()
        elif reduction == "sum":
            entry.value = entry.value + new
        elif reduction == "max":
            entry.value = torch.maximum(entry.value, new)
        else:
            entry.value = torch.minimum(entry.value, new)

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
        """Reduce over the ranks of `group` (None: all; this process alone where torch.distributed is not in use) and start anew.

        This waits for the device and for the other ranks; all of them must call it. Ranks that hold copies of one another's values (tensor parallel) count
        several times in a sum: choose the group accordingly, or add the value on one of them.

        Returns:
            A float per name, or nested lists for a tensor, on every rank. Names that no rank gave a value are left out; a mean whose weights sum to 0 is NaN.

        Raises:
            RuntimeError: ranks know different names, or a `same` value differs between ranks.
        """
        names = sorted(self._entries)
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        if together:
            self._check_names(names, group)
        sums, maxima = self._pack(names)
        if together:
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        numbers = torch.cat([sums, maxima]).cpu()
        reduced = self._unpack(names, numbers[: sums.numel()], numbers[sums.numel() :])
        for entry in self._entries.values():
            entry.value = entry.weight = None
        return reduced

    def _check_names(self, names: list[str], group: dist.ProcessGroup | None) -> None:
        """All ranks must pack the same layout: the largest and the smallest of their fingerprints agree."""
        layout = [(name, self._entries[name].reduction, self._entries[name].shape) for name in names]
        fingerprint = float(zlib.crc32(repr(layout).encode()))
        both = torch.tensor([fingerprint, -fingerprint], dtype=torch.float64, device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        if both[0] != -both[1]:
            described = ", ".join(f"{name} ({reduction}, shape {shape})" for name, reduction, shape in layout)
            raise RuntimeError(f"ranks do not agree on their metrics: declare() on every rank what only some of them add. This rank knows: {described}")

    def _pack(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the SUM and of the MAX collective, flat, in the order `_unpack` reads them."""
        sums, maxima = [torch.zeros(0, dtype=torch.float64, device=self._device)], [torch.zeros(0, dtype=torch.float64, device=self._device)]
        for name in names:
            entry = self._entries[name]
            absent = entry.value is None
            size = math.prod(entry.shape)
            flat = self._flat(entry.value, size, 0.0)
            if entry.reduction in ("sum", "mean"):
                sums += [flat, self._flat(None, 1, _ABSENT if absent else _PRESENT)]
                if entry.reduction == "mean":
                    sums.append(self._flat(entry.weight, size, 0.0))
                continue
            nan = torch.isnan(flat)
            state = torch.where(nan, _NAN, _PRESENT) if not absent else torch.full_like(flat, _ABSENT)
            for sign in {"max": (1,), "min": (-1,), "same": (1, -1)}[entry.reduction]:
                maxima.append(torch.where(nan | absent, -math.inf, sign * flat))
            maxima.append(state)
        return torch.cat(sums), torch.cat(maxima)

    def _flat(self, value: torch.Tensor | None, size: int, fill: float) -> torch.Tensor:
        if value is None:
            return torch.full((size,), fill, dtype=torch.float64, device=self._device)
        return value.to(self._device).reshape(-1)

    def _unpack(self, names: list[str], sums: torch.Tensor, maxima: torch.Tensor) -> dict[str, Any]:
        reduced: dict[str, Any] = {}
        sum_at = max_at = 0

        def take_sum(count: int) -> torch.Tensor:
            nonlocal sum_at
            sum_at += count
            return sums[sum_at - count : sum_at]

        def take_max(count: int) -> torch.Tensor:
            nonlocal max_at
            max_at += count
            return maxima[max_at - count : max_at]

        for name in names:
            entry = self._entries[name]
            size = math.prod(entry.shape)
            if entry.reduction in ("sum", "mean"):
                value, present = take_sum(size), bool(take_sum(1) > 0)
                if entry.reduction == "mean":
                    value = value / take_sum(size)
            else:
                value = take_max(size) * (-1 if entry.reduction == "min" else 1)
                smallest = -take_max(size) if entry.reduction == "same" else value
                state = take_max(size)
                present = bool((state > _ABSENT).all())
                if present and entry.reduction == "same":
                    _check_same(name, smallest, value, known=state == _PRESENT)
                value = torch.where(state == _NAN, math.nan, value)
            if present:
                reduced[name] = value.reshape(entry.shape).tolist()
        return reduced


def _as_float64(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A filled tensor rather than a copied number: a copy from the host would wait for the device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device=device, dtype=torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _check_same(name: str, smallest: torch.Tensor, largest: torch.Tensor, known: torch.Tensor) -> None:
    if not torch.allclose(smallest[known], largest[known], rtol=_SAME_TOLERANCE, atol=0.0):
        raise RuntimeError(f"metric {name} should be the same on all ranks and is between {smallest.tolist()} and {largest.tolist()}")
