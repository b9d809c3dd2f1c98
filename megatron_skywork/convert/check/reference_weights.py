"""A checkpoint's weights as the yardstick (`reference`) wants them: one matrix at a time, in the precision it computes in, never a layer as a whole.

`HfLayers` reads a Hugging Face folder by its names, dense or a mixture of any naming, `OurLayers` a folder of ours by our names. Both are written out here
without the weight table and without its layouts, so that an error there does not hide here.

Shape letters: T tokens, H hidden, D head width, F ffn, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_skywork.config.schema import Model, Moe

Tensor = torch.Tensor
# A matrix that is read when it is called for, so that it can be dropped before the next one is read.
Read = Callable[[], Tensor]
VOCABULARY_ROWS = 4096


@dataclass(frozen=True)
class FeedForward:
    """A SwiGLU's matrices: gate [F, H], up [F, H], down [H, F]."""

    gate: Read
    up: Read
    down: Read


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. `bias` and `norms` (query, key) where the model has them; a dense layer has no router, and one expert, number 0.

    `query_key_value` gives the three projections; `shared_gate_1H` multiplies the shared expert where the model has such a gate.
    """

    attention_norm_H: Tensor
    query_key_value: Callable[[], tuple[Tensor, Tensor, Tensor]]
    bias: tuple[Tensor, Tensor, Tensor] | None
    norms: tuple[Tensor, Tensor] | None
    proj: Read
    ffn_norm_H: Tensor
    router_EH: Tensor | None
    expert: Callable[[int], FeedForward]
    shared: FeedForward | None = None
    shared_gate_1H: Tensor | None = None


class Layers(Protocol):
    """A checkpoint, layer by layer."""

    @property
    def model(self) -> Model: ...
    @property
    def moe(self) -> Moe | None: ...
    def embed(self, tokens_T: Tensor) -> Tensor: ...
    def layers(self) -> Iterator[Layer]: ...
    def final_norm(self) -> Tensor: ...
    def output_rows(self) -> Iterator[Tensor]: ...


class Tensors(Protocol):
    """What a view needs of a reader."""

    def read(self, name: str) -> Tensor: ...


class Boxes(Protocol):
    """The same of one that can read parts of a tensor."""

    @property
    def tensors(self) -> dict: ...
    def read(self, key: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor: ...


class HfLayers:
    """A Hugging Face folder with LLaMA's names, and for a mixture those of `naming`.

    Args:
        naming: skywork_moe or mixtral (`block_sparse_moe`, w1 w3 w2), qwen2_moe or qwen3_moe (`mlp`, gate_proj up_proj down_proj).
    """

    def __init__(self, reader: Tensors, model: Model, dtype: torch.dtype = torch.float32, moe: Moe | None = None, naming: str = "skywork_moe"):
        self.model, self.moe, self._reader, self._dtype = model, moe, reader, dtype
        self._qwen = naming in ("qwen2_moe", "qwen3_moe")

    def _get(self, name: str) -> Tensor:
        return self._reader.read(name).to(self._dtype)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Rows of the embedding, [T, H]."""
        return self._reader.read("model.embed_tokens.weight")[tokens_T].to(self._dtype)

    def final_norm(self) -> Tensor:
        """Weight of the norm before the output layer, [H]."""
        return self._get("model.norm.weight")

    def output_rows(self) -> Iterator[Tensor]:
        """The output layer, `VOCABULARY_ROWS` tokens at a time."""
        stored_VH = self._reader.read("model.embed_tokens.weight" if self.model.tie_embeddings else "lm_head.weight")
        return (rows.to(self._dtype) for rows in stored_VH.split(VOCABULARY_ROWS))

    def layers(self) -> Iterator[Layer]:
        """Every layer, from the first."""
        for index in range(self.model.num_layers):
            yield self._layer(index, f"model.layers.{index}.")

    def _layer(self, index: int, at: str) -> Layer:
        def three(kind: str) -> tuple[Tensor, Tensor, Tensor]:
            return self._get(f"{at}self_attn.q_proj.{kind}"), self._get(f"{at}self_attn.k_proj.{kind}"), self._get(f"{at}self_attn.v_proj.{kind}")

        moe = self.moe if is_mixture(index, self.moe) else None
        block = at + ("mlp." if self._qwen else "block_sparse_moe.")
        shared = moe is not None and moe.shared_expert_ffn_hidden_size is not None
        return Layer(
            attention_norm_H=self._get(at + "input_layernorm.weight"),
            query_key_value=lambda: three("weight"),
            bias=three("bias") if self.model.qkv_bias else None,
            norms=(self._get(at + "self_attn.q_norm.weight"), self._get(at + "self_attn.k_norm.weight")) if self.model.qk_norm else None,
            proj=lambda: self._get(at + "self_attn.o_proj.weight"),
            ffn_norm_H=self._get(at + "post_attention_layernorm.weight"),
            router_EH=self._get(block + "gate.weight") if moe is not None else None,
            expert=(lambda number: self._ffn(f"{block}experts.{number}.", self._qwen)) if moe is not None else (lambda number: self._ffn(at + "mlp.", True)),
            shared=self._ffn(block + "shared_expert.", self._qwen) if shared else None,
            shared_gate_1H=self._get(block + "shared_expert_gate.weight") if moe is not None and moe.shared_expert_gate else None,
        )

    def _ffn(self, at: str, long_names: bool) -> FeedForward:
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if long_names else ("w1", "w3", "w2")
        return FeedForward(lambda: self._get(f"{at}{gate}.weight"), lambda: self._get(f"{at}{up}.weight"), lambda: self._get(f"{at}{down}.weight"))


