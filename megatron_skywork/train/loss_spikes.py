"""Which losses are spikes: how far a loss stands above those before it, by statistics that a few spikes among them do not move.

With the window's median m and its median absolute deviation MAD = median |x_i - m|,

    score = (x - m) / (1.4826 MAD) ,

1.4826 MAD being the standard deviation where losses are normal: the modified z-score of Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993). A mean
and a standard deviation, as OLMo-core's SkipStepOptimizer takes them over 128 steps, are moved by the spikes that they are to find. Going back to a checkpoint
and passing over the data around a spike is what PaLM did (Chowdhery et al., arXiv 2204.02311, section 5.1).

Only losses above the median count. A spike enters the window as any loss does, so that a level that stays is no spike any more when it fills half of it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_skywork.config.schema import Spikes

NORMAL = 1.4826
# Of the median. Where losses hardly differ (a constant one, in a test or after a collapse), MAD is close to nothing and any step up would be a spike.
SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True)
class Spike:
    """A loss that stands out."""

    loss: float
    median: float
    score: float
    """In robust standard deviations above the median."""


def spike_score(loss: float, before: Sequence[float]) -> tuple[float, float]:
    """The median of the losses before, and how far above it `loss` is in robust standard deviations.

    Args:
        loss: finite, as all of them.
        before: at least one.
    """
    median = statistics.median(before)
    deviation = NORMAL * statistics.median(abs(value - median) for value in before)
    return median, (loss - median) / max(deviation, SMALLEST_DEVIATION * abs(median), math.ulp(1.0))


class LossWindow:
    """The last losses of a run.

    Args:
        settings: section `spikes`.
    """

    def __init__(self, settings: Spikes):
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.window)

    def observe(self, loss: float) -> Spike | None:
        """Compare a loss with the window, then take it in.

        Args:
            loss: finite; one that is not is refused as such, and says nothing about the next ones.
        """
        if self._settings.policy == "off":
            return None
        spike = None
        if len(self._losses) >= self._settings.minimum_steps:
            median, score = spike_score(loss, self._losses)
            spike = Spike(loss, median, score) if score > self._settings.threshold else None
        self._losses.append(loss)
        return spike

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a window of another length, the newest losses."""
        self._losses = deque(state["losses"], maxlen=self._settings.window)
