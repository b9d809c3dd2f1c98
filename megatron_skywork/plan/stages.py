"""Which layers each pipeline stage holds and recomputes, and how a global batch is cut into micro-batches.

With `vpp` chunks per stage the model is cut into pp * vpp pieces in order, and piece i lives on stage i mod pp (megatron-core's interleaving:
chunk c of stage s is piece c * pp + s).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_skywork.config.schema import Config


def pieces(config: Config) -> list[list[int]]:
    """Layer indices (from 0) of the pp * vpp pieces of the model, in model order."""
    count = config.parallel.pp * config.parallel.vpp
    sizes = config.parallel.layers_per_stage or [config.model.num_layers // count] * count
    starts = [sum(sizes[:index]) for index in range(count)]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def stage_chunks(config: Config) -> list[list[list[int]]]:
    """For each pipeline stage its chunks (one, or vpp), each a list of layer indices from 0."""
    pp = config.parallel.pp
    return [pieces(config)[stage::pp] for stage in range(pp)]


def recomputed_layers(config: Config) -> list[int]:
    """How many layers, from its first, each of the pp * vpp pieces recomputes as a whole."""
    sizes, asked = [len(piece) for piece in pieces(config)], config.parallel.recompute_layers
    if config.parallel.recompute != "full":
        return [0 for _ in sizes]
    if asked is None:
        return sizes
    return asked if isinstance(asked, list) else [min(asked, size) for size in sizes]


@dataclass(frozen=True)
class Batch:
    """How one optimizer step is cut up.

    Args:
        data_parallel: attention data-parallel degree, world / (tp * pp * cp).
        micro_batches: forward passes of one data-parallel rank in a step.
        tokens_per_step: tokens of one optimizer step over all ranks.
    """

    data_parallel: int
    micro_batches: int
    tokens_per_step: int


def batch(config: Config, world_size: int) -> Batch:
    """The cut of a global batch over `world_size` ranks; the configuration has been checked for that size."""
    p, t = config.parallel, config.train
    data_parallel = world_size // (p.tp * p.pp * p.cp)
    return Batch(data_parallel, t.global_batch_size // (t.micro_batch_size * data_parallel), t.global_batch_size * config.data.seq_length)
