"""What a checkpoint computes, in plain PyTorch and fp32 (or fp64), one layer at a time: the yardstick of every conversion.

It shares no code with the converter's layouts, with megatron-core or with transformers, so that an error in one of them does not hide in the other.
Two views of weights, one forward: `HfLayers` reads a dense Hugging Face folder by its names, `OurLayers` one of our folders by ours.

Shape letters: T tokens (one sequence), H hidden, N query heads, G query groups, D head width, F ffn, E experts, K top-k, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.convert.hf_files import HfReader
from megatron_skywork.convert.mcore_files import DistributedReader
from megatron_skywork.convert.table import moe_layers

Tensor = torch.Tensor
# An expert's matrices by its number: gate [F, H], up [F, H], down [H, F].
Expert = Callable[[int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. `bias` and `norms` (query, key) where the model has them; a dense layer has no router, and one expert, number 0."""

    attention_norm_H: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    bias: tuple[Tensor, Tensor, Tensor] | None
    norms: tuple[Tensor, Tensor] | None
    proj: Tensor
    ffn_norm_H: Tensor
    router_EH: Tensor | None
    expert: Expert
    shared: tuple[Tensor, Tensor, Tensor] | None = None


class Layers(Protocol):
    """A checkpoint, layer by layer."""

    @property
    def model(self) -> Model: ...
    @property
    def moe(self) -> Moe | None: ...
    def embedding(self) -> Tensor: ...
    def layers(self) -> Iterator[Layer]: ...
    def head(self) -> tuple[Tensor, Tensor]: ...


class HfLayers:
    """A dense LLaMA-type Hugging Face folder."""

    def __init__(self, reader: HfReader, model: Model, dtype: torch.dtype = torch.float32):
        self.model, self._reader, self._dtype = model, reader, dtype
        self.moe: Moe | None = None

    def _get(self, name: str) -> Tensor:
        return self._reader.read(name).to(self._dtype)

    def embedding(self) -> Tensor:
        return self._get("model.embed_tokens.weight")

    def head(self) -> tuple[Tensor, Tensor]:
        return self._get("model.norm.weight"), self._get("model.embed_tokens.weight" if self.model.tie_embeddings else "lm_head.weight")

    def layers(self) -> Iterator[Layer]:
        for index in range(self.model.num_layers):
            yield self._layer(f"model.layers.{index}.")

    def _layer(self, at: str) -> Layer:
        def three(kind: str) -> tuple[Tensor, Tensor, Tensor]:
            return self._get(f"{at}self_attn.q_proj.{kind}"), self._get(f"{at}self_attn.k_proj.{kind}"), self._get(f"{at}self_attn.v_proj.{kind}")

        def expert(number: int) -> tuple[Tensor, Tensor, Tensor]:
            return self._get(at + "mlp.gate_proj.weight"), self._get(at + "mlp.up_proj.weight"), self._get(at + "mlp.down_proj.weight")

        return Layer(
            attention_norm_H=self._get(at + "input_layernorm.weight"),
            qkv=three("weight"),
            bias=three("bias") if self.model.qkv_bias else None,
            norms=(self._get(at + "self_attn.q_norm.weight"), self._get(at + "self_attn.k_norm.weight")) if self.model.qk_norm else None,
            proj=self._get(at + "self_attn.o_proj.weight"),
            ffn_norm_H=self._get(at + "post_attention_layernorm.weight"),
            router_EH=None,
            expert=expert,
        )


