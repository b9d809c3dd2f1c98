"""`SkyworkRouter`: megatron-core's top-k router with the two techniques of the Skywork-MoE report, and eyes.

One forward pass, in order: gate in fp32; z-loss on the raw logits (normalized ones have nearly constant norm, the loss would say nothing);
normalization; top-k and the softmax of the selected, which for a softmax gate is "softmax over all, select, renormalize"; dropping by capacity;
the auxiliary loss, weighted by the layer's current coefficient; statistics.

The coefficient is a tensor on the device, so that it can change every step without the host waiting for the device, and 0 is a coefficient like any
other. Statistics are summed on the device into `window`, read and cleared once per optimizer step by `router_state.update_coefficients`.
They count training forwards with gradients only: not evaluation, and a recomputed layer once, since its first forward runs without gradients.

Shapes: S sequence, B batch, H hidden, T = S * B tokens of this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping, topk_routing_with_score_function, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_skywork.config.schema import Moe
from megatron_skywork.errors import ConfigError
from megatron_skywork.moe.adaptive_aux import COEFFICIENT_NAME
from megatron_skywork.moe.aux_loss import report_from_means, sum_over_group, switch_from_means
from megatron_skywork.moe.drop_stats import count_dropped, routed_per_expert
from megatron_skywork.moe.gate import gate_logits
from megatron_skywork.moe.gating_norm import normalize_logits
from megatron_skywork.moe.router_health import gate_entropy, gate_ratios
from megatron_skywork.moe.transformer_config import SkyworkTransformerConfig

# What `window` holds behind the E counts of routed assignments; sums over tokens, except the last three, which are sums over micro-batches.
WINDOW_SUMS = ("dropped", "tokens", "entropy", "max1_over_max2", "max2_over_max3", "aux_loss", "z_loss", "micro_batches")


class SkyworkRouter(TopKRouter):
    """Top-k router of one MoE layer; takes the place of `MoESubmodules.router`.

    Buffers:
        aux_coefficient: fp32 scalar, the weight of the auxiliary loss in this step; in the state dict exactly when it adapts.
        window: float64 [E + len(WINDOW_SUMS)], this rank's sums since the last optimizer step; never saved.

    Args:
        config: with `skywork` set.
        pg_collection: megatron-core's groups; tp, cp, tp_cp and tp_dp_cp are used.
        kwargs: whatever else this version of megatron-core gives its routers.

    Raises:
        ConfigError: megatron-core routing options that contradict the `moe` section.
    """

    config: SkyworkTransformerConfig
    aux_coefficient: Tensor
    window: Tensor

    def __init__(self, config: SkyworkTransformerConfig, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        self._require_consistent(config)
        super().__init__(config, pg_collection, **kwargs)
        moe = self.moe
        self.register_buffer(COEFFICIENT_NAME, torch.tensor(moe.aux_coefficient, dtype=torch.float32), persistent=moe.adaptive.enabled)
        self.register_buffer("window", torch.zeros(moe.num_experts + len(WINDOW_SUMS), dtype=torch.float64), persistent=False)

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
        kept_TE = routed_TE
        # An evaluation measures the model that is exported, which drops nothing; only fixed shapes keep the limit.
        if self.config.moe_expert_capacity_factor is not None and (self.training or self.config.moe_pad_expert_input_to_capacity):
            probs_TE, kept_TE = apply_router_token_dropping(
                probs_TE,
                routed_TE,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if training:
            gate_TE = self._full_gate(logits_TE)
            if self.moe.aux_loss != "none":
                probs_TE = self._attach_aux_loss(probs_TE, gate_TE, routed_TE, valid_T)
            self._count(gate_TE.detach(), routed_TE, kept_TE, valid_T)
        if self.enable_expert_bias:
            self._apply_expert_bias(kept_TE, padding_mask=None if valid_T is None else ~valid_T.unsqueeze(-1))
        return probs_TE, kept_TE

    def _full_gate(self, logits_TE: Tensor) -> Tensor:
        """Probabilities over all experts, before selection."""
        if self.score_function == "softmax":
            return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        scores_TE = torch.sigmoid(logits_TE.float())
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    # ------------------------------------------------------------------------------------------------------------------ losses

    def _attach_aux_loss(self, probs_TE: Tensor, gate_TE: Tensor, routed_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Add coefficient * L to the training loss through `probs_TE`; aux_loss.py derives the scaling."""
        local_tokens = gate_TE.new_full((1,), gate_TE.shape[0]) if valid_T is None else valid_T.sum(dtype=gate_TE.dtype).reshape(1)
        weighted_TE = gate_TE if valid_T is None else gate_TE * valid_T.unsqueeze(-1)
        # Mean gate, load and token count travel in one all-reduce.
        routed_E = routed_per_expert(routed_TE, valid_T).to(gate_TE.dtype)
        sums = sum_over_group(torch.cat([weighted_TE.sum(dim=0), routed_E, local_tokens]), self.tp_cp_group)
        gate_sum_E, routed_sum_E, tokens = sums[: self.num_experts], sums[self.num_experts : -1].detach(), sums[-1].detach().clamp(min=1.0)
        if self.moe.aux_loss == "report":
            loss = report_from_means(gate_sum_E / tokens)
        else:
            loss = switch_from_means(gate_sum_E / tokens, routed_sum_E / (self.topk * tokens))
        self._add_to_window("aux_loss", loss)
        return MoEAuxLossAutoScaler.apply(probs_TE, self.aux_coefficient * loss * self._per_token_factor(tokens))

    def _attach_z_loss(self, logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Add the z-loss to the training loss: the mean over this rank's tokens, of which the group's mean is taken."""
        loss = z_loss_func(logits_TE, 1.0, padding_mask=None if valid_T is None else ~valid_T)
        self._add_to_window("z_loss", loss)
        tokens = (logits_TE.new_full((), logits_TE.shape[0]) if valid_T is None else valid_T.sum(dtype=logits_TE.dtype)) * self.tp_cp_group.size()
        share = self.moe.z_loss_coefficient / self.tp_cp_group.size()
        return MoEAuxLossAutoScaler.apply(logits_TE, share * loss * self._per_token_factor(tokens))

    def _per_token_factor(self, group_tokens: Tensor) -> Tensor | float:
        """What cancels the division by the global batch's tokens, where losses are summed over tokens instead of averaged."""
        return group_tokens if self.config.calculate_per_token_loss else 1.0

    # ------------------------------------------------------------------------------------------------------------------ statistics

    @torch.no_grad()
    def _count(self, gate_TE: Tensor, routed_TE: Tensor, kept_TE: Tensor, valid_T: Tensor | None) -> None:
        """Add this forward's tokens to the window."""
        experts = self.num_experts
        self.window[:experts] += routed_per_expert(routed_TE, valid_T)
        self._add_to_window("dropped", count_dropped(routed_TE, kept_TE, valid_T))
        per_token = torch.stack([torch.ones_like(gate_TE[:, 0]), gate_entropy(gate_TE), *gate_ratios(gate_TE)])
        if valid_T is not None:
            per_token = per_token * valid_T
        first = experts + WINDOW_SUMS.index("tokens")
        self.window[first : first + 4] += per_token.sum(dim=1, dtype=torch.float64)
        self.window[experts + WINDOW_SUMS.index("micro_batches")] += 1

    @torch.no_grad()
    def _add_to_window(self, name: str, value: Tensor) -> None:
        self.window[self.num_experts + WINDOW_SUMS.index(name)] += value

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
                moe.gate_norm and config.moe_router_pre_softmax and topk > 1,
                "megatron.moe_router_pre_softmax=true leaves the selected weights as they are, moe.gate_norm=true renormalizes them; drop one of the two",
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
                config.moe_pad_expert_input_to_capacity and capacity is not None and capacity * topk > experts,
                f"moe.capacity_factor={capacity} gives an expert more slots than there are tokens, which moe.pad_to_capacity=true cannot fill; "
                f"use at most num_experts / topk = {moe.num_experts / moe.topk:g}",
            ),
        ]
        problems = [problem for wrong, problem in rules if wrong]
        if problems:
            raise ConfigError(problems)
