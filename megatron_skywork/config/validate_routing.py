"""Rules of routing that need more than the `moe` section, or more than a value by itself: what cannot work, and what would undo the report's techniques.

Rules inside the `moe` section stand in `schema.py`. Fields of megatron-core that this package decides or replaces are refused by name in
`megatron_fields.py`; here are those that may be set, with what they need. The router checks the most important again when it is built, for
configurations that did not come through here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_skywork.config.megatron_fields import fits, is_free, megatron_fields
from megatron_skywork.config.problems import shown
from megatron_skywork.config.rules import divisors, listed, rule
from megatron_skywork.config.schema import Config


def passed(config: Config, name: str) -> Any:
    """Value of an entry of the `megatron:` section; None if it is not there, or wrong by itself."""
    value = config.megatron.get(name)
    return value if name in megatron_fields() and fits(megatron_fields()[name], value) else None


# --- the gate --------------------------------------------------------------------------------------------------------------------------------


@rule("moe.gate_norm", "moe.num_experts")
def _two_experts(config: Config, world: int | None) -> Iterator[str]:
    if config.moe is not None and config.moe.gate_norm and config.moe.num_experts == 2:
        yield ("moe.gate_norm=true with moe.num_experts=2: of two logits, normalization keeps only which is larger, so the gate would get no gradient; "
               "set moe.gate_norm=false, or 3 experts or more")


@rule("moe.gate_norm", "moe.pre_softmax", "megatron")
def _score_function(config: Config, world: int | None) -> Iterator[str]:
    if config.moe is None:
        return
    score, biased = passed(config, "moe_router_score_function") or "softmax", passed(config, "moe_router_enable_expert_bias")
    if score not in ("softmax", "sigmoid"):
        yield f"megatron.moe_router_score_function={score} is not known here; use softmax, or sigmoid with moe.gate_norm=false"
    elif score == "sigmoid" and config.moe.gate_norm:
        yield ("megatron.moe_router_score_function=sigmoid judges every expert by itself, and moe.gate_norm=true sets how sharply a softmax gate "
               "tells them apart; use softmax, or set moe.gate_norm=false")
    if score == "sigmoid" and config.moe.pre_softmax:
        yield ("moe.pre_softmax=true is about a softmax gate, and megatron.moe_router_score_function=sigmoid makes the chosen weights sum to 1; "
               "set moe.pre_softmax=false, or leave the score function out")
    if biased and score == "softmax":
        yield ("megatron.moe_router_enable_expert_bias=true adds its bias to sigmoid scores (megatron-core has it for no softmax gate); "
               "set megatron.moe_router_score_function=sigmoid and moe.gate_norm=false, or leave the bias out")


@rule("moe.num_experts", "megatron")
def _expert_bias(config: Config, world: int | None) -> Iterator[str]:
    rate = passed(config, "moe_router_bias_update_rate")
    if config.moe is None or rate is None:
        return
    if not passed(config, "moe_router_enable_expert_bias"):
        yield f"megatron.moe_router_bias_update_rate={rate} changes nothing without megatron.moe_router_enable_expert_bias=true; set that too, or leave it out"
    elif rate <= 0:
        yield f"megatron.moe_router_bias_update_rate={rate} would not lead to balance; use a number above 0 (megatron-core's own is 0.001)"


@rule("moe.num_experts", "moe.topk", "megatron")
def _groups(config: Config, world: int | None) -> Iterator[str]:
    """What megatron-core's group_limited_topk needs; it takes the best topk // group_topk of every group to choose the groups."""
    if config.moe is None:
        return
    groups, chosen, experts, topk = passed(config, "moe_router_num_groups"), passed(config, "moe_router_group_topk"), config.moe.num_experts, config.moe.topk
    key, chosen_key = f"megatron.moe_router_num_groups={groups}", f"megatron.moe_router_group_topk={chosen}"
    divides = groups is not None and groups > 0 and experts % groups == 0
    most = min(groups, topk) if divides else topk
    if groups is not None and not divides:
        yield f"{key} does not divide moe.num_experts={experts} into equal groups; use {listed(divisors(experts))}"
    if groups is None and chosen is not None:
        yield f"{chosen_key} chooses among groups of experts; set megatron.moe_router_num_groups too ({listed(divisors(experts))}), or leave both out"
    if divides and chosen is None:
        yield f"{key} limits nothing without megatron.moe_router_group_topk, the groups that a token may use; set it (1 to {most}), or leave both out"
    if chosen is not None and not 1 <= chosen <= most:
        yield (f"{chosen_key}: a token uses one group or more, and needs an expert in each to judge it by (moe.topk={topk})"
               f"{f', out of megatron.moe_router_num_groups={groups}' if divides else ''}; use 1 to {most}")
    elif divides and chosen is not None and chosen * (experts // groups) < topk:
        yield (f"{chosen_key} leaves a token {chosen} group(s) of {experts // groups} experts, fewer than moe.topk={topk}; "
               f"use {-(-topk // (experts // groups))} groups or more, or topk up to {chosen * (experts // groups)}")


@rule("moe.gate_norm", "moe.pre_softmax", "moe.topk", "megatron")
def _groups_of_sums(config: Config, world: int | None) -> Iterator[str]:
    """Sums of probabilities do not keep their order when logits are scaled, so the choice of groups would depend on moe.gate_norm_scale."""
    chosen = passed(config, "moe_router_group_topk")
    if config.moe is not None and config.moe.gate_norm and config.moe.pre_softmax and chosen and config.moe.topk // chosen > 1:
        yield (f"moe.pre_softmax=true judges the groups of megatron.moe_router_group_topk={chosen} by sums of probabilities, whose order moe.gate_norm=true "
               f"changes; set moe.pre_softmax=false or moe.gate_norm=false, or use megatron.moe_router_group_topk={config.moe.topk}")


@rule("moe.num_experts", "megatron")
def _numbers(config: Config, world: int | None) -> Iterator[str]:
    jitter, scaling = passed(config, "moe_input_jitter_eps"), passed(config, "moe_router_topk_scaling_factor")
    if config.moe is None:
        return
    if jitter is not None and not 0 < jitter < 1:
        yield (f"megatron.moe_input_jitter_eps={jitter}: the gate's input is multiplied by numbers from 1 - eps to 1 + eps; "
               "use an eps above 0 and below 1 (0.01 is usual), or leave it out")
    if scaling is not None and scaling <= 0:
        yield f"megatron.moe_router_topk_scaling_factor={scaling} multiplies the weights of the chosen experts; use a number above 0, or leave it out for 1"


@rule("moe.topk", "megatron", "model.backend")
def _weights_on_input(config: Config, world: int | None) -> Iterator[str]:
    if config.moe is None or not passed(config, "moe_apply_probs_on_input"):
        return
    if config.moe.topk > 1:
        yield f"megatron.moe_apply_probs_on_input=true exists for one expert per token; set moe.topk=1 (it is {config.moe.topk}), or leave it out"
    elif config.model.backend != "te":
        yield (f"megatron.moe_apply_probs_on_input=true is followed by Transformer Engine's experts only; set model.backend=te (it is {config.model.backend}), "
               "or leave it out")


@rule("moe.num_experts", "megatron", "model.backend")
def _router_fusion(config: Config, world: int | None) -> Iterator[str]:
    if config.moe is None or not passed(config, "moe_router_fusion"):
        return
    if config.model.backend == "torch":
        yield "megatron.moe_router_fusion=true is a kernel of Transformer Engine; set model.backend=te (it is torch), or leave it out"
    if passed(config, "moe_enable_routing_replay"):
        yield ("megatron.moe_router_fusion=true chooses experts in one kernel, which megatron.moe_enable_routing_replay=true cannot tell what to choose; "
               "leave one of them out")


# --- capacity --------------------------------------------------------------------------------------------------------------------------------


@rule("moe.pad_to_capacity", "moe.capacity_factor", "moe.topk", "moe.num_experts")
def _padded_capacity(config: Config, world: int | None) -> Iterator[str]:
    moe = config.moe
    if moe is None or not moe.pad_to_capacity or moe.capacity_factor is None:
        return
    # At exactly num_experts / topk nothing can drop, and rounding may give one slot more than there are tokens.
    if moe.capacity_factor * moe.topk > moe.num_experts * (1 - 1e-9):
        below = math.ceil(moe.num_experts / moe.topk * 1000 - 1) / 1000
        yield (f"moe.capacity_factor={moe.capacity_factor} gives an expert as many slots as there are tokens, which moe.pad_to_capacity=true cannot fill; "
               f"use less than num_experts / topk, for instance {below:g}, or pad_to_capacity=false")


@rule("moe.pad_to_capacity", "moe.capacity_factor", "moe.capacity_scope", "parallel.tp", "parallel.cp")
def _padded_scope(config: Config, world: int | None) -> Iterator[str]:
    moe, tp, cp = config.moe, config.parallel.tp, config.parallel.cp
    if moe is not None and moe.pad_to_capacity and moe.capacity_factor is not None and moe.capacity_scope == "micro_batch" and tp * cp > 1:
        split = " * ".join(f"parallel.{name}={size}" for name, size in (("tp", tp), ("cp", cp)) if size > 1)
        yield (f"moe.capacity_scope=micro_batch lets the tokens of {split} ranks compete for the same slots, and moe.pad_to_capacity=true needs as many "
               "on every rank; set moe.capacity_scope=rank, or pad_to_capacity=false")


# --- auxiliary losses ------------------------------------------------------------------------------------------------------------------------


@rule("moe.aux_coefficient", "moe.layers", "model.num_layers")
def _coefficients(config: Config, world: int | None) -> Iterator[str]:
    if config.moe is not None:
        yield from _wrong_length(config, "moe.aux_coefficient", config.moe.aux_coefficient)


@rule("moe.extra_aux_losses", "moe.layers", "model.num_layers")
def _extra_coefficients(config: Config, world: int | None) -> Iterator[str]:
    for index, extra in enumerate(config.moe.extra_aux_losses if config.moe is not None else []):
        yield from _wrong_length(config, f"moe.extra_aux_losses.{index}.coefficient", extra.coefficient)


def _wrong_length(config: Config, key: str, coefficients: float | list[float]) -> Iterator[str]:
    count = len(set(config.moe_layers))
    if isinstance(coefficients, list) and len(coefficients) != count:
        yield (f"{key}={shown(coefficients)} has {len(coefficients)} numbers, and there are {count} MoE layers; "
               "give one per MoE layer, in order, or a single number for all")


@rule("moe.aux_schedule", "train.steps")
def _schedule(config: Config, world: int | None) -> Iterator[str]:
    last = config.train.steps
    late = sorted({point.step for point in config.moe.aux_schedule if point.step > last}) if config.moe is not None else []
    if late:
        yield (f"moe.aux_schedule names step {listed(late)}, after the last one, train.steps={last}; use steps up to {last} "
               "(to end on a slope, give the factor of the last step)")


# --- what belongs to experts -----------------------------------------------------------------------------------------------------------------


@rule("moe", "megatron")
def _without_experts(config: Config, world: int | None) -> Iterator[str]:
    for name, value in config.megatron.items():
        if config.moe is None and name.startswith("moe_") and is_free(name):
            yield f"megatron.{name}={shown(value)} is about experts, and there is no moe section; leave it out, or describe the experts in moe"


@rule("moe.shared_expert_ffn_hidden_size", "moe.dispatcher", "megatron")
def _shared_expert(config: Config, world: int | None) -> Iterator[str]:
    if config.moe is None:
        return
    if passed(config, "moe_shared_expert_overlap") and config.moe.shared_expert_ffn_hidden_size is None:
        yield "megatron.moe_shared_expert_overlap=true is about a shared expert, and there is none; set moe.shared_expert_ffn_hidden_size, or leave it out"
    if passed(config, "moe_shared_expert_overlap") and config.moe.shared_expert_ffn_hidden_size is not None and config.moe.dispatcher != "alltoall":
        yield (f"megatron.moe_shared_expert_overlap=true hides the all-to-all behind the shared expert; "
               f"set moe.dispatcher=alltoall (it is {config.moe.dispatcher})")


@rule("moe.dispatcher", "megatron")
def _padding_for_quantization(config: Config, world: int | None) -> Iterator[str]:
    for name in ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8"):
        if config.moe is None or not passed(config, name):
            continue
        if passed(config, "fp8") is None and passed(config, "fp4") is None:
            yield f"megatron.{name}=true pads for low precision, and there is none; set megatron.fp8 or megatron.fp4, or leave it out"
        if config.moe.dispatcher != "alltoall":
            yield f"megatron.{name}=true needs moe.dispatcher=alltoall, not {config.moe.dispatcher}; set one of them back"
