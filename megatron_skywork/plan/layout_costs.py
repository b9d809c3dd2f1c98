"""A configuration's layout as a pipeline that is to be cut: what its layers cost and what a stage that holds some of them takes, for `splits.py`.

Seconds are those of `layer_cost.py`, bytes those of `memory.py`. A stage's bytes depend on which kinds of layers it holds, how many it recomputes and how many
micro-batches it has in flight, not on what other stages hold: so one call for a model of which every stage holds the same tells the bytes of all stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.communication import COMPUTE_BYTES, FP32
from megatron_skywork.plan.estimate import kernels_of, schedule_of, send_bytes
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.layer_cost import LayerCost, Part
from megatron_skywork.plan.memory import layer_activations, stage_memory
from megatron_skywork.plan.parameters import held_parameters
from megatron_skywork.plan.split_bounds import Load, Pipeline, Ranges
from megatron_skywork.plan.stages import batch


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A configuration with some settings of some sections replaced; nothing is checked."""
    return config.model_copy(update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()})


def default_modules(config: Config) -> list[str]:
    """What parallel.recompute_modules is where nothing is said: a plan that does not name modules leaves it so."""
    return type(config.parallel).model_fields["recompute_modules"].get_default(call_default_factory=True)


def with_split(config: Config, layers: Sequence[int], recomputed: Sequence[int]) -> Config:
    """A configuration whose pieces hold these layers, and recompute so many of them as a whole; selective recomputation stays where none are."""
    split: dict[str, Any] = {"layers_per_stage": list(layers)}
    if any(recomputed):
        split |= {"recompute": "full", "recompute_layers": list(recomputed), "recompute_modules": default_modules(config)}
    elif config.parallel.recompute == "full":
        split |= {"recompute": "none", "recompute_layers": None}
    return changed(config, parallel=split)


def pipeline_of(config: Config, cluster: Cluster, room: float) -> Pipeline:
    """A layout's costs, whatever its configuration says of layers per stage and of recomputed layers.

    Args:
        config: checked for the cluster's number of GPUs, but for layers_per_stage and recompute_layers.
        room: bytes of one GPU.
    """
    network = Network(config, cluster.world_size, cluster)
    cost = LayerCost(config, kernels_of(config, cluster), network)
    sparse = set(config.moe_layers)
    is_sparse = [layer in sparse for layer in range(config.model.num_layers)]
    loads = {kind: _layer_load(config, cost, is_sparse.index(kind)) for kind in set(is_sparse)}
    p = config.parallel
    return Pipeline(
        layers=tuple(loads[kind] for kind in is_sparse), embedding=_load(cost.embedding()), output=_load(cost.output()), stages=p.pp, chunks=p.vpp,
        micro_batches=batch(config, cluster.world_size).micro_batches, schedule=schedule_of(config),
        overlap_sends=bool(config.megatron.get("overlap_p2p_comm")), send_seconds=network.send(send_bytes(config)),
        memory=_StageBytes(config, cluster.world_size, is_sparse, room), room_bytes=room, recompute=p.recompute != "selective",
    )  # fmt: skip


def _load(part: Part) -> Load:
    return Load(part.forward.total(), part.backward.total(), part.weights)


def _layer_load(config: Config, cost: LayerCost, layer: int) -> Load:
    part = cost.layer(layer)
    if config.parallel.recompute == "selective":
        modules = cost.recomputed(layer, whole=False).total()
        return Load(part.forward.total(), part.backward.total() + modules, part.weights)
    return Load(part.forward.total(), part.backward.total(), part.weights, cost.recomputed(layer, whole=True).total())


@dataclass(frozen=True)
class LeastBytes:
    """A lower bound of a stage's bytes that costs nothing: held and kept bytes of its layers alone, of kinds of layers the least.

    Args:
        held: of one layer, weights to optimizer.
        kept, recomputed: of one layer and micro-batch.
        in_flight: of each stage and chunk, micro-batches that are held at some moment at least.
    """

    held: float
    kept: float
    recomputed: float
    in_flight: tuple[tuple[int, ...], ...]

    def stage(self, stage: int, sizes: Sequence[int], recomputed: Sequence[int]) -> float:
        """Of a stage whose chunks hold and recompute so many layers."""
        of_layers = zip(self.in_flight[stage], sizes, recomputed, strict=True)
        return sum(self.held * size + held * ((size - again) * self.kept + again * self.recomputed) for held, size, again in of_layers)

    def least_recomputed(self, stage: int, layers: int, room: float) -> int | None:
        """Recomputed layers without which a stage of so many layers cannot fit; None: it cannot at all."""
        held = min(self.in_flight[stage])
        over = layers * (self.held + held * self.kept) - room
        number = math.ceil(over / (held * (self.kept - self.recomputed))) if over > 0 else 0
        return number if number <= layers else None


