"""What other families' models compute, trained under several layouts: the gated shared expert above all, whose gate is whole on every rank and sees a part
of the sequence on each; plain top-k probabilities and Llama 3.1's rotary scaling with it. The losses and the trained gate are those of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import RankPool
from torch.distributed import checkpoint as dcp
from training_bodies import BASE, losses, merged, save_initial, train

FAMILY = merged(BASE, {
    "model": {"qkv_bias": True, "rope_scaling_factor": 8.0, "rope_theta": 500000.0},
    "moe": {"shared_expert_ffn_hidden_size": 16, "shared_expert_gate": True, "pre_softmax": True, "gate_norm": False},
    "train": {"steps": 6},
})  # fmt: skip
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "tp4-ep4": (4, {"tp": 4, "ep": 4}),
    "tp2-etp2, shared expert recomputed": (2, {"tp": 2, "etp": 2, "recompute": "selective", "recompute_modules": ["shared_experts"]}),
}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _settings(folder: Path, name: str, parallel: dict) -> dict:
    initial = folder / "initial" / "checkpoints" / "step_00000000"
    return merged(FAMILY, {"run_dir": str(folder / name), "parallel": parallel, "checkpoint": {"init_from": str(initial), "save_at_end": True}})


def _gates(folder: Path, step: int) -> list[torch.Tensor]:
    """The shared experts' gates in a checkpoint, whole, layer by layer."""
    content = {f"decoder.layers.{layer}.mlp.shared_experts.gate_weight": torch.full((1, 32), float("nan")) for layer in range(4)}
    dcp.load(content, checkpoint_id=str(folder / "checkpoints" / f"step_{step:08d}"), no_dist=True)
    return list(content.values())


@pytest.fixture(scope="module")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    ranks.run(1, save_initial, merged(FAMILY, {"run_dir": str(folder / "initial")}))
    ranks.run(1, train, _settings(folder, "reference", {}))
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_the_same_gate(ranks: RankPool, start: Path, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    ranks.run(world_size, train, _settings(start, name, parallel))
    found, expected = losses(start / name), losses(start / "reference")
    assert len(found) == 6 and found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-4)
    before = _gates(start / "initial", 0)
    for first, mine, theirs in zip(before, _gates(start / name, 6), _gates(start / "reference", 6), strict=True):
        assert float((theirs - first).abs().max()) > 1e-3, "the gate must have learned something"
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


def test_fresh_gates_are_the_same_under_every_layout(ranks: RankPool, start: Path) -> None:
    """Drawn from the generator that all tensor-parallel ranks share: a gate that differed between them would be saved from one and used by all."""
    ranks.run(2, save_initial, merged(FAMILY, {"run_dir": str(start / "fresh"), "parallel": {"tp": 2}}))
    ranks.run(2, _same_on_all_ranks, merged(FAMILY, {"run_dir": str(start / "ranks"), "parallel": {"tp": 2}}))
    for mine, theirs in zip(_gates(start / "fresh", 0), _gates(start / "initial", 0), strict=True):
        assert float(mine.std()) == pytest.approx(0.02, rel=0.5) and float(theirs.std()) == pytest.approx(0.02, rel=0.5)


def _same_on_all_ranks(settings: dict) -> None:
    from training_bodies import release

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config
    from megatron_skywork.train.training import Training

    config = Config(**settings)
    training = Training(config, parallel.start(config))
    gates = [value for name, value in training.chunks[0].named_parameters() if name.endswith("shared_experts.gate_weight")]
    assert len(gates) == 4
    for gate in gates:
        assert gate.shape == (1, 32) and gate.sequence_parallel
        largest, smallest = gate.detach().clone(), gate.detach().clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        assert torch.equal(largest, smallest)
    release(training)
