"""Every way to lay a model out over a number of GPUs that the trainer accepts, and the least time that a step of each can take.

Degrees are divisors of the number of GPUs; the project's own rules (`config/validate.py`) say which of them go together. Least time of a layout with S stages
and M micro-batches, c, f and b the seconds of all of the model's parts together (nothing recomputed), c = f + b, and E_s of `split_bounds.py`:

    every schedule    the least T for which stages that take no longer than T, by E_s, hold all layers
    1f1b              c + ((M - 1) b + max(0, M - S) f) / S: the mean over stages of D_s of `split_bounds.py`, below its maximum
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from typing import Any

from megatron_skywork.config.rules import RULES, divisors, overlap
from megatron_skywork.config.schema import Config
from megatron_skywork.config.validate import find_problems, uneven_split
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.communication import parameter_traffic
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.layout_costs import LeastBytes, changed, default_modules
from megatron_skywork.plan.split_bounds import Pipeline

# A bisection ends where its borders are this near.
_PRECISE = 1e-4
# More sequences in a micro-batch only make kernels longer that are long enough.
MOST_MICRO_BATCH = 16
_PARALLEL = ("tp", "pp", "vpp", "ep", "etp", "cp")
_SETTINGS = ("train.micro_batch_size", "train.precision", "moe.capacity_factor", *(f"parallel.{name}" for name in (*_PARALLEL, "layers_per_stage")))


@dataclass(frozen=True)
class Layout:
    """What two plans differ in, layers per stage and recomputation apart."""

    tp: int
    cp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    micro_batch_size: int
    capacity_factor: float | None
    precision: str
    moments: str

    def applied(self, config: Config) -> Config:
        """The configuration in this layout, layers split as evenly as can be and nothing recomputed; not checked."""
        degrees: dict[str, Any] = {name: getattr(self, name) for name in _PARALLEL}
        degrees["layers_per_stage"] = uneven_split(config.model.num_layers, self.pp * self.vpp)
        degrees |= {"recompute": "none", "recompute_layers": None, "recompute_modules": default_modules(config)}
        train = {"micro_batch_size": self.micro_batch_size, "precision": self.precision}
        result = changed(config, parallel=degrees, train=train, optim={"moments": self.moments})
        return changed(result, moe={"capacity_factor": self.capacity_factor}) if config.moe is not None else result

    def words(self) -> str:
        """`tp 4, pp 12, ep 4, micro-batch 1`: degrees of 1 left out."""
        degrees = [f"{name} {getattr(self, name)}" for name in _PARALLEL if getattr(self, name) > 1]
        return ", ".join([*degrees, f"micro-batch {self.micro_batch_size}"])


def layout_of(config: Config) -> Layout:
    """A configuration's own layout."""
    p, t = config.parallel, config.train
    capacity = config.moe.capacity_factor if config.moe is not None else None
    return Layout(p.tp, p.cp, p.pp, p.vpp, p.ep, p.etp, t.micro_batch_size, capacity, t.precision, config.optim.moments)


def layouts(config: Config, world_size: int, vary: frozenset[str]) -> Iterator[Layout]:
    """All layouts that the rules allow.

    Args:
        vary: beside degrees and micro-batch: "capacity" (slots an expert has, which changes what is learned), "precision" (of the optimizer's moments, and
            bf16 in place of fp16 or fp32).
    """
    own, rules = layout_of(config), [function for reads, function in RULES if overlap(reads, _SETTINGS)]

    def is_valid(layout: Layout, world: int | None) -> bool:
        candidate = layout.applied(config)
        return not any(next(iter(rule(candidate, world)), None) for rule in rules)

    alone = Layout(1, 1, 1, 1, 1, 1, 1, own.capacity_factor, own.precision, own.moments)

    def degrees(name: str) -> list[int]:
        """Values that are not wrong whatever the others are."""
        values = [degree for degree in divisors(world_size) if name != "pp" or degree <= config.model.num_layers]
        return [degree for degree in values if degree == 1 or is_valid(_replaced(alone, **{name: degree}), None)]

    for tp, cp, pp, ep, etp in product(*(degrees(name) for name in ("tp", "cp", "pp", "ep", "etp"))):
        if world_size % (tp * cp * pp) or world_size % (ep * etp * pp):
            continue
        share = config.train.global_batch_size // (world_size // (tp * cp * pp))
        for micro_batch in [size for size in divisors(share) if size <= MOST_MICRO_BATCH] if share else []:
            one_chunk = _replaced(own, tp=tp, cp=cp, pp=pp, vpp=1, ep=ep, etp=etp, micro_batch_size=micro_batch)
            # Chunks make nothing valid that is not, and need micro-batches that go round the stages.
            if is_valid(one_chunk, world_size):
                is_round = pp > 1 and share // micro_batch % pp == 0
                for vpp in _chunks(config.model.num_layers, pp) if is_round else [1]:
                    yield from _varied(config, _replaced(one_chunk, vpp=vpp), vary)