class OurLayers:
    """A folder of ours, dense or mixture."""

    def __init__(self, reader: DistributedReader, model: Model, moe: Moe | None, dtype: torch.dtype = torch.float32):
        self.model, self.moe, self._reader, self._dtype = model, moe, reader, dtype
        self._sparse = moe_layers(model, moe)

    def _get(self, name: str) -> Tensor:
        return self._reader.read(name).to(self._dtype)

    def embedding(self) -> Tensor:
        return self._get("embedding.word_embeddings.weight")[: self.model.vocab_size]

    def head(self) -> tuple[Tensor, Tensor]:
        name = "embedding.word_embeddings.weight" if self.model.tie_embeddings else "output_layer.weight"
        return self._get("decoder.final_layernorm.weight"), self._get(name)[: self.model.vocab_size]

    def layers(self) -> Iterator[Layer]:
        for index in range(self.model.num_layers):
            yield self._layer(index)

    def _split_qkv(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of each group: its query heads, its key head, its value head. Taken apart head by head, on purpose not as `layouts` does it."""
        groups, width = self.model.resolved_query_groups, self.model.resolved_head_dim
        each = self.model.num_attention_heads // groups
        heads = list(torch.split(mixed, width))
        step = each + 2
        query = [heads[group * step + head] for group in range(groups) for head in range(each)]
        key = [heads[group * step + each] for group in range(groups)]
        value = [heads[group * step + each + 1] for group in range(groups)]
        return torch.cat(query), torch.cat(key), torch.cat(value)

    def _layer(self, index: int) -> Layer:
        at = f"decoder.layers.{index}."
        sparse = index in self._sparse

        def expert(number: int) -> tuple[Tensor, Tensor, Tensor]:
            if not sparse:
                return _swiglu(self._get(at + "mlp.linear_fc1.weight"), self._get(at + "mlp.linear_fc2.weight"))
            fc1, fc2 = (self._box(f"{at}mlp.experts.experts.linear_fc{part}.weight", number) for part in (1, 2))
            return _swiglu(fc1, fc2)

        shared = None
        if sparse and self.moe is not None and self.moe.shared_expert_ffn_hidden_size:
            shared = _swiglu(self._get(at + "mlp.shared_experts.linear_fc1.weight"), self._get(at + "mlp.shared_experts.linear_fc2.weight"))
        return Layer(
            attention_norm_H=self._get(at + "self_attention.linear_qkv.layer_norm_weight"),
            qkv=self._split_qkv(self._get(at + "self_attention.linear_qkv.weight")),
            bias=self._split_qkv(self._get(at + "self_attention.linear_qkv.bias")) if self.model.qkv_bias else None,
            norms=(self._get(at + "self_attention.q_layernorm.weight"), self._get(at + "self_attention.k_layernorm.weight")) if self.model.qk_norm else None,
            proj=self._get(at + "self_attention.linear_proj.weight"),
            ffn_norm_H=self._get(at + ("pre_mlp_layernorm.weight" if sparse else "mlp.linear_fc1.layer_norm_weight")),
            router_EH=self._get(at + "mlp.router.weight") if sparse else None,
            expert=expert,
            shared=shared,
        )

    def _box(self, name: str, expert: int) -> Tensor:
        shape = self._reader.tensors[name].shape
        return self._reader.read(name, (expert, 0, 0), (1, *shape[1:]))[0].to(self._dtype)


def _swiglu(fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = fc1[: fc1.shape[0] // 2], fc1[fc1.shape[0] // 2 :]
    return gate, up, fc2


# ------------------------------------------------------------------------------------------------------------------------------ the forward


class Forward:
    """Runs one sequence through a checkpoint, step by step, so that two checkpoints can be run side by side.

    `start`, then `advance` for every layer of `layers()`, then `logits_TV`.
    """

    def __init__(self, weights: Layers, tokens_T: Tensor):
        self.weights, self.model, self.moe = weights, weights.model, weights.moe
        self.hidden_TH = F.embedding(tokens_T, weights.embedding())
        self._cos_T1D, self._sin_T1D = (part.to(self.hidden_TH.dtype) for part in rotary(len(tokens_T), self.model.resolved_head_dim, self.model.rope_theta))

    def advance(self, layer: Layer) -> Tensor:
        """One layer; returns the residual stream behind it, [T, H]."""
        self.hidden_TH = self.hidden_TH + self._attention(layer, self._norm(self.hidden_TH, layer.attention_norm_H))
        normed_TH = self._norm(self.hidden_TH, layer.ffn_norm_H)
        self.hidden_TH = self.hidden_TH + self._feed_forward(layer, normed_TH)
        return self.hidden_TH

    def logits_TV(self) -> Tensor:
        """Logits of the real vocabulary; padding rows are not part of the model."""
        norm_H, output_VH = self.weights.head()
        return self._norm(self.hidden_TH, norm_H) @ output_VH.T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.norm_epsilon) * weight

    def _attention(self, layer: Layer, x_TH: Tensor) -> Tensor:
        width = self.model.resolved_head_dim
        bias = layer.bias or (None, None, None)
        query_TND, key_TGD, value_TGD = (F.linear(x_TH, weight, add).unflatten(-1, (-1, width)) for weight, add in zip(layer.qkv, bias, strict=True))
        if layer.norms is not None:
            query_TND, key_TGD = self._norm(query_TND, layer.norms[0]), self._norm(key_TGD, layer.norms[1])
        query_TND, key_TGD = self._rotate(query_TND), self._rotate(key_TGD)
        share = self.model.num_attention_heads // self.model.resolved_query_groups
        key_TND, value_TND = key_TGD.repeat_interleave(share, dim=1), value_TGD.repeat_interleave(share, dim=1)
        scores_NTT = torch.einsum("snd,tnd->nst", query_TND, key_TND) / width**0.5
        future_TT = torch.ones(len(x_TH), len(x_TH), dtype=torch.bool).triu(1)
        mixed_TND = torch.einsum("nst,tnd->snd", scores_NTT.masked_fill(future_TT, float("-inf")).softmax(-1), value_TND)
        return mixed_TND.flatten(1) @ layer.proj.T

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self._cos_T1D + torch.cat([-second, first], dim=-1) * self._sin_T1D

    def _feed_forward(self, layer: Layer, x_TH: Tensor) -> Tensor:
        if layer.router_EH is None:
            return feed_forward(x_TH, *layer.expert(0))
        assert self.moe is not None
        probs_TK, chosen_TK = gate(x_TH @ layer.router_EH.T, self.moe)
        out_TH = torch.zeros_like(x_TH) if layer.shared is None else feed_forward(x_TH, *layer.shared)
        for number in chosen_TK.unique().tolist():
            token, slot = (chosen_TK == number).nonzero(as_tuple=True)
            out_TH[token] += probs_TK[token, slot, None] * feed_forward(x_TH[token], *layer.expert(number))
        return out_TH


def rotary(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, D] in fp64, the two halves alike."""
    inverse = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    angles_T1D = torch.cat([angles, angles], dim=-1)[:, None]
    return angles_T1D.cos(), angles_T1D.sin()


def feed_forward(x_TH: Tensor, gate_FH: Tensor, up_FH: Tensor, down_HF: Tensor) -> Tensor:
    """SwiGLU."""
    return (F.silu(x_TH @ gate_FH.T) * (x_TH @ up_FH.T)) @ down_HF.T


def gate(logits_TE: Tensor, moe: Moe) -> tuple[Tensor, Tensor]:
    """Probabilities and numbers of the chosen experts, [T, K] each: softmax over all, the k largest, renormalized (report, section 2.1).

    A single chosen expert keeps its probability, as in the trained model: renormalized it would be 1 whatever the router says, and the router would not learn.
    """
    if moe.gate_norm:
        deviation_T1 = (logits_TE.var(dim=-1, keepdim=True, unbiased=moe.gate_norm_unbiased) + moe.gate_norm_epsilon).sqrt()
        logits_TE = moe.gate_norm_scale * (logits_TE - logits_TE.mean(dim=-1, keepdim=True)) / deviation_T1
    top_TK, chosen_TK = logits_TE.softmax(-1).topk(moe.topk, dim=-1)
    return (top_TK / top_TK.sum(-1, keepdim=True) if moe.topk > 1 else top_TK), chosen_TK


@torch.no_grad()
def logits_of(weights: Layers, tokens_T: Tensor) -> Tensor:
    """Logits [T, V] of one sequence."""
    forward = Forward(weights, tokens_T)
    for layer in weights.layers():
        forward.advance(layer)
    return forward.logits_TV()
