"""`SkyworkRouter`: megatron-core's top-k router with the two techniques of the Skywork-MoE report, and eyes.

One forward pass, in order: gate in fp32; z-loss on the raw logits (normalized ones have nearly constant norm, the loss would say nothing);
normalization; top-k and the softmax of the selected, which for a softmax gate is "softmax over all, select, renormalize", or with moe.pre_softmax the
same without the last; dropping by capacity; the auxiliary losses, which see the softmax over all either way, the main one weighted by the layer's
current coefficient; statistics.

The coefficient is a tensor on the device, so that it can change every step without the host waiting for the device, and 0 is a coefficient like any
other. Statistics are summed on the device into `window`, read and cleared once per optimizer step by `router_state.update_coefficients`.
They count training forwards with gradients only: not evaluation, and a recomputed layer once, since its first forward runs without gradients.

Shapes: S sequence, B batch, H hidden, T = S * B tokens of this rank, E experts; N sets of tokens (sequences, or one micro-batch), X = 2 E + 1 sums of a set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_capacity, topk_routing_with_score_function, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_skywork.config.schema import Coefficients, Moe
from megatron_skywork.errors import ConfigError
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import MEANS_NAME, balance_loss, balance_slope, sum_over_group
from megatron_skywork.moe.capacity import drop_priority, slots_of_group
from megatron_skywork.moe.drop_stats import count_dropped, routed_per_expert
from megatron_skywork.moe.gate import gate_logits
from megatron_skywork.moe.gating_norm import normalize_logits
from megatron_skywork.moe.router_health import gate_entropy, gate_ratios
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig

if TYPE_CHECKING:
    from megatron_skywork.moe.routing_probe import RoutingProbe

# What `window` holds behind the E counts of routed assignments and the E sums of gate probabilities: sums over tokens, then over micro-batches.
# Behind these stands one sum over micro-batches for each auxiliary loss.
WINDOW_SUMS = ("dropped", "tokens", "entropy", "max1_over_max2", "max2_over_max3", "z_loss", "micro_batches")


class SkyworkRouter(TopKRouter):
    """Top-k router of one MoE layer; takes the place of `MoESubmodules.router`.

    Buffers:
        aux_coefficient: fp32 scalar, the weight of the main auxiliary loss in this step; in the state dict exactly when it adapts.
        batch_means: fp32 [2, E], mean gate and load of the last step's global batch; there and in the state dict exactly when a loss needs them.
        window: float64 [2 E + len(WINDOW_SUMS) + number of losses], this rank's sums since the last optimizer step; never saved.

    Attributes:
        observes: what is counted. `health` all; `drops` what coefficients need; `nothing` nothing. Set from outside, `health` at first.
        probe: told the routing of evaluation forwards where there is one.

    Args:
        config: with `skywork` set.
        pg_collection: megatron-core's groups; tp, cp, tp_cp and tp_dp_cp are used.
        kwargs: whatever else this version of megatron-core gives its routers.

    Raises:
        ConfigError: megatron-core routing options that contradict the `moe` section.
    """

    config: SkyworkTransformerConfig
    aux_coefficient: Tensor
    batch_means: Tensor
    window: Tensor

    def __init__(self, config: SkyworkTransformerConfig, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        self._require_consistent(config)
        super().__init__(config, pg_collection, **kwargs)
        moe = self.moe
        self.observes: Literal["health", "drops", "nothing"] = "health"
        self.probe: RoutingProbe | None = None
        self.losses = [] if moe.aux_loss == "none" else [(moe.aux_loss, moe.aux_scope), *((extra.loss, extra.scope) for extra in moe.extra_aux_losses)]
        self.extra_coefficients = [0.0 for _ in moe.extra_aux_losses]
        self.register_buffer(COEFFICIENT_NAME, torch.zeros((), dtype=torch.float32), persistent=moe.adaptive.enabled)
        if any(scope == "global_batch" for _, scope in self.losses):
            self.register_buffer(MEANS_NAME, torch.full((2, moe.num_experts), 1.0 / moe.num_experts, dtype=torch.float32))
        self.register_buffer("window", torch.zeros(2 * moe.num_experts + len(WINDOW_SUMS) + len(self.losses), dtype=torch.float64), persistent=False)
        self._set_coefficients(0)

    def set_layer_number(self, layer_number: int) -> None:
        """Called when the model is built; which of several coefficients is this layer's is known from here on."""
        super().set_layer_number(layer_number)
        frequency = self.config.moe_layer_freq
        before = sum(frequency[: layer_number - 1]) if isinstance(frequency, list) else (layer_number - 1) // frequency
        self._set_coefficients(before)

    def _set_coefficients(self, moe_layer: int) -> None:
        def of_layer(coefficients: Coefficients) -> float:
            return coefficients[moe_layer % len(coefficients)] if isinstance(coefficients, list) else coefficients

        self.first_coefficient = of_layer(self.moe.aux_coefficient)
        self.extra_coefficients = [of_layer(extra.coefficient) for extra in self.moe.extra_aux_losses]
        self.aux_coefficient.fill_(self.first_coefficient)

    @property
    def moe(self) -> Moe:
        """The settings this router follows."""
        assert self.config.skywork is not None
        return self.config.skywork

    # ------------------------------------------------------------------------------------------------------------------ weight and type

    def reset_parameters(self) -> None:
        """A fresh gate, left in fp32 whatever `params_dtype` says: bf16 rounds the logit differences that top-k is decided by."""
        if self.config.perform_initialization:
            torch.nn.init.normal_(self.weight, mean=0.0, std=self.moe.router_init_std)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                # megatron-core sums the gradients of these over the tensor-parallel ranks, each of which saw its own part of the sequence.
                parameter.sequence_parallel = self.config.sequence_parallel

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SkyworkRouter:
        """Follow `.to(device)`, but not `.bfloat16()`, `.half()` or `.to(dtype)`: weights and state keep their types, and their values unrounded."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_type, recurse)

    # ------------------------------------------------------------------------------------------------------------------ forward

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route every token of activations [S, B, H]; of a recomputed router nothing but these stays for backward."""
        route = super().forward
        if self.training and torch.is_grad_enabled() and self.config.recomputes("router"):
            # megatron-core's checkpoint also puts the random generators back, so jitter falls the same way twice.
            return tensor_parallel.checkpoint(route, False, input, padding_mask)
        return route(input, padding_mask)

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Noise on the gate's input belongs to training; an evaluation and its probe see the gate that is exported."""
        return super().apply_input_jitter(input) if self.training else input

    def gating(self, input: Tensor) -> Tensor:
        """Raw logits [S, B, E] in fp32 for activations [S, B, H]."""
        return gate_logits(input, self.weight, self.bias)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route every token.

        Args:
            logits: raw, [S, B, E].
            padding_mask: [S, B], true for padding tokens, which enter neither losses nor statistics.

        Returns:
            probs [T, E], the weights of the experts that a token keeps, and routing_map [T, E], as megatron-core's dispatchers expect them.
        """
        logits_TE = logits.reshape(-1, self.moe.num_experts)
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        training = self.training and torch.is_grad_enabled()

        if training and self.moe.z_loss_coefficient > 0:
            logits_TE = self._attach_z_loss(logits_TE, valid_T)
        if self.moe.gate_norm:
            logits_TE = normalize_logits(logits_TE, self.moe.gate_norm_scale, self.moe.gate_norm_epsilon, unbiased=self.moe.gate_norm_unbiased)

        probs_TE, routed_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
            router_replay=self.router_replay,
        )
        probs_TE, kept_TE = self._drop(probs_TE, routed_TE, valid_T)
        if training:
            gate_TE = self._full_gate(logits_TE) if self.losses or self.observes == "health" else None
            if self.losses:
                assert gate_TE is not None
                probs_TE = self._attach_aux_losses(probs_TE, gate_TE, routed_TE, valid_T, logits.shape[1])
            if self.observes != "nothing":
                self._count_drops(routed_TE, kept_TE, valid_T)
            if self.observes == "health":
                assert gate_TE is not None
                self._count_health(gate_TE.detach(), valid_T)
        elif self.probe is not None and not self.training:
            self.probe.see(routed_TE)
        if self.enable_expert_bias:
            # Before dropping: afterwards no expert shows more than its capacity, and with padding all show the same.
            self._apply_expert_bias(routed_TE, padding_mask=None if valid_T is None else ~valid_T.unsqueeze(-1))
        return probs_TE, kept_TE

    def _drop(self, probs_TE: Tensor, routed_TE: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and map of what is kept. An evaluation has a limit of its own, by default none: it measures the model that is exported."""
        moe = self.moe
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        if factor is None:
            return probs_TE, routed_TE
        group = self.tp_cp_group if moe.capacity_scope == "micro_batch" else None
        num_tokens = routed_TE.shape[0] * (1 if group is None else group.size())
        capacity = get_capacity(num_tokens * self.topk, moe.num_experts, factor)
        priority_TE = drop_priority(probs_TE, routed_TE, moe.drop_policy, valid_T)
        taken_TE = slots_of_group(priority_TE, capacity, group, self.cp_group.size())
        # Padded slots are part of the map that the dispatcher gets; their weight is 0.
        kept_TE = taken_TE if moe.pad_to_capacity and self.training else taken_TE & routed_TE
        return probs_TE * kept_TE, kept_TE

    def _full_gate(self, logits_TE: Tensor) -> Tensor:
        """Probabilities over all experts, before selection."""
        if self.score_function == "softmax":
            return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        scores_TE = torch.sigmoid(logits_TE.float())
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    # ------------------------------------------------------------------------------------------------------------------ losses

    def _attach_aux_losses(self, probs_TE: Tensor, gate_TE: Tensor, routed_TE: Tensor, valid_T: Tensor | None, batch: int) -> Tensor:
        """Add the sum of coefficient * L to the training loss through `probs_TE`; aux_loss.py derives scopes and scaling."""
        experts = self.num_experts
        group_size = self.tp_cp_group.size()
        # Gate sums, load and token count of each sequence travel in one all-reduce.
        columns_TX = torch.cat([gate_TE, routed_TE.to(gate_TE.dtype), torch.ones_like(gate_TE[:, :1])], dim=1)
        if valid_T is not None:
            columns_TX = columns_TX * valid_T.unsqueeze(-1)
        local_NX = columns_TX.reshape(-1, batch, 2 * experts + 1).sum(dim=0)
        by_sequence = any(scope == "sequence" for _, scope in self.losses)
        if not by_sequence:
            local_NX = local_NX.sum(dim=0, keepdim=True)
        gate_sum_E = local_NX[:, :experts].sum(dim=0)
        needs_group = by_sequence or valid_T is not None or any(scope == "micro_batch" for _, scope in self.losses)
        group_NX = sum_over_group(local_NX, self.tp_cp_group) if needs_group else local_NX
        tokens = group_NX[:, -1].detach().sum().clamp(min=1.0) * (1 if needs_group else group_size)
        if self.observes != "nothing":
            self.window[experts : 2 * experts] += gate_sum_E.detach()

        total = gate_TE.new_zeros(())
        coefficients: list[Tensor | float] = [self.aux_coefficient, *self.extra_coefficients]
        for index, ((kind, scope), coefficient) in enumerate(zip(self.losses, coefficients, strict=True)):
            if scope == "global_batch":
                loss = torch.dot(balance_slope(kind, *self.batch_means), gate_sum_E / tokens)
            else:
                loss = self._loss_over(kind, group_NX if scope == "sequence" else group_NX.sum(dim=0, keepdim=True))
                if self.observes != "nothing":
                    self.window[index - len(self.losses)] += loss.detach()
            total = total + coefficient * loss
        return MoEAuxLossAutoScaler.apply(probs_TE, total * self._per_token_factor(tokens))

    def _loss_over(self, kind: str, sums_NX: Tensor) -> Tensor:
        """Mean loss of N sets of tokens, weighted by their tokens, from sums of gate, routed assignments and tokens."""
        gate_NE, routed_NE, tokens_N1 = sums_NX.split([self.num_experts, self.num_experts, 1], dim=1)
        weight_N, divisor_N1 = tokens_N1.detach().squeeze(1), tokens_N1.detach().clamp(min=1.0)
        loss_N = balance_loss(kind, gate_NE / divisor_N1, routed_NE.detach() / (self.topk * divisor_N1))
        return (loss_N * weight_N).sum() / weight_N.sum().clamp(min=1.0)

    def _attach_z_loss(self, logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Add the z-loss to the training loss: the mean over this rank's tokens, of which the group's mean is taken."""
        loss = z_loss_func(logits_TE, 1.0, padding_mask=None if valid_T is None else ~valid_T)
        if self.observes != "nothing":
            self._add_to_window("z_loss", loss)
        tokens = (logits_TE.new_full((), logits_TE.shape[0]) if valid_T is None else valid_T.sum(dtype=logits_TE.dtype)) * self.tp_cp_group.size()
        share = self.moe.z_loss_coefficient / self.tp_cp_group.size()
        return MoEAuxLossAutoScaler.apply(logits_TE, share * loss * self._per_token_factor(tokens))

    def _per_token_factor(self, group_tokens: Tensor) -> Tensor | float:
        """What cancels the division by the global batch's tokens, where losses are summed over tokens instead of averaged."""
        return group_tokens if self.config.calculate_per_token_loss else 1.0

    # ------------------------------------------------------------------------------------------------------------------ statistics

    @torch.no_grad()
    def _count_drops(self, routed_TE: Tensor, kept_TE: Tensor, valid_T: Tensor | None) -> None:
        """Add this forward's assignments to the window: what coefficients follow."""
        self.window[: self.num_experts] += routed_per_expert(routed_TE, valid_T)
        if self.moe.capacity_factor is not None:
            self._add_to_window("dropped", count_dropped(routed_TE, kept_TE, valid_T))
        self._add_to_window("tokens", routed_TE.shape[0] if valid_T is None else valid_T.sum(dtype=torch.float64))
        self._add_to_window("micro_batches", 1)

    @torch.no_grad()
    def _count_health(self, gate_TE: Tensor, valid_T: Tensor | None) -> None:
        """Add this forward's gate to the window: what people look at."""
        per_token = torch.stack([gate_entropy(gate_TE), *gate_ratios(gate_TE)])
        if valid_T is not None:
            per_token = per_token * valid_T
        first = 2 * self.num_experts + WINDOW_SUMS.index("entropy")
        self.window[first : first + 3] += per_token.sum(dim=1, dtype=torch.float64)

    @torch.no_grad()
    def _add_to_window(self, name: str, value: Tensor | float) -> None:
        self.window[2 * self.num_experts + WINDOW_SUMS.index(name)] += value

    # ------------------------------------------------------------------------------------------------------------------ settings

    @staticmethod
    def _require_consistent(config: SkyworkTransformerConfig) -> None:
        """Refuse megatron-core options that would undo, repeat or bypass what this router does."""
        moe = getattr(config, "skywork", None)
        if moe is None:
            raise ValueError("SkyworkRouter needs SkyworkTransformerConfig.skywork; it is None, as for a dense model")
        score, balancing, capacity = config.moe_router_score_function, config.moe_router_load_balancing_type, config.moe_expert_capacity_factor
        experts, topk = config.num_moe_experts, config.moe_router_topk
        rules = [
            (score not in ("softmax", "sigmoid"), f"megatron.moe_router_score_function={score} is not known here; use softmax or sigmoid"),
            (
                moe.gate_norm and score == "sigmoid",
                "megatron.moe_router_score_function=sigmoid judges every expert by itself, and moe.gate_norm=true sets how sharply a softmax gate "
                "tells them apart; use softmax or moe.gate_norm=false",
            ),
            (
                score == "softmax" and config.moe_router_pre_softmax != (moe.pre_softmax or topk == 1),
                f"megatron.moe_router_pre_softmax={config.moe_router_pre_softmax} contradicts moe.pre_softmax={moe.pre_softmax} with moe.topk={moe.topk}; "
                "leave it out",
            ),
            (
                score == "sigmoid" and moe.pre_softmax,
                "megatron.moe_router_score_function=sigmoid makes the chosen weights sum to 1, and moe.pre_softmax=true leaves them as they are; "
                "drop one of the two",
            ),
            (
                moe.gate_norm and moe.pre_softmax and bool(config.moe_router_group_topk) and topk // (config.moe_router_group_topk or topk) > 1,
                "megatron.moe_router_group_topk with moe.pre_softmax=true judges groups by sums of probabilities, whose order moe.gate_norm=true changes; "
                "drop one of the three",
            ),
            (
                config.moe_router_fusion and getattr(moe_utils, "fused_topk_with_score_function", None) is None,
                "megatron.moe_router_fusion=true needs a kernel of Transformer Engine (2.6 or newer) that is not here; install the extra `te`, or leave it out",
            ),
            (
                balancing in ("sinkhorn", "quantile_balancing"),
                f"megatron.moe_router_load_balancing_type={balancing} replaces the routing of this package; leave it out",
            ),
            (
                config.moe_aux_loss_coeff,
                f"megatron.moe_aux_loss_coeff={config.moe_aux_loss_coeff} would be a second auxiliary loss; set moe.aux_loss and moe.aux_coefficient instead",
            ),
            (
                config.moe_z_loss_coeff,
                f"megatron.moe_z_loss_coeff={config.moe_z_loss_coeff} would be a second z-loss; set moe.z_loss_coefficient instead",
            ),
            (
                (experts, topk) != (moe.num_experts, moe.topk),
                f"megatron.num_moe_experts={experts}, moe_router_topk={topk} contradict moe.num_experts={moe.num_experts}, moe.topk={moe.topk}; leave them out",
            ),
            (
                moe.adaptive.enabled and capacity is None,
                "moe.adaptive.enabled=true follows the drop rate, and without moe.capacity_factor nothing is dropped; set it (1.1 is a start)",
            ),
            (
                config.moe_pad_expert_input_to_capacity and capacity is not None and capacity * topk > experts * (1 - 1e-9),
                f"moe.capacity_factor={capacity} gives an expert more slots than there are tokens, which moe.pad_to_capacity=true cannot fill; "
                f"use less than num_experts / topk = {moe.num_experts / moe.topk:g}",
            ),
        ]
        problems = [problem for wrong, problem in rules if wrong]
        if problems:
            raise ConfigError(problems)
