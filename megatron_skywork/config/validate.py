"""Rules between settings of different sections, each answered with the numbers that would work: memory, layout, batches, schedule, data.

Rules of routing stand in `validate_routing.py`, of recomputation in `validate_recompute.py`, rules inside one section in `schema.py`;
the `megatron:` section in `megatron_fields.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_skywork.config import resume_rules, validate_recompute, validate_routing  # noqa: F401  they register their rules
from megatron_skywork.config.megatron_fields import megatron_problems
from megatron_skywork.config.rules import RULES, divisors, listed, multiples_near, overlap, rule
from megatron_skywork.config.schema import Config


def find_problems(config: Config, world_size: int | None, doubtful: set[str]) -> list[str]:
    """Applies every rule.

    Args:
        config: the settings.
        world_size: number of ranks; None leaves out the rules that need it.
        doubtful: dotted settings that have a problem already; rules that read one of them are left out.

    Returns:
        one sentence per problem.
    """
    if world_size is not None and world_size < 1:
        return [f"world size {world_size}: use 1 or more ranks"]
    problems: list[str] = []
    for reads, function in RULES:
        if not overlap(reads, doubtful):
            problems.extend(function(config, world_size))
    return problems


def uneven_split(num_layers: int, num_stages: int) -> list[int]:
    """Layers per stage as even as can be, the extra ones in the middle (the ends also hold the embedding and the loss)."""
    base, extra = divmod(num_layers, num_stages)
    start = (num_stages - extra) // 2
    return [base + (start <= stage < start + extra) for stage in range(num_stages)]


# --- the world -------------------------------------------------------------------------------------------------------------------------------


@rule("parallel.tp", "parallel.pp", "parallel.cp")
def _world(config: Config, world: int | None) -> Iterator[str]:
    p = config.parallel
    size = p.tp * p.pp * p.cp
    if world is not None and world % size:
        yield (f"world size {world} is not a multiple of parallel.tp={p.tp} * parallel.pp={p.pp} * parallel.cp={p.cp} = {size}; "
               f"use {multiples_near(world, size)} ranks, or a product out of {listed(divisors(world))}")


@rule("parallel.pp", "parallel.ep", "parallel.etp", "moe")
def _expert_world(config: Config, world: int | None) -> Iterator[str]:
    p = config.parallel
    size = p.etp * p.ep * p.pp
    if config.moe is not None and world is not None and world % size:
        yield (f"world size {world} is not a multiple of parallel.ep={p.ep} * parallel.etp={p.etp} * parallel.pp={p.pp} = {size}, the expert mesh; "
               f"use {multiples_near(world, size)} ranks, or a product out of {listed(divisors(world))}")


@rule("parallel.cp", "model.backend")
def _context_parallel(config: Config, world: int | None) -> Iterator[str]:
    if config.parallel.cp > 1 and config.model.backend != "te":
        yield (f"parallel.cp={config.parallel.cp}: context parallelism exists only in Transformer Engine's attention; "
               f"set model.backend=te (it is {config.model.backend}), or parallel.cp=1")


@rule("parallel.cp", "data.reset_attention_mask")
def _document_mask(config: Config, world: int | None) -> Iterator[str]:
    if config.parallel.cp > 1 and config.data.reset_attention_mask:
        yield f"data.reset_attention_mask=true: documents cannot be kept apart over parallel.cp={config.parallel.cp}; set one of them back (false, or 1)"


@rule("parallel.tp", "parallel.pp", "parallel.cp", "train.check_replicas")
def _replicas(config: Config, world: int | None) -> Iterator[str]:
    p, every = config.parallel, config.train.check_replicas
    if every and world is not None and p.tp * p.cp == 1 and world == p.pp:
        yield f"train.check_replicas={every}: with {world} rank{'s' if world > 1 else ''} and parallel.pp={p.pp} no parameter has a second copy; set it to 0"


# --- what is split ---------------------------------------------------------------------------------------------------------------------------


@rule("model.num_attention_heads", "parallel.tp")
def _heads(config: Config, world: int | None) -> Iterator[str]:
    heads, tp = config.model.num_attention_heads, config.parallel.tp
    if heads % tp:
        yield f"model.num_attention_heads={heads} is not a multiple of parallel.tp={tp}; use tp = {listed(divisors(heads))}"


@rule("model.num_attention_heads", "model.num_query_groups", "parallel.tp")
def _groups(config: Config, world: int | None) -> Iterator[str]:
    groups, tp = config.model.resolved_query_groups, config.parallel.tp
    if config.model.num_query_groups is not None and groups % tp and tp % groups:
        yield (f"model.num_query_groups={groups} is neither a multiple nor a divisor of parallel.tp={tp}; "
               f"use tp = {listed(divisors(groups))}, or a multiple of {groups}")


@rule("model.hidden_size", "model.num_attention_heads", "model.head_dim")
def _head_dim(config: Config, world: int | None) -> Iterator[str]:
    width = config.model.resolved_head_dim
    if width % 2:
        yield f"model.head_dim={width}: rotary positions turn pairs of numbers, so a head needs an even width; use {width - 1 or 2} or {width + 1}"


@rule("model.ffn_hidden_size", "parallel.tp", "moe", "model.num_layers")
def _ffn(config: Config, world: int | None) -> Iterator[str]:
    ffn, tp = config.model.ffn_hidden_size, config.parallel.tp
    if len(set(config.moe_layers)) < config.model.num_layers and ffn % tp:
        yield f"model.ffn_hidden_size={ffn} is not a multiple of parallel.tp={tp}; use {multiples_near(ffn, tp)}"
    shared = config.moe.shared_expert_ffn_hidden_size if config.moe is not None else None
    if shared is not None and shared % tp:
        yield f"moe.shared_expert_ffn_hidden_size={shared} is not a multiple of parallel.tp={tp}; use {multiples_near(shared, tp)}"


@rule("model.vocab_size", "model.vocab_divisible_by", "parallel.tp")
def _vocab(config: Config, world: int | None) -> Iterator[str]:
    padded, step, tp = config.model.padded_vocab_size, config.model.vocab_divisible_by, config.parallel.tp
    if padded % tp:
        yield (f"model.vocab_divisible_by={step} pads the vocabulary to {padded}, which is not a multiple of parallel.tp={tp}; "
               f"use model.vocab_divisible_by={multiples_near(step, tp)}")


@rule("model.num_layers", "parallel.pp", "parallel.vpp", "parallel.layers_per_stage")
def _stages(config: Config, world: int | None) -> Iterator[str]:
    layers, p = config.model.num_layers, config.parallel
    stages, split = p.pp * p.vpp, p.layers_per_stage
    product = f"parallel.pp={p.pp}" + (f" * parallel.vpp={p.vpp} = {stages}" if p.vpp > 1 else "")
    if stages > layers:
        yield f"model.num_layers={layers} is less than the number of stages, {product}; use at most {layers} stages"
    elif split is None and layers % stages:
        yield (f"model.num_layers={layers} is not a multiple of {product}; set parallel.layers_per_stage, for instance {uneven_split(layers, stages)}, "
               f"or use {listed(divisors(layers))} stages")
    elif split is not None and len(split) != stages:
        yield f"parallel.layers_per_stage has {len(split)} numbers, and there are {stages} stages ({product}); for instance {uneven_split(layers, stages)}"
    elif split is not None and sum(split) != layers:
        yield (f"parallel.layers_per_stage={split} adds up to {sum(split)}, and model.num_layers={layers}: "
               f"{abs(layers - sum(split))} layer(s) {'missing' if sum(split) < layers else 'too many'}; for instance {uneven_split(layers, stages)}")


@rule("parallel.pp", "parallel.vpp")
def _interleaving(config: Config, world: int | None) -> Iterator[str]:
    if config.parallel.vpp > 1 and config.parallel.pp == 1:
        yield f"parallel.vpp={config.parallel.vpp} interleaves chunks of pipeline stages, and parallel.pp=1 has one stage; set vpp=1, or pp=2 or more"


# --- experts ---------------------------------------------------------------------------------------------------------------------------------


@rule("moe", "parallel.ep", "parallel.etp")
def _no_experts(config: Config, world: int | None) -> Iterator[str]:
    for key, value in (("ep", config.parallel.ep), ("etp", config.parallel.etp)):
        if config.moe is None and value > 1:
            yield f"parallel.{key}={value} splits experts, and there is no moe section; set parallel.{key}=1, or describe the experts in moe"


@rule("moe.num_experts", "parallel.ep")
def _experts(config: Config, world: int | None) -> Iterator[str]:
    ep = config.parallel.ep
    if config.moe is not None and config.moe.num_experts % ep:
        yield f"moe.num_experts={config.moe.num_experts} is not a multiple of parallel.ep={ep}; use ep = {listed(divisors(config.moe.num_experts))}"


@rule("moe.ffn_hidden_size", "model.ffn_hidden_size", "parallel.etp")
def _expert_ffn(config: Config, world: int | None) -> Iterator[str]:
    etp = config.parallel.etp
    if config.moe is None:
        return
    key, width = ("moe", config.moe.ffn_hidden_size) if config.moe.ffn_hidden_size else ("model", config.model.ffn_hidden_size)
    if width % etp:
        yield f"{key}.ffn_hidden_size={width} (an expert's width) is not a multiple of parallel.etp={etp}; use {multiples_near(width, etp)}"


@rule("moe.layers", "model.num_layers")
def _moe_layers(config: Config, world: int | None) -> Iterator[str]:
    layers, count = (config.moe.layers if config.moe is not None else None), config.model.num_layers
    if layers is None:
        return
    outside = sorted({layer for layer in layers if layer >= count})
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if not layers:
        yield "moe.layers=[] names no layer; leave it out for all layers, or leave out the moe section for a dense model"
    if outside:
        yield f"moe.layers names {listed(outside)}, and model.num_layers={count}: indices go from 0 to {count - 1}"
    if twice:
        yield f"moe.layers names {listed(twice)} more than once; name each layer once"


# --- batches and sequences -------------------------------------------------------------------------------------------------------------------


@rule("train.global_batch_size", "train.micro_batch_size", "parallel.tp", "parallel.pp", "parallel.cp", "parallel.vpp")
def _batch(config: Config, world: int | None) -> Iterator[str]:
    p, size, micro = config.parallel, config.train.global_batch_size, config.train.micro_batch_size
    if world is None or world % (p.tp * p.pp * p.cp):
        return
    dp = world // (p.tp * p.pp * p.cp)
    if size % (micro * dp):
        yield (f"train.global_batch_size={size} is not a multiple of train.micro_batch_size={micro} * {dp} data-parallel ranks = {micro * dp}; "
               f"use {multiples_near(size, micro * dp)}")
    elif p.vpp > 1 and p.pp > 1 and size // (micro * dp) % p.pp:
        yield (f"parallel.vpp={p.vpp} needs a number of micro-batches that parallel.pp={p.pp} divides, "
               f"and train.global_batch_size={size} makes {size // (micro * dp)}; "
               f"use train.global_batch_size={multiples_near(size, micro * dp * p.pp)}")


@rule("data.seq_length", "parallel.tp", "parallel.cp")
def _sequence_split(config: Config, world: int | None) -> Iterator[str]:
    length, p = config.data.seq_length, config.parallel
    parts = 2 * p.cp * p.tp
    if p.cp > 1 and length % parts:
        yield f"data.seq_length={length} is not a multiple of 2 * parallel.cp={p.cp} * parallel.tp={p.tp} = {parts}; use {multiples_near(length, parts)}"
    elif p.cp == 1 and length % p.tp:
        yield f"data.seq_length={length} is not a multiple of parallel.tp={p.tp} (sequence parallel splits it); use {multiples_near(length, p.tp)}"


@rule("data.seq_length", "model.max_position_embeddings")
def _positions(config: Config, world: int | None) -> Iterator[str]:
    length, longest = config.data.seq_length, config.model.max_position_embeddings
    if length > longest:
        yield f"data.seq_length={length} is above model.max_position_embeddings={longest}; use seq_length up to {longest}, or raise max_position_embeddings"


# --- precision, schedule ---------------------------------------------------------------------------------------------------------------------


@rule("data.reset_position_ids", "data.reset_attention_mask")
def _document_positions(config: Config, world: int | None) -> Iterator[str]:
    if config.data.reset_position_ids and not config.data.reset_attention_mask:
        yield ("data.reset_position_ids=true alone changes nothing, because rotary positions are relative; "
               "set data.reset_attention_mask=true too, which keeps documents apart, or leave both out")


@rule("megatron", "train.precision", "model.backend")
def _narrow_precision(config: Config, world: int | None) -> Iterator[str]:
    for name in ("fp8", "fp4"):
        if config.megatron.get(name) is None:
            continue
        if config.model.backend != "te":
            yield f"megatron.{name}={config.megatron[name]} exists only in Transformer Engine; set model.backend=te (it is {config.model.backend})"
        if config.train.precision != "bf16":
            yield f"megatron.{name}={config.megatron[name]} works on top of bf16; set train.precision=bf16 (it is {config.train.precision})"


# Fields that modules of Transformer Engine follow and those of the torch backend do not.
_OF_TRANSFORMER_ENGINE = (
    "activation_func_clamp_value", "cuda_graph_impl", "defer_embedding_wgrad_compute", "delay_wgrad_compute", "enable_cuda_graph", "external_cuda_graph",
    "glu_linear_offset", "layernorm_zero_centered_gamma", "overlap_dispatch_backward_with_experts_wgrad", "softmax_type", "window_size",
)  # fmt: skip


@rule("megatron", "model.backend")
def _without_transformer_engine(config: Config, world: int | None) -> Iterator[str]:
    for name in _OF_TRANSFORMER_ENGINE:
        value = config.megatron.get(name)
        if value and value not in ("none", "vanilla") and config.model.backend != "te":
            yield (f"megatron.{name}={value} is followed by Transformer Engine's modules only; set model.backend=te (it is {config.model.backend}), "
                   "or leave it out")


@rule("optim.warmup_steps", "train.steps")
def _warmup(config: Config, world: int | None) -> Iterator[str]:
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if warmup >= steps:
        yield f"optim.warmup_steps={warmup} leaves nothing of train.steps={steps}; use 0 to {steps - 1}"


@rule("optim", "train.steps")
def _decay(config: Config, world: int | None) -> Iterator[str]:
    o, steps = config.optim, config.train.steps
    if o.warmup_steps >= steps or o.decay_steps is None:
        return
    if o.schedule == "constant":
        yield f"optim.decay_steps={o.decay_steps}: optim.schedule=constant does not decay; leave decay_steps out, or choose cosine, linear or wsd"
    elif o.schedule == "wsd" and o.warmup_steps + o.decay_steps > steps:
        yield (f"optim.decay_steps={o.decay_steps} and optim.warmup_steps={o.warmup_steps} are more than train.steps={steps}; "
               f"use decay_steps up to {steps - o.warmup_steps}")
    elif o.schedule in ("cosine", "linear") and o.decay_steps <= o.warmup_steps:
        yield f"optim.decay_steps={o.decay_steps} is not after optim.warmup_steps={o.warmup_steps}; use {o.warmup_steps + 1} or more (unset: {steps})"


@rule("train.stop_at_step", "train.steps")
def _stop(config: Config, world: int | None) -> Iterator[str]:
    stop, steps = config.train.stop_at_step, config.train.steps
    if stop is not None and stop > steps:
        yield f"train.stop_at_step={stop} is after the last step, train.steps={steps}; use up to {steps}, or leave it out"


# --- data ------------------------------------------------------------------------------------------------------------------------------------


@rule("data.train", "data.mock")
def _training_data(config: Config, world: int | None) -> Iterator[str]:
    if not config.data.train and not config.data.mock:
        yield "data.train is empty: name an indexed dataset (the PREFIX of PREFIX.bin), or set data.mock=true for synthetic tokens"
    if config.data.train and config.data.mock:
        yield "data.mock=true ignores data.train; set data.mock=false, or data.train=[]"


@rule("data.valid", "data.mock", "train.eval_every", "train.eval_at_start", "train.eval_at_end")
def _validation_data(config: Config, world: int | None) -> Iterator[str]:
    for name, sources in config.data.valid.items():
        if not sources:
            yield f"data.valid.{name} names no dataset; give it a path, or leave it out"
    asked = [key for key in ("eval_every", "eval_at_start", "eval_at_end") if getattr(config.train, key)]
    if asked and not config.data.valid and not config.data.mock:
        yield (f"train.{asked[0]}={str(getattr(config.train, asked[0])).lower()} evaluates, and data.valid is empty; "
               f"name a validation set, for instance data.valid.held_out=PREFIX")


@rule("megatron")
def _megatron(config: Config, world: int | None) -> Iterator[str]:
    yield from megatron_problems(config.megatron)
