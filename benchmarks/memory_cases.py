"""The settings whose memory benchmarks/memory.py measures: one base, and what each case changes, so that every kind of byte is moved by some case."""

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


def settings(name: str) -> dict[str, Any]:
    """The base with a case laid over it, section by section."""
    result: dict[str, Any] = {section: dict(fields) for section, fields in BASE.items()}
    for section, fields in CASES[name].items():
        result[section] = fields if fields is None else {**result.get(section, {}), **fields}
    return result
