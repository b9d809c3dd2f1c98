"""A record as plain named numbers, which is all that TensorBoard and W&B can draw.

What is per layer becomes a mean under `NAME/mean` and one number per layer under `NAME/layer_007`; counts of experts also a `NAME/total`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Per expert, or names of experts: the numbers that are drawn of them are in the record beside them.
_NOT_DRAWN = ("layers", "load", "dead_expert_ids")
_COUNTS = ("dead_experts",)


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a step record under slashed names."""
    for key, value in record.items():
        if key in ("step", "time", "kind", "nonfinite"):
            continue
        if key == "router" and isinstance(value, Mapping):
            yield from _router_scalars(value, "router")
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{name}", float(item)) for name, item in value.items() if isinstance(item, (int, float)))
        elif isinstance(value, (int, float)):
            yield key, float(value)


def evaluation_scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of an evaluation record: `evaluation/SET` for the losses, `evaluation_router/NAME/...` for what the probe and the weights said."""
    for name, loss in (record.get("losses") or {}).items():
        if loss is not None:
            yield f"evaluation/{name}", float(loss)
    yield from _router_scalars(record.get("router") or {}, "evaluation_router")


def _router_scalars(router: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Lists of one number per layer, wherever they stand: at the top, or one level down under a name of their own."""
    layers = router.get("layers") or []
    series: dict[str, list[float | None]] = {}
    for name, value in router.items():
        if name in _NOT_DRAWN:
            continue
        if isinstance(value, Mapping):
            series.update({f"{name}/{inner}": values for inner, values in value.items() if isinstance(values, list)})
        elif isinstance(value, list):
            series[name] = value
    if router.get("load"):
        series.setdefault("load_max_over_mean", [_max_over_mean(row) for row in router["load"]])
    for name, values in series.items():
        known = [float(value) for value in values if value is not None]
        if known:
            yield f"{prefix}/{name}/mean", sum(known) / len(known)
        if known and name in _COUNTS:
            yield f"{prefix}/{name}/total", sum(known)
        yield from ((f"{prefix}/{name}/layer_{layer:03d}", float(value)) for layer, value in zip(layers, values, strict=False) if value is not None)


def _max_over_mean(shares: list[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return max(known) * len(known) / sum(known) if len(known) == len(shares) and sum(known) > 0 else None
