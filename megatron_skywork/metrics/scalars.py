"""A record as plain named numbers, which is all that TensorBoard and W&B can draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a step or evaluation record under slashed names; per-layer lists give a mean and one number per layer, loads give max/mean."""
    for key, value in record.items():
        if key in ("step", "time", "kind", "nonfinite"):
            continue
        if key == "router" and isinstance(value, Mapping):
            yield from _router_scalars(value)
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{name}", float(item)) for name, item in value.items() if isinstance(item, (int, float)))
        elif isinstance(value, (int, float)):
            yield key, float(value)


def _router_scalars(router: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    layers = router.get("layers") or []
    series = {name: values for name, values in router.items() if name not in ("layers", "load") and isinstance(values, list)}
    if router.get("load"):
        series["load_max_over_mean"] = [_max_over_mean(row) for row in router["load"]]
    for name, values in series.items():
        known = [value for value in values if value is not None]
        if known:
            yield f"router/{name}/mean", sum(known) / len(known)
        yield from ((f"router/{name}/layer_{layer:03d}", value) for layer, value in zip(layers, values, strict=False) if value is not None)


def _max_over_mean(shares: list[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return max(known) * len(known) / sum(known) if len(known) == len(shares) and sum(known) > 0 else None
