"""What the routers recorded over a run, as arrays.

Runs made before a key existed lack it: what follows from the loads is then computed from them, the rest is NaN. Loads themselves are summarized while reading,
because 100,000 steps of 52 layers and 16 experts do not belong in memory at once.

Shapes: S recorded steps, L MoE layers, E experts, C columns (stretches of steps), V evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_skywork.report.averages import edges_of, nan_mean, window_of

# Parts of the even share below which an expert counts as dead or as starved.
DEAD_BELOW = 0.01
STARVED_BELOW = 0.10
# An expert whose load flickers around the limit is dead since it last had twice as much.
_ALIVE_FROM = 2 * DEAD_BELOW

_FROM_LOAD = ("load_max_over_mean", "load_variation", "load_p10", "load_p50", "load_p90", "dead_experts")
PER_LAYER = ("drop_rate", "coefficient", "aux_loss", "z_loss", "entropy", "max1_over_max2", "max2_over_max3", *_FROM_LOAD)
_EVALUATED = ("changed_experts", "expert_similarity")


@dataclass(frozen=True)
class LoadHistory:
    """Loads over time: stretches of consecutive records, at most some hundred, each with its mean."""

    edges: np.ndarray
    """[C+1] in steps."""
    load_CLE: np.ndarray
    """Mean share of each expert."""
    dead_CLE: np.ndarray
    """Part of the stretch's records in which the expert was dead."""

    @property
    def relative_CLE(self) -> np.ndarray:
        """Load over the even share."""
        return self.load_CLE * self.load_CLE.shape[-1]


@dataclass(frozen=True)
class RouterEvaluations:
    """What evaluations say about routers and experts; NaN where an evaluation did not."""

    steps_V: np.ndarray
    changed_VL: np.ndarray
    """Share of the probe's tokens that chose other experts than at the evaluation before."""
    similarity_VL: np.ndarray
    """Mean cosine over pairs of experts."""


@dataclass(frozen=True)
class Router:
    """Router records of a run. Arrays that were not recorded are all NaN."""

    layers: list[int]
    """Layer numbers, from 1, in the order of the L axis."""
    steps_S: np.ndarray
    load_LE: np.ndarray
    """Share of each expert, mean over the end of the run; rows sum to 1."""
    per_layer: dict[str, np.ndarray]
    """Name -> [S, L] for the names of `PER_LAYER`."""
    history: LoadHistory
    dead_since_LE: np.ndarray
    """The first recorded step after the last at which the expert had 2 % of the even share; NaN where the last step itself was one."""
    window: int
    """Records that "at the end" are."""
    extra_aux_losses: dict[str, np.ndarray] = field(default_factory=dict)
    """Further auxiliary losses, `loss_scope` -> [S, L]."""
    evaluations: RouterEvaluations | None = None

    @property
    def num_experts(self) -> int:
        return self.load_LE.shape[1]

    @property
    def relative_load_LE(self) -> np.ndarray:
        """Load over the even share: 1 is fair, 0 is nothing."""
        return self.load_LE * self.num_experts

    @property
    def entropy_SL(self) -> np.ndarray:
        """Gate entropy over log(E): 1 is a gate without an opinion."""
        return self.per_layer["entropy"] / np.log(self.num_experts)

    def at_start(self, values_SL: np.ndarray) -> np.ndarray:
        """Mean of each layer over the first `window` records, [L]."""
        return nan_mean(values_SL[: self.window], axis=0)

    def at_end(self, values_SL: np.ndarray) -> np.ndarray:
        """Mean of each layer over the last `window` records, [L]; NaN where nothing was recorded."""
        return nan_mean(values_SL[-self.window :], axis=0)


class _LoadColumns:
    """Takes one load after the other and keeps at most `most` stretches: when there are too many, neighbours are joined."""

    def __init__(self, most: int = 256):
        self._most = most
        self._stride = 1
        self._columns: list[list[Any]] = []  # first step, last step, records, sum of loads, records dead

    def take(self, step: int, load_LE: np.ndarray) -> None:
        while self._columns and self._columns[-1][0] >= step:  # recorded again
            self._columns.pop()
        dead_LE = (load_LE * load_LE.shape[-1] < DEAD_BELOW).astype(np.float32)
        last = self._columns[-1] if self._columns else None
        if last is not None and last[2] < self._stride and last[1] < step:
            self._columns[-1] = [last[0], step, last[2] + 1, last[3] + load_LE, last[4] + dead_LE]
            return
        self._columns.append([step, step, 1, load_LE.copy(), dead_LE])
        if len(self._columns) > self._most:
            self._stride *= 2
            halves = zip(self._columns[::2], [*self._columns[1::2], None][: len(self._columns[::2])], strict=True)
            self._columns = [a if b is None else [a[0], b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4]] for a, b in halves]

    def history(self) -> LoadHistory:
        counts_C = np.array([column[2] for column in self._columns], dtype=np.float64)
        starts_C = np.array([column[0] for column in self._columns])
        edges = edges_of(starts_C, int(starts_C[0]), self._columns[-1][1], int(counts_C.sum()))
        load_CLE = np.stack([column[3] for column in self._columns]) / counts_C[:, None, None]
        return LoadHistory(edges, load_CLE, np.stack([column[4] for column in self._columns]) / counts_C[:, None, None])

    def of_last(self, records: int) -> np.ndarray:
        """Mean load over the last so many records, or a few more where a stretch does not end there, [L, E]."""
        total, count = 0.0, 0
        for column in reversed(self._columns):
            total, count = total + column[3], count + column[2]
            if count >= records:
                break
        return np.asarray(total) / count

    def __len__(self) -> int:
        return len(self._columns)


