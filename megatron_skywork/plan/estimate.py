"""What a run will do on a cluster: seconds of a step, tokens per second, MFU, idle shares and memory, before it starts.

    step = pipeline (simulation.py, with a cost for every piece of the model from layer_cost.py)
         + what of the data-parallel collectives nothing hides + optimizer

* Gradients are reduced in fp32 and parameters gathered in the compute precision, once a step, for dense parameters over dp_cp and for experts over expert_dp.
  With parallel.overlap the reduction runs beside the last micro-batch's backward and the gathering beside the first one's forward; what is longer counts.
* The optimizer is passes over memory: gradient, master weight and both moments of a rank's shard read and written, gradient buffers cleared.
* Experts get equally many tokens; a router that is not balanced makes the fullest rank wait for nobody and everybody wait for it, which is not foreseen.

MFU is that of flops.py (causal attention, active parameters, recomputation not counted) over the peak of the data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.communication import COMPUTE_BYTES, stage_traffic
from megatron_skywork.plan.flops import report_flops_per_token, train_flops_per_token
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.kernels import Kernels
from megatron_skywork.plan.layer_cost import LayerCost, Piece, Seconds, added, piece
from megatron_skywork.plan.memory import StageMemory, layer_activations, stage_memory
from megatron_skywork.plan.parameters import held_parameters
from megatron_skywork.plan.simulation import PieceCost, Timeline, simulate
from megatron_skywork.plan.stages import batch, pieces, recomputed_layers

# Of each parameter of a rank's shard: gradient read twice (norm, step), master weight and both moments read and written, and the weight written.
_STEP_PASSES = 4 + 4 + 8
# What a rank sends once a step: gradients, parameters, what tensor-parallel ranks hold whole, tied embeddings, router state.
_ONCE_A_STEP = {
    *((group, operation) for group in ("dp_cp", "expert_dp") for operation in ("reduce_scatter", "all_gather")),
    ("tp", "all_reduce"), ("embedding", "all_reduce"), ("tp_dp_cp", "all_reduce"),
}  # fmt: skip
COLLECTIVES = ("tp", "cp", "ep")
# What a part of a step is called.
PART_NAMES = {
    "products": "matrix products", "attention": "attention", "elementwise": "elementwise kernels", "tp": "tensor-parallel collectives",
    "cp": "the exchange of keys and values", "ep": "the experts' exchange", "recomputation": "recomputation",
    "gradients and parameters": "gradients and parameters over data parallelism", "optimizer": "the optimizer", "waiting": "waiting for other stages",
}  # fmt: skip
# fp32 gradient buffers of all parameters a rank holds are cleared.
_CLEARED = 4


@dataclass(frozen=True)
class Estimate:
    """A step of a run on a cluster.

    Args:
        step_seconds: from one optimizer step to the next.
        tokens_per_gpu_second: tokens of all ranks, over all GPUs.
        mfu, report_mfu: by flops.train_flops_per_token and by flops.report_flops_per_token, over the data sheet's peak.
        bubble: share of the pipeline's time in which a stage waits for others, mean over stages.
        parts: seconds of the step on the stage that works most: products, attention, elementwise, tp, cp, ep, recomputation,
            gradients and parameters, optimizer, and waiting for other stages.
        stage: that stage, from 0.
        memory: of each stage's ranks.
        timeline: the simulated pipeline.
        pieces: what it was simulated with.
    """

    step_seconds: float
    tokens_per_gpu_second: float
    mfu: float
    report_mfu: float
    bubble: float
    parts: dict[str, float]
    stage: int
    memory: list[StageMemory]
    timeline: Timeline
    pieces: list[PieceCost] = field(repr=False)


def schedule_of(config: Config) -> str:
    """The order in which the trainer runs the pieces."""
    return "interleaved" if config.parallel.vpp > 1 else "1f1b"


def model_pieces(config: Config, cluster: Cluster, world_size: int) -> list[Piece]:
    """Costs of the pp * vpp pieces, in model order."""
    network = Network(config, world_size, cluster)
    cost = LayerCost(config, kernels_of(config, cluster), network)
    of_pieces, again = pieces(config), recomputed_layers(config)
    last = len(of_pieces) - 1
    return [piece(cost, layers, again[number], first=number == 0, last=number == last) for number, layers in enumerate(of_pieces)]


def send_bytes(config: Config) -> float:
    """Activations of a micro-batch that one rank hands to the next stage."""
    p, t = config.parallel, config.train
    return t.micro_batch_size * config.data.seq_length / (p.cp * p.tp) * config.model.hidden_size * COMPUTE_BYTES[t.precision]


def estimate(config: Config, cluster: Cluster, *, schedule: str | None = None, keep_events: bool = False) -> Estimate:
    """Foresee a step.

    Args:
        config: checked for the cluster's number of GPUs.
        schedule: 1f1b, interleaved or zero-bubble; unset means what the trainer runs.
        keep_events: keep every start and end, for a picture.
    """
    world_size, pp = cluster.world_size, config.parallel.pp
    cut = batch(config, world_size)
    network = Network(config, world_size, cluster)
    costs = model_pieces(config, cluster, world_size)
    sent = network.send(send_bytes(config))
    kept = [_kept_bytes(config, layers, again) for layers, again in zip(pieces(config), recomputed_layers(config), strict=True)]
    simulated = [cost.cost(sent, num_bytes) for cost, num_bytes in zip(costs, kept, strict=True)]
    timeline = simulate(
        simulated, stages=pp, micro_batches=cut.micro_batches, schedule=schedule or schedule_of(config),
        overlap_sends=bool(config.megatron.get("overlap_p2p_comm")), keep_events=keep_events)  # fmt: skip
    ends = [_ends(config, cluster, network, stage, costs[stage::pp]) for stage in range(pp)]
    end = max(sum(parts.values()) for parts in ends)
    step_seconds = timeline.seconds + end
    speed = cut.tokens_per_step / world_size / step_seconds
    peak = cluster.gpu.peak_flops[config.train.precision]
    busy = [stage.busy_seconds for stage in timeline.stages]
    stage = busy.index(max(busy))
    parts = _parts(costs[stage::pp], cut.micro_batches) | ends[stage]
    parts["waiting"] = step_seconds - sum(parts.values())
    return Estimate(
        step_seconds, speed, speed * train_flops_per_token(config) / peak, speed * report_flops_per_token(config) / peak,
        1 - sum(busy) / (pp * timeline.seconds), parts, stage, stage_memory(config, world_size), timeline, simulated,
    )  # fmt: skip


def _kept_bytes(config: Config, layers: list[int], num_recomputed: int) -> float:
    return sum(sum(layer_activations(config, layer, number < num_recomputed).values()) for number, layer in enumerate(layers))


def _parts(costs: list[Piece], micro_batches: int) -> dict[str, float]:
    spent = [part for cost in costs for part in (cost.forward, cost.backward, _recomputation(cost.recomputed))]
    return {name: seconds * micro_batches for name, seconds in added(*spent).items()}


def _recomputation(again: Seconds) -> Seconds:
    """Kernels that run again are a part of their own; their collectives count with the others."""
    sent = Seconds({kind: again[kind] for kind in COLLECTIVES if again[kind]})
    return added(Seconds(recomputation=again.total() - sent.total()), sent)


def _ends(config: Config, cluster: Cluster, network: Network, stage: int, costs: list[Piece]) -> dict[str, float]:
    """Seconds of what a stage does once a step, behind its last micro-batch and before its first."""
    reduced = gathered = alone = 0.0
    for traffic in stage_traffic(config, cluster.world_size, stage):
        if (traffic.group, traffic.operation) not in _ONCE_A_STEP:
            continue
        seconds = network.sent(traffic.group, traffic.operation, traffic.expected)
        if traffic.operation == "all_gather":
            gathered += seconds
        elif traffic.operation == "reduce_scatter":
            reduced += seconds
        else:
            alone += seconds
    if config.parallel.overlap:
        # The last piece to be reduced, and the first to be gathered, have nothing to hide behind; they are one piece's share of the stage.
        share = 1 / max(sum(len(chunk) for chunk in pieces(config)[stage :: config.parallel.pp]), 1)
        backward = sum(cost.backward.total() + cost.recomputed.total() for cost in costs)
        forward = sum(cost.forward.total() for cost in costs)
        reduced, gathered = max(reduced - backward, reduced * share), max(gathered - forward, gathered * share)
    held = held_parameters(config)[stage]
    p = config.parallel
    of_stage = cluster.world_size // p.pp
    dense, experts = sum(chunk.dense + chunk.routers for chunk in held), sum(chunk.experts for chunk in held)
    shard = dense / (of_stage / p.tp) + experts / (of_stage / (p.etp * p.ep))
    moments = 2 * 2 * COMPUTE_BYTES[config.optim.moments]
    passes = shard * (_STEP_PASSES + moments + COMPUTE_BYTES[config.train.precision]) + (dense + experts) * _CLEARED
    return {"gradients and parameters": reduced + gathered + alone, "optimizer": kernels_of(config, cluster).memory(passes)}


def kernels_of(config: Config, cluster: Cluster) -> Kernels:
    """The kernels of a cluster's GPUs in the precision of a run, as training sustains them."""
    return Kernels(cluster.gpu, cluster.rates, config.train.precision, cluster.sustained.kernels)

