"""What a mixture of experts made from a dense model looks like, and how its random part is made: the settings of an upcycling, and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.upcycling.methods import drop, granular, noise, shared
from megatron_skywork.errors import ConfigError

LARGEST_NUM_EXPERTS = 65_536
ROUTER_INITS = ("normal", "zero", "orthogonal", "text")


@dataclass(frozen=True)
class UpcycleOptions:
    """The settings, each with the name of its option.

    Attributes:
        num_experts, topk: routed experts of every MoE layer (pieces counted), and how many a token is sent to.
        layers: indices (from 0) of the layers that become mixtures; None for all.
        noise: noise added to each expert, as a share of its matrix's standard deviation (`methods.noise`).
        drop_ratio: share of each expert's inner columns that is drawn anew (`methods.drop`).
        granularity: pieces the feed-forward is cut into, each an expert (`methods.granular`).
        shared_expert_ffn: inner width of a shared expert made from the dense feed-forward (`methods.shared`); None for none.
        shared_expert_gate: a learned gate before the shared expert, as Qwen2-MoE has it.
        expert_sources: (place, expert numbers): those experts come from another dense model (`methods.blend`).
        trunk: what all experts share comes from the dense model, or is the mean of all dense models.
        router_init: how the rows of a new router start (`methods.router_init`).
        router_init_std: their root mean square.
        router_texts: text files for router_init text: one, or one for each expert (each copy, with granularity).
        gate_norm, gate_norm_scale, pre_softmax: as in the section moe of a run's configuration.
        seed: of everything random.
    """

    num_experts: int
    topk: int = 2
    layers: tuple[int, ...] | None = None
    noise: float = 0.0
    drop_ratio: float = 0.0
    granularity: int = 1
    shared_expert_ffn: int | None = None
    shared_expert_gate: bool = False
    expert_sources: tuple[tuple[str, tuple[int, ...]], ...] = ()
    trunk: Literal["dense", "mean"] = "dense"
    router_init: str = "normal"
    router_init_std: float = 0.01
    router_texts: tuple[str, ...] = ()
    gate_norm: bool = True
    gate_norm_scale: float = 1.0
    pre_softmax: bool = False
    seed: int = 1234

    @property
    def num_copies(self) -> int:
        """Whole feed-forwards among the routed experts."""
        return self.num_experts // max(self.granularity, 1)

    @property
    def sums_to_one(self) -> bool:
        """Whether the chosen experts' weights do. A single expert keeps its probability."""
        return not self.pre_softmax and self.topk > 1

    @property
    def method(self) -> str:
        """The method's name, for people and for the manifest."""
        parts = ["drop-upcycling" if self.drop_ratio else "copy with noise" if self.noise else "copy"]
        parts += [f"granular ({self.granularity} pieces)"] if self.granularity > 1 else []
        parts += ["shared expert"] if self.shared_expert_ffn is not None else []
        parts += [f"{len(self.expert_sources) + 1} dense models"] if self.expert_sources else []
        return ", ".join(parts)

    def output_factor(self) -> float:
        """What an expert's output is multiplied by, so that the mixture of pieces adds up (`methods.granular`).

        Probabilities that do not sum to 1 have a factor only where they are nearly equal, which a normalized gate's never are.
        """
        if self.sums_to_one or self.gate_norm:
            return float(self.granularity)
        return granular.uniform_factor(self.num_experts, self.topk, self.granularity)

    def why_inexact(self, ffn: int) -> list[str]:
        """Why the result does not compute what the dense model computes; nothing where it does, as long as no token is dropped.

        Args:
            ffn: inner width of the dense feed-forward.
        """
        silent = self.shared_expert_ffn == ffn and not self.noise and not self.drop_ratio
        reasons = []
        if self.noise or self.drop_ratio:
            reasons.append("experts are changed on purpose")
        if self.expert_sources:
            reasons.append("experts come from several models")
        if not self.sums_to_one and not silent:
            reasons.append("the chosen experts' weights do not sum to 1")
        if not granular.exact_scales(self.output_factor()) and not silent:
            reasons.append(f"a factor of {self.output_factor():g} rounds the weights")
        if self.granularity > 1 and (self.router_init == "zero" or self.router_init_std == 0) and not silent:
            reasons.append("with equal logits the chosen pieces need not belong to one copy")
        return reasons

    def recorded(self, ffn: int) -> dict[str, Any]:
        """For the manifest: method, whether it is exact, every setting; places by their last name, since a path says nothing elsewhere."""
        values = asdict(self)
        values["expert_sources"] = [[Path(place).name, list(experts)] for place, experts in self.expert_sources]
        values["router_texts"] = [Path(place).name for place in self.router_texts]
        return {"name": self.method, "exact": not self.why_inexact(ffn), **values}


