"""How much of the rates of single kernels and collectives training keeps, from runs whose step is known.

A step takes about

    T = kernels / k + collectives / c

where both sums are those of an estimate with k = c = 1, each with its share of the waiting in the pipeline. k and c are chosen so that the mean of
|T - measured| / measured is least, which two runs (or one run and a bound) always determine. No link gives more than its rate, so c <= 1; kernels' rates may
have been guessed too low. Two numbers cannot be made to fit a row that is not among those
they were found with, which is how docs/planning.md uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_skywork.plan.estimate import COLLECTIVES, Estimate
from megatron_skywork.plan.hardware import Sustained

# Between these lie 1 / k and 1 / c.
KERNELS, LINKS = (0.5, 4.0), (1.0, 4.0)
_ONCE_A_STEP = {"gradients and parameters": "collectives", "optimizer": "kernels"}


@dataclass(frozen=True)
class Sample:
    """A run whose step is known.

    Args:
        kernels, collectives: seconds of the step's estimate with nothing taken off.
        measured: seconds.
    """

    kernels: float
    collectives: float
    measured: float


def sample(foreseen: Estimate, measured_seconds: float) -> Sample:
    """A run with its estimate, which was made for a cluster that sustains everything."""
    seconds = {"kernels": 0.0, "collectives": 0.0}
    once = dict(seconds)
    for name, part in foreseen.parts.items():
        if name in _ONCE_A_STEP:
            once[_ONCE_A_STEP[name]] += part
        elif name != "waiting":
            seconds["collectives" if name in COLLECTIVES else "kernels"] += part
    waiting = 1 + foreseen.parts["waiting"] / sum(seconds.values())
    return Sample(seconds["kernels"] * waiting + once["kernels"], seconds["collectives"] * waiting + once["collectives"], measured_seconds)


def find(samples: Sequence[Sample], source: str) -> Sustained:
    """The shares that the samples tell; one share for both where there is only one.

    Args:
        source: what the samples are, in words.
    """
    if len(samples) == 1:
        stretch = samples[0].measured / (samples[0].kernels + samples[0].collectives)
        return Sustained(1 / stretch, 1 / stretch, source)

    def error(stretches: tuple[float, float]) -> float:
        return sum(abs(stretches[0] * one.kernels + stretches[1] * one.collectives - one.measured) / one.measured for one in samples)

    kernels, collectives = min(_corners(samples), key=error)
    return Sustained(1 / kernels, 1 / collectives, source)


def _corners(samples: Sequence[Sample]) -> Sequence[tuple[float, float]]:
    """Where the least error can lie: it is piecewise linear, so two samples are met exactly there, or one at a bound, or two bounds."""
    found = [(kernels, collectives) for kernels in KERNELS for collectives in LINKS] + [(1.0, 1.0)]
    for one in samples:
        found += [((one.measured - bound * one.collectives) / one.kernels, bound) for bound in LINKS]
        found += [(bound, (one.measured - bound * one.kernels) / one.collectives) for bound in KERNELS if one.collectives]
    for one, other in combinations(samples, 2):
        determinant = one.kernels * other.collectives - other.kernels * one.collectives
        if determinant:
            found.append((
                (one.measured * other.collectives - other.measured * one.collectives) / determinant,
                (one.kernels * other.measured - other.kernels * one.measured) / determinant,
            ))  # fmt: skip
    return [corner for corner in found if all(least <= stretch <= most for stretch, (least, most) in zip(corner, (KERNELS, LINKS), strict=True))]
