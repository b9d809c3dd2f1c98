"""Synthetic samples: the same everywhere, and worth learning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_skywork.data.mock import MOCK_EOD_ID, MockDataset


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    first, again, other = MockDataset(1000, 64, 1), MockDataset(1000, 64, 1), MockDataset(1000, 64, 2)
    assert (first.tokens(5) == again.tokens(5)).all()
    assert (first.tokens(5) != first.tokens(6)).any() and (first.tokens(5) != other.tokens(5)).any()
    # a longer sample begins like a shorter one
    assert (MockDataset(1000, 200, 1).tokens(5)[:65] == first.tokens(5)).all()
    assert first.tokens(2**42).shape == (65,)


@pytest.mark.parametrize("vocab_size", [2, 5, 7, 14, 64, 70, 50_000])
def test_tokens_stay_inside_the_vocabulary_and_use_it(vocab_size: int) -> None:
    tokens = np.concatenate([MockDataset(vocab_size, 512, 3).tokens(index) for index in range(20)])
    assert tokens.min() == 0 and tokens.max() < min(vocab_size, 64)
    assert len(np.unique(tokens)) >= min(vocab_size - 1, 63)


def test_the_next_token_can_be_learned() -> None:
    """Counting which token follows which reaches the loss the module promises, far below that of guessing by frequency."""
    dataset = MockDataset(50_000, 4096, 9)
    counts = np.full((64, 64), 1e-3)
    for index in range(100):
        tokens = dataset.tokens(index)
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    log_probs = np.log(counts / counts.sum(1, keepdims=True))
    held_out = dataset.tokens(1000)
    loss = -log_probs[held_out[:-1], held_out[1:]].mean()
    frequencies = counts.sum(0) / counts.sum()
    assert loss == pytest.approx(0.73, abs=0.08)
    assert -(frequencies * np.log(frequencies)).sum() > 4.0


def test_labels_are_the_next_tokens_and_documents_have_boundaries() -> None:
    plain = MockDataset(100, 256, 3)[0]
    assert set(plain) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert torch.equal(plain["tokens"][1:], plain["labels"][:-1])
    assert plain["loss_mask"].sum() == 256 and torch.equal(plain["position_ids"], torch.arange(256))
    sample = MockDataset(100, 256, 3, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)[0]
    ends = (sample["tokens"] == MOCK_EOD_ID).nonzero().flatten()
    assert len(ends) > 1
    assert (sample["loss_mask"][ends] == 0).all() and sample["loss_mask"].sum() == 256 - len(ends)
    assert (sample["position_ids"][ends[:-1] + 1] == 0).all()
    lengths = sample["document_lengths"]
    assert lengths.shape == (256,) and lengths.sum() == 256 and set(sample) == {*plain, "document_lengths"}
    assert torch.equal(lengths.cumsum(0)[: len(ends)] - 1, ends)
