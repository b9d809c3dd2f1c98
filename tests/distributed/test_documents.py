"""Documents kept apart, under every layout: the losses of one rank that computes with an explicit mask.

The vocabulary is small, so that every sample holds several documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from training_bodies import BASE, losses, merged, records, save_initial, train

APART = {
    "model": {"vocab_size": 8, "num_query_groups": 2},
    "data": {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True},
    "train": {"stop_at_step": 5, "eval_every": 5, "eval_samples": 3},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batches of four": (1, {"train": {"micro_batch_size": 4}}),
    "tp2": (2, {"parallel": {"tp": 2}}),
    "full recomputation": (1, {"parallel": {"recompute": "full"}}),
    "recomputed core attention, micro-batches of two": (
        1,
        {"parallel": {"recompute": "selective", "recompute_modules": ["core_attn"]}, "train": {"micro_batch_size": 2}},
    ),
    "tp2-pp2, full recomputation": (4, {"parallel": {"tp": 2, "pp": 2, "recompute": "full"}}),
    "pp2 interleaved": (2, {"parallel": {"pp": 2, "vpp": 2}}),
}


def train_with_a_mask(settings: dict[str, Any]) -> None:
    """`train`, with attention through a mask of sequence x sequence made from the lengths."""
    import torch

    from megatron_skywork.model import attention

    def masked(query_SBND, key_SBGD, value_SBGD, documents, dropout, scale):
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBND, key_SBGD, value_SBGD))
        document_BS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents.lengths])
        seen_B1SS = (document_BS[:, :, None] == document_BS[:, None, :]).tril()[:, None]
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~seen_B1SS, -torch.inf)
        return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)

    original, attention.document_attention = attention.document_attention, masked
    try:
        train(settings)
    finally:
        attention.document_attention = original


@pytest.fixture(scope="module")
def start(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that every layout starts from, the losses of a run with a mask, and of one that sees across documents."""
    folder = tmp_path_factory.mktemp("documents")
    ranks.run(1, save_initial, merged(BASE, APART, {"run_dir": str(folder / "initial")}))
    ranks.run(1, train_with_a_mask, _settings(folder, "masked"))
    ranks.run(1, train, _settings(folder, "across", {"data": {"reset_attention_mask": False, "reset_position_ids": False}}))
    return folder


def _settings(folder: Path, name: str, *more: dict[str, Any]) -> dict[str, Any]:
    initial = folder / "initial" / "checkpoints" / "step_00000000"
    return merged(BASE, APART, {"run_dir": str(folder / name), "checkpoint": {"init_from": str(initial), "save_at_end": False}}, *more)


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_do_not_see_each_other(ranks: RankPool, start: Path, name: str) -> None:
    world_size, more = LAYOUTS[name]
    ranks.run(world_size, train, _settings(start, name, more))
    found, expected, across = losses(start / name), losses(start / "masked"), losses(start / "across")
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and found[0] != pytest.approx(across[0], rel=1e-4)
    assert len(found) == 5 and found == pytest.approx(expected, rel=1e-4)
    mine, theirs = (records(start / run, "eval")[-1] for run in (name, "masked"))
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
