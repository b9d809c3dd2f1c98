"""How rules between settings are written down, and the words they share.

A rule is a generator of sentences; it names the settings it reads, and is left out when one of them already has a problem of its own (then its
answer would be about a value nobody chose).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from megatron_skywork.config.schema import Config

Rule = Callable[[Config, "int | None"], Iterator[str]]
RULES: list[tuple[tuple[str, ...], Rule]] = []


def rule(*reads: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the settings (or whole sections) it reads."""

    def register(function: Rule) -> Rule:
        RULES.append((reads, function))
        return function

    return register


def overlap(reads: Iterable[str], doubtful: Iterable[str]) -> bool:
    """Whether one of the dotted settings is, holds or lies in one that is doubtful."""
    return any(key == bad or key.startswith(bad + ".") or bad.startswith(key + ".") for key in reads for bad in doubtful)


def divisors(number: int) -> list[int]:
    """All divisors, ascending; of a number above 10^10 those that have a factor up to 100,000."""
    small = [d for d in range(1, min(math.isqrt(number), 100_000) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def multiples_near(number: int, step: int) -> str:
    """The multiples of `step` next to a number, in words."""
    below, above = number // step * step, -(-number // step) * step
    return f"{below} or {above}" if 0 < below != above else f"{max(above, step)}"


def listed(numbers: list[int]) -> str:
    """`1, 2 or 4`; long lists are cut in the middle."""
    texts = [str(number) for number in numbers]
    if len(texts) > 14:
        texts = [*texts[:8], "...", *texts[-4:]]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
