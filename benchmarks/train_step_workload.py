"""What every contender of benchmarks/train_step.py is given: a shape, a precision, the same tokens; and what the work amounts to, without torch.

Expected memory is what weights, gradients and optimizer hold, which is exact, and a rough count of what a forward pass keeps for its backward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import ValidationError

from megatron_skywork.config.load import check_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.parameters import count_parameters


@dataclass(frozen=True)
class Shape:
    """A model and what it sees in a step; the names are those of the options."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    experts: int
    topk: int
    vocab: int
    seq_length: int
    micro_batch: int
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_length * self.micro_batch * self.micro_batches


# train_step_contenders.py says who they are.
NAMES = ("skywork-on", "skywork-off", "skywork-te", "core-local", "core-te", "hf", "hf-eager", "hf-pure")
LEARNING_RATE = 1e-4
NOT_BALANCED = ("hf", "hf-eager", "hf-pure")
ONLY_BF16 = ("hf-pure",)
DIMENSIONS = [field.name for field in fields(Shape)]

SHAPES = {
    # Seconds for the tests.
    "tiny": Shape(hidden=64, ffn=176, layers=2, heads=4, experts=4, topk=2, vocab=512, seq_length=64, micro_batch=2),
    # The proportions of Skywork-MoE (FFN 2.67 times the hidden size, top-2), a step of a few seconds on two cores.
    "cpu": Shape(hidden=512, ffn=1408, layers=4, heads=8, experts=8, topk=2, vocab=8192, seq_length=1024, micro_batch=2),
    "cpu_wide": Shape(hidden=1024, ffn=2816, layers=2, heads=16, experts=8, topk=2, vocab=8192, seq_length=1024, micro_batch=2),
    # One layer of Skywork-MoE. With weights, gradients and moments it takes 49 GB, so one GPU of 80 GB holds one; the vocabulary is small so that
    # the layer is what is measured (65536 for the report's). The report has 120 micro-batches a step; 8 keep the optimizer from being what is measured.
    "skywork_layer": Shape(hidden=4608, ffn=12288, layers=1, heads=36, experts=16, topk=2, vocab=8192, seq_length=8192, micro_batch=1, micro_batches=8),
}


@dataclass(frozen=True)
class Workload:
    """What is run."""

    shape: Shape
    precision: str
    seed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Workload:
        return cls(Shape(**values["shape"]), values["precision"], values["seed"])


def make_config(work: Workload, *, features: bool, backend: str = "torch") -> Config:
    """The workload in this framework's settings.

    Args:
        features: everything the Skywork-MoE report adds (normalized gate, equation 4, adaptive coefficients, capacity 1.1 with dropping) and the router's
            record in every step; else a plain top-k router that drops nothing, without auxiliary loss and without record.
        backend: torch or te.

    Raises:
        ConfigError: the shape is impossible.
    """
    shape = work.shape
    plain: dict[str, Any] = {"aux_loss": "none", "gate_norm": False}
    routing = {"aux_loss": "report", "capacity_factor": 1.1, "adaptive": {"enabled": True}} if features else plain
    values = {
        "model": {
            "num_layers": shape.layers, "hidden_size": shape.hidden, "ffn_hidden_size": shape.ffn, "num_attention_heads": shape.heads,
            "vocab_size": shape.vocab, "max_position_embeddings": shape.seq_length, "backend": backend,
        },
        "moe": {"num_experts": shape.experts, "topk": shape.topk, **routing},
        "data": {"mock": True, "seq_length": shape.seq_length},
        "optim": {"lr": LEARNING_RATE, "schedule": "constant"},
        "train": {
            "steps": 1_000_000, "global_batch_size": shape.micro_batch * shape.micro_batches, "micro_batch_size": shape.micro_batch,
            "precision": work.precision, "seed": work.seed,
        },
        "metrics": {"router": features},
    }  # fmt: skip
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([problem["msg"].removeprefix("Value error, ") for problem in error.errors()]) from error
    check_config(config, 1)
    return config


# Bytes per parameter of weights, gradients, master weights and two moments.
_MIXED, _PLAIN, _PURE = 2 + 4 + 4 + 8, 4 + 4 + 8, 2 + 2 + 4
# transformers under autocast: fp32 weights, and the bf16 copies autocast keeps during forward and backward.
_AUTOCAST = 4 + 4 + 8 + 2


def expected_bytes(work: Workload, contender: str) -> int:
    """What a contender will hold at its peak, roughly: between half and twice of it was seen."""
    shape, half = work.shape, work.precision == "bf16"
    per_parameter = _PLAIN if not half else _PURE if contender == "hf-pure" else _AUTOCAST if contender in NOT_BALANCED else _MIXED
    weights = count_parameters(make_config(work, features=False)).padded_total * per_parameter
    width = 2 if half else 4
    tokens = shape.seq_length * shape.micro_batch
    kept = shape.layers * (12 * shape.hidden + shape.topk * (4 * shape.ffn + 3 * shape.hidden)) * width + 3 * 4 * shape.vocab
    scores = 3 * width * shape.layers * shape.heads * shape.seq_length if contender == "core-local" else 0
    return weights + tokens * (kept + scores)