def _chunks(layers: int, pp: int) -> list[int]:
    """For each size of the largest piece the fewest chunks under which an even cut has it: more of them would only send more often."""
    fewest: dict[int, int] = {}
    for vpp in range(1, layers // pp + 1):
        fewest.setdefault(-(-layers // (pp * vpp)), vpp)
    return list(fewest.values())


def _replaced(layout: Layout, **values: Any) -> Layout:
    return Layout(**{**asdict(layout), **values})


def _varied(config: Config, layout: Layout, vary: frozenset[str]) -> Iterator[Layout]:
    capacities = {layout.capacity_factor, *((1.0, 1.25, 1.5) if "capacity" in vary and config.moe is not None else ())}
    precisions = {(layout.precision, layout.moments), *(product({layout.precision, "bf16"}, ("fp32", "bf16")) if "precision" in vary else ())}
    for capacity, (precision, moments) in product(sorted(capacities, key=lambda factor: factor or 0), sorted(precisions)):
        yield _replaced(layout, capacity_factor=capacity, precision=precision, moments=moments)


def problems_of(config: Config, world_size: int) -> list[str]:
    """Everything that the trainer would refuse in a configuration made here, each section's own rules included."""
    inside = [f"{name}.{sentence}" for name in ("parallel", "train", "moe", "optim", "model")
              if getattr(config, name) is not None for _, sentence in getattr(config, name).rules()]  # fmt: skip
    return inside + find_problems(config, world_size, set())


def least_seconds(pipeline: Pipeline, least: LeastBytes | None = None) -> float:
    """What no step of a layout takes less than, however its layers are split; see the module's docstring.

    Args:
        least: its bytes; with them the recomputation that every stage needs at least counts too. Infinite if they do not fit.
    """
    p = pipeline
    cheap = [0.0, *accumulate(sorted(layer.forward_seconds + layer.backward_seconds for layer in p.layers))]
    again = min(layer.recompute_seconds for layer in p.layers)
    first, last = (load.forward_seconds + load.backward_seconds for load in (p.embedding, p.output))
    way = cheap[1] + 2 * p.send_seconds
    of_stages = []
    for stage in range(p.stages):
        times = []
        for layers in range(p.chunks, len(p.layers) + 1):
            number = least.least_recomputed(stage, layers, p.room_bytes) if least is not None else 0
            if number is None or (number and not p.recompute):
                break
            piece = cheap[layers] + number * again + first * (stage == 0) + last * (stage == p.stages - 1)
            times.append(stage * way + first * (stage > 0) + p.micro_batches * piece)
        of_stages.append(times)
    if sum(len(times) + p.chunks - 1 for times in of_stages) < len(p.layers) or not all(of_stages):
        return math.inf
    # Layers that stages hold which take no longer than T; a stage holds no fewer than it has chunks.
    enough, too_little = max(times[-1] for times in of_stages), 0.0
    while enough - too_little > _PRECISE * enough:
        middle = (too_little + enough) / 2
        counts = [bisect_right(times, middle) for times in of_stages]
        does_hold = all(counts) and sum(count + p.chunks - 1 for count in counts) >= len(p.layers)
        too_little, enough = (too_little, middle) if does_hold else (middle, enough)
    if p.schedule != "1f1b":
        return too_little
    total = cheap[-1] + first + last
    forward = sum(load.forward_seconds for load in (*p.layers, p.embedding, p.output))
    mean = ((p.micro_batches - 1) * (total - forward) + max(0, p.micro_batches - p.stages) * forward) / p.stages
    return max(too_little, total + mean + 2 * (p.stages - 1) * p.send_seconds)


def least_ends_seconds(config: Config, cluster: Cluster, pipeline: Pipeline) -> float:
    """What reducing gradients and gathering parameters add to the pipeline of a layout at least (`estimate.py`), however its layers are split.

    With overlap a stage shows what is longer than the backward, and the forward, of one micro-batch. Both grow with its layers, and their sums over stages are
    those of the model, so the stage that shows most shows no less than the mean. All layers count as recomputed, which hides most.
    """
    network, total = Network(config, cluster.world_size, cluster), 0.0
    for stage in range(pipeline.stages):
        total += sum(network.sent(one.group, one.operation, one.expected) for one in parameter_traffic(config, cluster.world_size, stage))
    loads = (*pipeline.layers, pipeline.embedding, pipeline.output)
    hidden = sum(load.forward_seconds + load.backward_seconds + load.recompute_seconds for load in loads) if config.parallel.overlap else 0.0
    return max(0.0, total - hidden) / pipeline.stages
