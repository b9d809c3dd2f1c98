"""Rules of recomputation: which layers and modules can be computed again in backward, answered with what would work."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_skywork.config.rules import rule
from megatron_skywork.config.schema import Config

# Modules inside a layer's experts; `moe` is all of them at once.
_PARTS_OF_MOE = ("moe_act", "router", "shared_experts")


@rule("parallel.recompute", "parallel.recompute_layers", "parallel.layers_per_stage", "parallel.pp", "parallel.vpp", "model.num_layers")
def _recompute_layers(config: Config, world: int | None) -> Iterator[str]:
    p, asked = config.parallel, config.parallel.recompute_layers
    if asked is None:
        return
    shown, stages = f"parallel.recompute_layers={asked}", p.pp * p.vpp
    sizes = p.layers_per_stage or [-(-config.model.num_layers // stages)] * stages
    if p.recompute != "full":
        yield f"{shown} belongs to parallel.recompute=full, not {p.recompute}; set recompute=full, or leave it out"
    elif not any(asked if isinstance(asked, list) else [asked]):
        yield f"{shown} recomputes nothing; set parallel.recompute=none, or leave recompute_layers out for all layers"
    elif isinstance(asked, int) and asked > max(sizes):
        yield f"{shown} is above the {max(sizes)} layers of the largest stage; use 1 to {max(sizes)}, or leave it out for all"
    elif isinstance(asked, list) and len(asked) != stages:
        product = f"parallel.pp={p.pp}" + (f" * parallel.vpp={p.vpp} = {stages}" if p.vpp > 1 else "")
        yield f"parallel.recompute_layers has {len(asked)} numbers for {stages} stage(s) ({product}); for instance {sizes} for all layers"
    elif isinstance(asked, list) and len(sizes) == stages and any(more > size for more, size in zip(asked, sizes, strict=True)):
        fitting = [min(more, size) for more, size in zip(asked, sizes, strict=True)]
        yield f"{shown} is more than the stages hold, which is {sizes}; use for instance {fitting}"


@rule("parallel.recompute", "parallel.recompute_modules", "moe", "model.num_layers", "megatron")
def _recompute_modules(config: Config, world: int | None) -> Iterator[str]:
    p, moe, asked = config.parallel, config.moe, config.parallel.recompute_modules
    default = type(p).model_fields["recompute_modules"].get_default(call_default_factory=True)
    if p.recompute != "selective":
        if asked != default:
            yield f"parallel.recompute_modules={asked} belongs to parallel.recompute=selective, not {p.recompute}; set recompute=selective, or leave it out"
        return
    parts = [name for name in asked if name in _PARTS_OF_MOE]
    if not asked:
        yield f"parallel.recompute_modules=[] recomputes nothing; name modules, for instance {default}, or set parallel.recompute=none"
    if len(set(asked)) < len(asked):
        yield f"parallel.recompute_modules={asked} names a module twice; name each once"
    if moe is None and ("moe" in asked or parts):
        named = [name for name in asked if name == "moe" or name in parts]
        yield f"parallel.recompute_modules names {', '.join(named)}, and there is no moe section; leave out what a dense model does not have"
    elif "moe" in asked and parts:
        yield f"parallel.recompute_modules names moe, which covers {', '.join(parts)}; leave out moe to recompute less, or the others"
    if moe is not None and "shared_experts" in asked and moe.shared_expert_ffn_hidden_size is None:
        yield "parallel.recompute_modules names shared_experts, and moe.shared_expert_ffn_hidden_size is not set; leave one out or set the other"
    if "layernorm" in asked and config.megatron.get("moe_shared_expert_overlap"):
        yield ("parallel.recompute_modules names layernorm, and megatron.moe_shared_expert_overlap=true reads the norm's output beside the main stream; "
               "leave one of the two out")
    if "mlp" in asked and len(set(config.moe_layers)) == config.model.num_layers:
        yield "parallel.recompute_modules names mlp, the feed-forward of dense layers, and every layer has experts; name moe, or leave it out"
