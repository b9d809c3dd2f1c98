"""A dense Llama-type checkpoint made on the spot, and whether a mixture of experts holds its weights.

Both work on the bytes of safetensors files (8 bytes of length, a JSON header, the tensors), with numpy alone and a few matrices at a time, so that the
benchmark's own process stays small beside what it measures, and what it finds does not rest on the code under test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO

import numpy as np

INIT_STD = 0.02
SHARD_BYTES = 2 << 30
_BLOCK_NUMBERS = 8 << 20
_DENSE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# What an expert's three matrices are called: Mixtral's own names (Skywork-MoE's too), one name per expert, and all experts in one tensor.
_EXPERT_NAMES = {
    "experts.E.w1|w2|w3": {"gate": "block_sparse_moe.experts.{e}.w1.weight", "down": "block_sparse_moe.experts.{e}.w2.weight",
                           "up": "block_sparse_moe.experts.{e}.w3.weight"},
    "experts.E.*_proj": {"gate": "mlp.experts.{e}.gate_proj.weight", "up": "mlp.experts.{e}.up_proj.weight", "down": "mlp.experts.{e}.down_proj.weight"},
}  # fmt: skip
_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True)
class Shape:
    """A dense model: untied embeddings, no grouped queries, no biases."""

    hidden: int = 4608
    ffn: int = 12288
    heads: int = 36
    vocab: int = 65519
    layers: int = 2

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the files."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            for name in "qkvo":
                yield f"{prefix}self_attn.{name}_proj.weight", (self.hidden, self.hidden)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}mlp.{name}.weight", (self.ffn, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.ffn)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def num_bytes(self, num_experts: int = 1) -> int:
        """Bytes in bf16, with every feed-forward `num_experts` times (routers are not counted)."""
        return sum(2 * int(np.prod(shape)) * (num_experts if ".mlp." in name else 1) for name, shape in self.tensors())


def write_dense(folder: Path, shape: Shape, seed: int = 1) -> int:
    """Write config.json, a small tokenizer and random bf16 weights in shards; returns the bytes of the weights.

    Every number is drawn from 65536 quantiles of normal(0, 0.02): quickly made, and nothing that a disk could compress or share.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    normal = NormalDist(0.0, INIT_STD)
    quantiles = np.array([normal.inv_cdf((index + 0.5) / 65536) for index in range(65536)], dtype=np.float32)
    values = (quantiles.view(np.uint32) >> 16).astype(np.uint16)
    one = np.array([1.0], dtype=np.float32).view(np.uint32) >> 16
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in shape.tensors():
        num_bytes = 2 * int(np.prod(size))
        if filled and filled + num_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, size))
        filled += num_bytes
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({name: file for name, _ in shard})
        with open(folder / file, "wb") as stream:
            _write_header(stream, shard)
            for name, size in shard:
                _write_tensor(stream, int(np.prod(size)), one[0] if "norm" in name else None, values, generator)
    total = shape.num_bytes()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2), encoding="utf-8")
    for file, content in _tokenizer().items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return total


def _write_header(stream: BinaryIO, shard: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in shard:
        end = start + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(stream: BinaryIO, count: int, constant: int | None, values: np.ndarray, generator: np.random.Generator) -> None:
    for start in range(0, count, _BLOCK_NUMBERS):
        size = min(_BLOCK_NUMBERS, count - start)
        drawn = np.full(size, constant, dtype=np.uint16) if constant is not None else values[generator.integers(0, 65536, size, dtype=np.uint16)]
        stream.write(drawn.data)


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "initializer_range": INIT_STD, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _tokenizer() -> dict[str, Any]:
    """A tokenizer of three words: nothing is tokenized, but mergekit asks for one."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    special = [{"id": index, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for word, index in words.items()]  # fmt: skip
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    return {
        "tokenizer.json": {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
                           "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    }  # fmt: skip


class RawFolder:
    """The tensors of a folder's safetensors files as arrays of what is stored there, mapped and not copied."""

    def __init__(self, folder: Path):
        self._where: dict[str, tuple[Path, int, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    self._where[name] = path, 8 + length + start, end - start
                    self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), entry["dtype"]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def bits(self, name: str) -> np.ndarray:
        """The tensor's bytes, [number of bytes]."""
        path, offset, num_bytes = self._where[name]
        return np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(num_bytes,))

    def numbers(self, name: str) -> np.ndarray:
        """A BF16 or F32 tensor as float32, [elements]."""
        bits = np.array(self.bits(name))
        return bits.view(np.float32) if self.dtypes[name] == "F32" else (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def check_mixture(dense: Path, mixture: Path, shape: Shape, num_experts: int) -> dict[str, Any]:
    """Whether a Hugging Face mixture holds the dense model's weights, bit for bit.

    Returns:
        `expert_names` (which of the known ways, or None), `experts` and `experts_equal` (matrices looked at, and how many were the dense ones),
        `different` (the first names that were not), `others_equal` (every tensor outside the feed-forwards is there unchanged), `routers`: name, dtype,
        shape and standard deviation of each, and `unknown`: names that are none of these.
    """
    source, result = RawFolder(dense), RawFolder(mixture)
    style = next((name for name, names in _EXPERT_NAMES.items() if f"model.layers.0.{names['gate'].format(e=0)}" in result), None)
    style = style or ("one tensor for all experts" if f"model.layers.0.{_FUSED[0]}" in result else None)
    seen: set[str] = set()
    different: list[str] = []
    total = equal = 0
    for layer in range(shape.layers) if style else ():
        for kind in _DENSE:
            wanted = source.bits(f"model.layers.{layer}.mlp.{_DENSE[kind]}.weight")
            for expert in range(num_experts):
                name, found = _expert(result, style, f"model.layers.{layer}.", kind, expert, num_experts)
                seen.add(name)
                total += 1
                same = found is not None and np.array_equal(found, wanted)
                equal += same
                different += [] if same else [f"{name} (expert {expert}, {kind})"]
    others = [name for name in source if ".mlp." not in name]
    others_equal = all(name in result and np.array_equal(source.bits(name), result.bits(name)) for name in others)
    rest = sorted(set(result) - seen - set(others))
    routers = [{"name": name, "dtype": result.dtypes[name], "shape": list(result.shapes[name]), "std": round(float(result.numbers(name).std()), 5)}
               for name in rest if re.search(r"\.gate\.weight$", name)]  # fmt: skip
    unknown = [name for name in rest if name not in {router["name"] for router in routers}]
    return {"expert_names": style, "experts": total, "experts_equal": equal, "different": different[:4], "others_equal": others_equal, "routers": routers,
            "unknown": unknown[:8]}  # fmt: skip


def _expert(result: RawFolder, style: str | None, prefix: str, kind: str, expert: int, num_experts: int) -> tuple[str, np.ndarray | None]:
    """Name and bytes of one matrix of one expert; None where it is missing."""
    if style in _EXPERT_NAMES:
        name = prefix + _EXPERT_NAMES[style][kind].format(e=expert)
        return name, result.bits(name) if name in result else None
    name = prefix + _FUSED[kind == "down"]
    if name not in result:
        return name, None
    pieces = np.split(result.bits(name), num_experts if kind == "down" else 2 * num_experts)  # gate, up, gate, up, ...: [E, 2 F, H] row by row
    return name, pieces[expert if kind == "down" else 2 * expert + (kind == "up")]


def described(shape: Shape) -> dict[str, Any]:
    """The shape for a result in JSON."""
    return asdict(shape)
