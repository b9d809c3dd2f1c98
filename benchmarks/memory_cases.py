"""The settings whose memory benchmarks/memory.py measures: one base, and what each case changes, so that every kind of byte is moved by some case.

CASES are for one GPU. LAYOUTS are small models on one to four CPU ranks, whose every allocation is traced; large enough that activations outweigh Python's
odds and ends.
"""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16, "vocab_size": 32768, "max_position_embeddings": 8192,
        "backend": "torch",
    },
    "moe": {"num_experts": 8, "topk": 2, "aux_loss": "report", "capacity_factor": None},
    "data": {"mock": True, "seq_length": 4096, "num_workers": 0},
    "optim": {"lr": 1e-4, "schedule": "constant"},
    "train": {"steps": 1000, "global_batch_size": 2, "micro_batch_size": 1, "precision": "bf16"},
    "metrics": {"router": True},
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "dense": {"moe": None},
    "grouped queries": {"model": {"num_query_groups": 4}},
    "dropping at capacity 1.0": {"moe": {"capacity_factor": 1.0}},
    "padded to capacity 1.0": {"moe": {"capacity_factor": 1.0, "pad_to_capacity": True}},
    "16 narrow experts top-4": {"moe": {"num_experts": 16, "topk": 4, "ffn_hidden_size": 704}},
    "shared expert": {"moe": {"shared_expert_ffn_hidden_size": 1408}},
    "8 layers": {"model": {"num_layers": 8}},
    "micro-batch 2": {"train": {"global_batch_size": 4, "micro_batch_size": 2}},
    "sequence 8192": {"data": {"seq_length": 8192}},
    "recompute full": {"parallel": {"recompute": "full"}},
    "recompute 2 layers of 4": {"parallel": {"recompute": "full", "recompute_layers": 2}},
    "recompute norms and MoE": {"parallel": {"recompute": "selective", "recompute_modules": ["layernorm", "moe"]}},
    "logits not kept": {"train": {"keep_logits": False}},
    "tied embeddings": {"model": {"tie_embeddings": True}},
    "bf16 moments": {"optim": {"moments": "bf16"}},
    "fp32": {"train": {"precision": "fp32"}},
    "vocabulary 131072": {"model": {"vocab_size": 131072}},
}


LAYOUT_BASE: dict[str, Any] = {
    "model": {
        "num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1024, "max_position_embeddings": 512,
        "backend": "torch",
    },
    "moe": {"num_experts": 8, "topk": 2, "aux_loss": "report"},
    "data": {"mock": True, "seq_length": 512, "num_workers": 0},
    "optim": {"schedule": "constant"},
    "train": {"steps": 1000, "global_batch_size": 2, "micro_batch_size": 1, "precision": "bf16"},
}  # fmt: skip


def _laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with others laid over them, section by section; a section that is None is left out."""
    result: dict[str, Any] = {section: dict(fields) for section, fields in base.items()}
    for section, fields in changes.items():
        result[section] = fields if fields is None else {**result.get(section, {}), **fields}
    return result


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute": "selective", "recompute_modules": list(modules)}


_DENSE = {"moe": None}
_SHARED = {"shared_expert_ffn_hidden_size": 512, "shared_expert_gate": True}
_FOUR = {"model": {"num_layers": 4}, "train": {"global_batch_size": 8}}

# Ranks, and what is changed.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dropless": (1, {}),
    "dense": (1, _DENSE),
    "fp32": (1, {"train": {"precision": "fp32"}}),
    "grouped queries with norms and biases": (1, {"model": {"num_query_groups": 2, "qk_norm": True, "qkv_bias": True}}),
    "shared expert": (1, {"moe": _SHARED}),
    "top-1 with dropout": (1, {"moe": {"topk": 1, "z_loss_coefficient": 0.01}, "model": {"hidden_dropout": 0.1}}),
    "every other layer dropping": (1, {"moe": {"layers": [1], "capacity_factor": 1.0}}),
    "padded": (1, {"moe": {"capacity_factor": 1.5, "pad_to_capacity": True}}),
    "full recomputation": (1, {"parallel": {"recompute": "full"}}),
    "one layer recomputed": (1, {"parallel": {"recompute": "full", "recompute_layers": 1}}),
    "experts and norms recomputed": (1, {"parallel": _selective("moe", "layernorm")}),
    "other modules recomputed": (1, {"moe": _SHARED, "parallel": _selective("core_attn", "shared_experts", "router")}),
    "dense feed-forward recomputed": (1, {**_DENSE, "parallel": _selective("mlp")}),
    "large vocabulary": (1, {"model": {"vocab_size": 8192}}),
    "logits not kept": (1, {"model": {"vocab_size": 8192}, "train": {"keep_logits": False}}),
    "tied embeddings": (1, {"model": {"tie_embeddings": True}}),
    "many experts for few tokens": (1, {"moe": {"num_experts": 32}, "data": {"seq_length": 64}}),
    "bf16 moments": (2, {"optim": {"moments": "bf16"}}),
    "tp dense": (2, {**_DENSE, "parallel": {"tp": 2}}),
    "tp ep": (2, {"moe": _SHARED, "parallel": {"tp": 2, "ep": 2}}),
    "tp etp": (2, {"parallel": {"tp": 2, "etp": 2}}),
    "ep padded": (2, {"moe": {"capacity_factor": 1.25, "pad_to_capacity": True}, "parallel": {"ep": 2}}),
    "ep by allgather": (2, {"moe": {"dispatcher": "allgather"}, "parallel": {"ep": 2}}),
    "pp tied": (2, _laid_over(_FOUR, {"model": {"tie_embeddings": True}, "parallel": {"pp": 2}})),
    "pp recomputed": (2, _laid_over(_FOUR, {"parallel": {"pp": 2, "recompute": "full", "recompute_layers": [1, 0]}})),
    "pp large vocabulary": (2, {**_DENSE, "model": {"vocab_size": 32768}, "parallel": {"pp": 2, "recompute": "full"}}),
    "interleaved": (2, _laid_over(_FOUR, {"parallel": {"pp": 2, "vpp": 2}})),
    "pp tp ep": (4, _laid_over(_FOUR, {"parallel": {"pp": 2, "tp": 2, "ep": 2}})),
}  # fmt: skip


def settings(name: str) -> dict[str, Any]:
    """The base with a case laid over it."""
    return _laid_over(BASE, CASES[name])


def layout_settings(name: str, scale: int = 1) -> tuple[int, dict[str, Any]]:
    """Ranks and settings of a layout.

    Args:
        scale: how many times as wide, and as many tokens long.
    """
    world, changes = LAYOUTS[name]
    result = _laid_over(LAYOUT_BASE, changes)
    for section, field in (("model", "hidden_size"), ("model", "ffn_hidden_size"), ("model", "max_position_embeddings"), ("data", "seq_length")):
        result[section][field] *= scale
    return world, result