def least_bytes(config: Config, world_size: int) -> LeastBytes:
    """Of a layout. Warm-up (`pipeline.warm_up`) is what a stage runs before its first backward: of one chunk min(S - s, M) micro-batches; of several all but
    the last chunk have then run min(S, M), the last min(2 (S - s) - 1, S, M)."""
    p, micro_batches = config.parallel, batch(config, world_size).micro_batches
    kinds = {layer in set(config.moe_layers): layer for layer in range(config.model.num_layers)}
    kept = [sum(layer_activations(config, layer, False).values()) for layer in kinds.values()]
    input_bytes = sum(layer_activations(config, 0, True).values())
    held = min(_held_layer(config, world_size, is_sparse) for is_sparse in kinds)
    if p.vpp == 1:
        in_flight: tuple[tuple[int, ...], ...] = tuple((min(p.pp - stage, micro_batches),) for stage in range(p.pp))
    else:
        in_flight = tuple((*[min(p.pp, micro_batches)] * (p.vpp - 1), min(2 * (p.pp - stage) - 1, p.pp, micro_batches)) for stage in range(p.pp))
    return LeastBytes(held, min(kept), min(input_bytes, *kept), in_flight)


def held_bytes(config: Config, world_size: int) -> float:
    """Weights, gradients and optimizer of all stages of one pipeline together, on one rank of each; padding left out."""
    p, size = config.parallel, COMPUTE_BYTES[config.train.precision]
    whole = held_parameters(changed(config, parallel={"pp": 1, "vpp": 1, "layers_per_stage": None}))[0][0]
    optimizer = FP32 * (size < FP32) + 2 * COMPUTE_BYTES[config.optim.moments]
    of_stage = world_size // p.pp
    routers = whole.routers * 2 * FP32  # in fp32, so without a master; their moments are left out
    return routers + whole.dense * (size + FP32 + optimizer / (of_stage / p.tp)) + whole.experts * (size + FP32 + optimizer / (of_stage / (p.ep * p.etp)))


def _held_layer(config: Config, world_size: int, is_sparse: bool) -> float:
    def of(layers: int) -> float:
        alike = changed(config, model={"num_layers": layers})
        return held_bytes(changed(alike, moe={"layers": list(range(layers)) if is_sparse else []}) if config.moe is not None else alike, world_size)

    return of(2) - of(1)


class _StageBytes:
    """`Pipeline.memory` of a configuration; where a lower bound alone does not fit, that bound."""

    def __init__(self, config: Config, world_size: int, is_sparse: list[bool], room: float):
        self._config, self._world_size, self._is_sparse, self._room = config, world_size, is_sparse, room
        self._found: dict[tuple[tuple[tuple[bool, ...], int], ...], list[float]] = {}
        self._least = least_bytes(config, world_size)

    def __call__(self, stage: int, ranges: Ranges, recomputed: tuple[int, ...]) -> float:
        least = self._least.stage(stage, [size for _, size in ranges], recomputed)
        if least > self._room:
            return least
        held = tuple((tuple(self._is_sparse[start : start + size]), again) for (start, size), again in zip(ranges, recomputed, strict=True))
        if held not in self._found:
            self._found[held] = self._of_all_stages(held)
        return self._found[held][stage]

    def _of_all_stages(self, held: tuple[tuple[tuple[bool, ...], int], ...]) -> list[float]:
        config, pp = self._config, self._config.parallel.pp
        pieces = [kinds for kinds, _ in held for _ in range(pp)]
        kinds = [kind for piece in pieces for kind in piece]
        alike = with_split(config, [len(piece) for piece in pieces], [again for _, again in held for _ in range(pp)])
        alike = changed(alike, model={"num_layers": len(kinds)})
        if config.moe is not None:
            alike = changed(alike, moe={"layers": [layer for layer, kind in enumerate(kinds) if kind]})
        return [memory.total for memory in stage_memory(alike, self._world_size)]
