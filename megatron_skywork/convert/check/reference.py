"""What a checkpoint computes, in plain PyTorch and fp32 (or fp64), one layer at a time: the yardstick of every conversion.

It shares no code with the converter's layouts, with megatron-core or with transformers, so that an error in one of them does not hide in the other.
Memory stays at a few matrices, whatever the model: a matrix is read when it is multiplied with, rows of the embedding are picked before they are cast, and
logits are made a few thousand tokens of the vocabulary at a time.

Shape letters: T tokens (one sequence), H hidden, N query heads, G query groups, D head width, F ffn, E experts, K top-k, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from megatron_skywork.config.schema import Moe
from megatron_skywork.convert.check.reference_weights import FeedForward, HfLayers, Layer, Layers, OurLayers

__all__ = ["Forward", "HfLayers", "OurLayers", "gate", "logits_of", "rotary", "swiglu"]

Tensor = torch.Tensor
# Llama 3.1's constants beside the factor: turns over the original context below which a frequency is slowed down, and above which it is kept.
ORIGINAL_POSITIONS, LOW_TURNS, HIGH_TURNS = 8192, 1.0, 4.0


class Forward:
    """Runs one sequence through a checkpoint, step by step, so that two checkpoints can be run side by side.

    `Forward`, then `advance` for every layer of `layers()`, then `logits_TC`. A layer's halves are `attend` and `feed_forward`, with `ffn_input_TH` between.

    Args:
        embedded_TH: the tokens' rows of the embedding, where they have been read already.
    """

    def __init__(self, weights: Layers, tokens_T: Tensor, embedded_TH: Tensor | None = None):
        self.weights, self.model, self.moe = weights, weights.model, weights.moe
        self.hidden_TH = weights.embed(tokens_T) if embedded_TH is None else embedded_TH
        angles = rotary(len(tokens_T), self.model.resolved_head_dim, self.model.rope_theta, self.model.rope_scaling_factor)
        self._cos_T1D, self._sin_T1D = (part.to(self.hidden_TH.dtype) for part in angles)

    def advance(self, layer: Layer) -> Tensor:
        """One layer; returns the residual stream behind it, [T, H]."""
        self.attend(layer)
        return self.feed_forward(layer)

    def attend(self, layer: Layer) -> None:
        """The first half of a layer: the residual stream behind its attention."""
        self.hidden_TH = self.hidden_TH + self._attention(layer, self._norm(self.hidden_TH, layer.attention_norm_H))

    def ffn_input_TH(self, layer: Layer) -> Tensor:
        """After `attend`: what goes into the layer's feed-forward and, where it is a mixture, into its router."""
        return self._norm(self.hidden_TH, layer.ffn_norm_H)

    def feed_forward(self, layer: Layer) -> Tensor:
        """The second half; returns the residual stream behind the layer, [T, H]."""
        self.hidden_TH = self.hidden_TH + self._feed_forward(layer, self.ffn_input_TH(layer))
        return self.hidden_TH

    def logits_TC(self) -> Iterator[Tensor]:
        """Logits of the real vocabulary in chunks, from its first token on; padding rows are not part of the model."""
        normed_TH = self._norm(self.hidden_TH, self.weights.final_norm())
        return (normed_TH @ rows_CH.T for rows_CH in self.weights.output_rows())

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.norm_epsilon) * weight

    def _attention(self, layer: Layer, x_TH: Tensor) -> Tensor:
        width = self.model.resolved_head_dim
        bias = layer.bias or (None, None, None)
        query_TND, key_TGD, value_TGD = (
            F.linear(x_TH, weight, add).unflatten(-1, (-1, width)) for weight, add in zip(layer.query_key_value(), bias, strict=True)
        )
        if layer.norms is not None:
            query_TND, key_TGD = self._norm(query_TND, layer.norms[0]), self._norm(key_TGD, layer.norms[1])
        query_TND, key_TGD = self._rotate(query_TND), self._rotate(key_TGD)
        future_TT = torch.ones(len(x_TH), len(x_TH), dtype=torch.bool).triu(1)
        share = self.model.num_attention_heads // self.model.resolved_query_groups
        mixed = []
        for head, query_TD in enumerate(query_TND.unbind(1)):  # head by head: the scores of all heads of a long sequence are large
            scores_TT = (query_TD @ key_TGD[:, head // share].T / width**0.5).masked_fill_(future_TT, float("-inf"))
            mixed.append(scores_TT.softmax(-1) @ value_TGD[:, head // share])
        return torch.cat(mixed, dim=-1) @ layer.proj().T

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self._cos_T1D + torch.cat([-second, first], dim=-1) * self._sin_T1D

    def _feed_forward(self, layer: Layer, x_TH: Tensor) -> Tensor:
        if layer.router_EH is None:
            return swiglu(x_TH, layer.expert(0))
        assert self.moe is not None
        probs_TK, chosen_TK = gate(x_TH @ layer.router_EH.T, self.moe)
        out_TH = torch.zeros_like(x_TH)
        if layer.shared is not None:
            out_TH += swiglu(x_TH, layer.shared)
        if layer.shared_gate_1H is not None:
            out_TH *= (x_TH @ layer.shared_gate_1H.T).sigmoid()
        for number in chosen_TK.unique().tolist():
            token, slot = (chosen_TK == number).nonzero(as_tuple=True)
            out_TH[token] += probs_TK[token, slot, None] * swiglu(x_TH[token], layer.expert(number))
        return out_TH


def rotary(length: int, width: int, theta: float, scaling_factor: float | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, D] in fp64, the two halves alike.

    With a factor s, as Llama 3.1: a frequency that turns fewer than once over the original 8192 positions is divided by s, one that turns more than four
    times is kept, and between the two the share that is kept grows linearly with the turns.
    """
    inverse = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling_factor is not None:
        turns = ORIGINAL_POSITIONS * inverse / (2 * math.pi)
        kept = ((turns - LOW_TURNS) / (HIGH_TURNS - LOW_TURNS)).clamp(0, 1)
        inverse = inverse * (kept + (1 - kept) / scaling_factor)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    angles_T1D = torch.cat([angles, angles], dim=-1)[:, None]
    return angles_T1D.cos(), angles_T1D.sin()


def swiglu(x_TH: Tensor, weights: FeedForward) -> Tensor:
    """down(silu(gate x) * (up x)), one matrix in memory at a time."""
    inner_TF = F.silu(x_TH @ weights.gate().T)
    inner_TF *= x_TH @ weights.up().T
    return inner_TF @ weights.down().T


def gate(logits_TE: Tensor, moe: Moe) -> tuple[Tensor, Tensor]:
    """Probabilities and numbers of the chosen experts, [T, K] each: softmax over all, the k largest, renormalized (report, section 2.1).

    With `pre_softmax` the chosen probabilities stay as they are (Qwen2-MoE). So does that of a single chosen expert, as in the trained model: renormalized it
    would be 1 whatever the router says, and the router would not learn.
    """
    if moe.gate_norm:
        deviation_T1 = (logits_TE.var(dim=-1, keepdim=True, unbiased=moe.gate_norm_unbiased) + moe.gate_norm_epsilon).sqrt()
        logits_TE = moe.gate_norm_scale * (logits_TE - logits_TE.mean(dim=-1, keepdim=True)) / deviation_T1
    top_TK, chosen_TK = logits_TE.softmax(-1).topk(moe.topk, dim=-1)
    return (top_TK if moe.pre_softmax or moe.topk == 1 else top_TK / top_TK.sum(-1, keepdim=True)), chosen_TK


@torch.no_grad()
def logits_of(weights: Layers, tokens_T: Tensor) -> Tensor:
    """Logits [T, V] of one sequence, whole; for small models."""
    forward = Forward(weights, tokens_T)
    for layer in weights.layers():
        forward.advance(layer)
    return torch.cat(list(forward.logits_TC()), dim=-1)