class RouterReader:
    """Takes the router part of step and evaluation records one by one. A step that was recorded twice counts as the later record says, an
    evaluation as the earlier."""

    def __init__(self) -> None:
        self._evaluations: dict[int, tuple[list[int], np.ndarray]] = {}
        self._start_again([])

    def _start_again(self, layers: list[int]) -> None:
        """Another model: what came before cannot be drawn beside it."""
        self._layers = layers
        self._rows: dict[int, np.ndarray] = {}
        self._extra: dict[str, dict[int, np.ndarray]] = {}
        self._loads = _LoadColumns()
        self._last_alive_LE: np.ndarray | None = None

    def take_step(self, step: int, router: Mapping[str, Any]) -> None:
        layers = list(router.get("layers") or [])
        if not layers:
            return
        if layers != self._layers:
            self._start_again(layers)
        derived: dict[str, np.ndarray] = {}
        load_LE = np.array(router["load"], dtype=np.float64) if router.get("load") else None
        if load_LE is not None and load_LE.ndim == 2 and np.isfinite(load_LE).all():
            self._loads.take(step, load_LE)
            relative_LE = load_LE * load_LE.shape[1]
            if self._last_alive_LE is None or self._last_alive_LE.shape != load_LE.shape:
                self._last_alive_LE = np.full(load_LE.shape, -1, dtype=np.int64)
            self._last_alive_LE[relative_LE >= _ALIVE_FROM] = step
            if any(router.get(name) is None for name in _FROM_LOAD):
                derived = _from_load(relative_LE)
        self._rows[step] = np.stack([self._row(router.get(name), derived.get(name)) for name in PER_LAYER])
        for name, values in (router.get("extra_aux_losses") or {}).items():
            self._extra.setdefault(name, {})[step] = self._row(values)

    def take_evaluation(self, step: int, router: Mapping[str, Any]) -> None:
        if step in self._evaluations:  # compared with the first one's routing, or after a resume with none: it knows nothing of what changed since
            return
        layers = list(router.get("layers") or [])
        self._evaluations[step] = layers, np.stack([_row(router.get(name), len(layers)) for name in _EVALUATED])

    def _row(self, values: Any, otherwise: np.ndarray | None = None) -> np.ndarray:
        return _row(values, len(self._layers)) if values is not None or otherwise is None else otherwise.astype(np.float32)

    def router(self) -> Router | None:
        if not self._rows or not len(self._loads) or self._last_alive_LE is None:
            return None
        steps_S = np.array(sorted(self._rows), dtype=np.int64)
        rows_SNL = np.stack([self._rows[step] for step in steps_S])
        nothing_L: np.ndarray = np.full(len(self._layers), np.nan, dtype=np.float32)
        extra = {name: np.stack([rows.get(step, nothing_L) for step in steps_S]) for name, rows in sorted(self._extra.items())}
        window = window_of(len(steps_S))
        return Router(
            layers=self._layers,
            steps_S=steps_S,
            load_LE=self._loads.of_last(window),
            per_layer={name: rows_SNL[:, index] for index, name in enumerate(PER_LAYER)},
            history=self._loads.history(),
            dead_since_LE=_next_step(steps_S, self._last_alive_LE),
            window=window,
            extra_aux_losses=extra,
            evaluations=self._evaluated(),
        )

    def _evaluated(self) -> RouterEvaluations | None:
        fitting = {step: self._evaluations[step][1] for step in sorted(self._evaluations) if self._evaluations[step][0] == self._layers}
        if not fitting:
            return None
        rows_VNL = np.stack(list(fitting.values()))
        return RouterEvaluations(np.array(list(fitting)), rows_VNL[:, 0], rows_VNL[:, 1])


def _row(values: Any, length: int) -> np.ndarray:
    """One number per layer, NaN where there is none."""
    if not isinstance(values, list) or len(values) != length:
        return np.full(length, np.nan, dtype=np.float32)
    return np.array(values, dtype=np.float32)


def _from_load(relative_LE: np.ndarray) -> dict[str, np.ndarray]:
    p10, p50, p90 = np.percentile(relative_LE, (10, 50, 90), axis=1)
    variation = relative_LE.std(axis=1) / np.maximum(relative_LE.mean(axis=1), 1e-30)
    busiest = relative_LE.max(axis=1) / np.maximum(relative_LE.mean(axis=1), 1e-30)
    values = (busiest, variation, p10, p50, p90, (relative_LE < DEAD_BELOW).sum(axis=1))
    return dict(zip(_FROM_LOAD, values, strict=True))


def _next_step(steps_S: np.ndarray, last_LE: np.ndarray) -> np.ndarray:
    """The recorded step after each of these; NaN after the last one."""
    places = np.searchsorted(steps_S, last_LE, side="right")
    return np.where(places < len(steps_S), steps_S[np.minimum(places, len(steps_S) - 1)], np.nan)