class OurLayers:
    """A folder of ours, dense or mixture."""

    def __init__(self, reader: Boxes, model: Model, moe: Moe | None, dtype: torch.dtype = torch.float32):
        self.model, self.moe, self._reader, self._dtype = model, moe, reader, dtype

    def _get(self, name: str) -> Tensor:
        return self._reader.read(name).to(self._dtype)

    def _box(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return self._reader.read(name, offset, shape).to(self._dtype)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Rows of the embedding, [T, H]."""
        return self._reader.read("embedding.word_embeddings.weight")[tokens_T].to(self._dtype)

    def final_norm(self) -> Tensor:
        """Weight of the norm before the output layer, [H]."""
        return self._get("decoder.final_layernorm.weight")

    def output_rows(self) -> Iterator[Tensor]:
        """The output layer without its padding, `VOCABULARY_ROWS` tokens at a time."""
        name = "embedding.word_embeddings.weight" if self.model.tie_embeddings else "output_layer.weight"
        stored_VH = self._reader.read(name)[: self.model.vocab_size]
        return (rows.to(self._dtype) for rows in stored_VH.split(VOCABULARY_ROWS))

    def layers(self) -> Iterator[Layer]:
        """Every layer, from the first."""
        for index in range(self.model.num_layers):
            yield self._layer(index, f"decoder.layers.{index}.")

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

    def _layer(self, index: int, at: str) -> Layer:
        moe = self.moe if is_mixture(index, self.moe) else None
        attention = at + "self_attention."
        shared = moe is not None and moe.shared_expert_ffn_hidden_size is not None
        return Layer(
            attention_norm_H=self._get(attention + "linear_qkv.layer_norm_weight"),
            query_key_value=lambda: self._split_qkv(self._get(attention + "linear_qkv.weight")),
            bias=self._split_qkv(self._get(attention + "linear_qkv.bias")) if self.model.qkv_bias else None,
            norms=(self._get(attention + "q_layernorm.weight"), self._get(attention + "k_layernorm.weight")) if self.model.qk_norm else None,
            proj=lambda: self._get(attention + "linear_proj.weight"),
            ffn_norm_H=self._get(at + ("mlp.linear_fc1.layer_norm_weight" if moe is None else "pre_mlp_layernorm.weight")),
            router_EH=self._get(at + "mlp.router.weight") if moe is not None else None,
            expert=(lambda number: self._expert(at + "mlp.experts.experts.", number)) if moe is not None else (lambda number: self._ffn(at + "mlp.")),
            shared=self._ffn(at + "mlp.shared_experts.") if shared else None,
            shared_gate_1H=self._get(at + "mlp.shared_experts.gate_weight") if moe is not None and moe.shared_expert_gate else None,
        )

    def _ffn(self, at: str) -> FeedForward:
        """Gate rows, then up rows, in one tensor [2 F, H]; the second one [H, F]."""
        name = at + "linear_fc1.weight"
        double, hidden = self._reader.tensors[name].shape
        half = (double // 2, hidden)
        return FeedForward(
            lambda: self._box(name, (0, 0), half), lambda: self._box(name, (double // 2, 0), half), lambda: self._get(at + "linear_fc2.weight")
        )

    def _expert(self, at: str, number: int) -> FeedForward:
        """The same with the expert's number as first axis."""
        one, two = at + "linear_fc1.weight", at + "linear_fc2.weight"
        _, double, hidden = self._reader.tensors[one].shape
        half = (1, double // 2, hidden)
        return FeedForward(
            lambda: self._box(one, (number, 0, 0), half)[0],
            lambda: self._box(one, (number, double // 2, 0), half)[0],
            lambda: self._box(two, (number, 0, 0), (1, hidden, double // 2))[0],
        )


def is_mixture(index: int, moe: Moe | None) -> bool:
    """Whether the layer of this index is a mixture of experts."""
    return moe is not None and (moe.layers is None or index in moe.layers)