def moe_section(model: Model, options: UpcycleOptions) -> Moe:
    """The section moe of the result: the given choices, capacity unset, everything else at its default.

    Raises:
        ConfigError: choices that make no model, all of them.
    """
    problems = list(_problems(model, options))
    fields: dict[str, Any] = {key: getattr(options, key) for key in ("num_experts", "topk", "gate_norm", "gate_norm_scale", "router_init_std")}
    if options.pre_softmax:
        fields["pre_softmax"] = True
    if options.layers is not None and len(set(options.layers)) < model.num_layers:
        fields["layers"] = sorted(set(options.layers))
    if options.shared_expert_ffn is not None:
        fields |= {"shared_expert_ffn_hidden_size": options.shared_expert_ffn, "shared_expert_gate": options.shared_expert_gate}
    if not problems and (width := expert_width(model, options)) != model.ffn_hidden_size:
        fields["ffn_hidden_size"] = width
    try:
        moe = Moe(**fields)
    except ValidationError as error:
        problems += _of_section(error, tuple(problems))
    if problems:
        raise ConfigError(problems)
    return moe


def _of_section(error: ValidationError, problems: tuple[str, ...]) -> Iterator[str]:
    """What the section finds wrong beside the problems that are known, under the names of the options."""
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ")
        field = str(item["loc"][0]) if item["loc"] else ""
        option = f"--{'shared-expert-ffn' if field == 'shared_expert_ffn_hidden_size' else field.replace('_', '-')}"
        if not field:
            yield message  # a rule between settings names them itself
        elif not any(problem.startswith(option) for problem in problems):
            yield f"{option}={item['input']}: {message}"


def expert_width(model: Model, options: UpcycleOptions) -> int:
    """Inner width of a routed expert."""
    ffn = model.ffn_hidden_size
    return (ffn if options.shared_expert_ffn is None else shared.routed_width(ffn, options.shared_expert_ffn)) // max(options.granularity, 1)


def _problems(model: Model, options: UpcycleOptions) -> Iterator[str]:
    ffn, routed = model.ffn_hidden_size, model.ffn_hidden_size
    if not 2 <= options.num_experts <= LARGEST_NUM_EXPERTS:
        yield f"--num-experts={options.num_experts}: must be 2 to {LARGEST_NUM_EXPERTS:,}"
    if options.layers is not None:
        outside = [layer for layer in options.layers if not 0 <= layer < model.num_layers]
        if outside or not options.layers:
            yield f"--moe-layers: {outside or 'none given'}; the model has layers 0 to {model.num_layers - 1}"
    if options.shared_expert_ffn is not None:
        if problem := shared.shared_problem(ffn, options.shared_expert_ffn):
            yield problem
        else:
            routed = shared.routed_width(ffn, options.shared_expert_ffn)
    elif options.shared_expert_gate:
        yield "--shared-expert-gate: gates a shared expert, and there is none; give --shared-expert-ffn"
    for problem in (noise.noise_problem(options.noise), granular.width_problem(routed, options.granularity),
                    granular.routing_problem(options.num_experts, options.topk, options.granularity),
                    drop.drop_problem(routed, options.drop_ratio) if options.drop_ratio else None):  # fmt: skip
        if problem:
            yield problem
    if options.noise and options.drop_ratio:
        yield f"--noise={options.noise} with --drop-ratio={options.drop_ratio}: each is a method of its own; leave one out"
    yield from _router_problems(options)
    yield from _source_problems(options)


def _router_problems(options: UpcycleOptions) -> Iterator[str]:
    if options.router_init not in ROUTER_INITS:
        yield f"--router-init={options.router_init}: use {', '.join(ROUTER_INITS)}"
    if options.router_init == "text" and not options.router_texts:
        yield "--router-init=text: needs --router-text FILE, once, or once for each expert"
    if options.router_texts and options.router_init != "text":
        yield f"--router-text: is for --router-init=text, and it is {options.router_init}"
    if not 0 <= options.router_init_std <= 100:
        yield f"--router-init-std={options.router_init_std}: must be 0 to 100; the report's is 0.01"


def _source_problems(options: UpcycleOptions) -> Iterator[str]:
    taken: dict[int, str] = {}
    for place, experts in options.expert_sources:
        outside = [expert for expert in experts if not 0 <= expert < options.num_copies]
        if outside:
            what = "copies (each one of granularity pieces)" if options.granularity > 1 else "experts"
            yield f"--experts-from {place}={','.join(map(str, outside))}: there are {what} 0 to {options.num_copies - 1}"
        twice = [expert for expert in experts if expert in taken]
        if twice:
            yield f"--experts-from {place}={','.join(map(str, twice))}: given to {taken[twice[0]]} already"
        taken.update(dict.fromkeys(experts, place))
    if options.trunk == "mean" and not options.expert_sources:
        yield "--trunk=mean: is the mean of several dense models, and there is one; give --experts-from, or leave it out"
