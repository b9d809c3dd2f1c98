"""Synthetic samples without files: for a first run, a benchmark, a test of a layout.

The tokens are a noisy cycle over few states. From state x the next token is (x + 7) mod n with probability 0.9 and uniform over the n
states otherwise, n = min(vocab_size, 64) made coprime to 7, so a model that learns it reaches a loss of about

    -(0.9 + 0.1/n) ln(0.9 + 0.1/n) - (1 - 0.9 - 0.1/n) ln(0.1/n)  =  0.73 nats   for n = 64,

far below the ln(vocab_size) of a fresh one. Every token is a function of (seed, sample index, position) by the mixing function of `order`, hence
the same on every machine, rank and restart. State 0 stands for the end of a document.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_skywork.data.boundaries import document_lengths
from megatron_skywork.data.order import derive_key, mix

MOCK_EOD_ID = 0
_STRIDE = 7
_FOLLOW = 0.9
_MAX_STATES = 64


class MockDataset(Dataset):
    """Endless samples of `seq_length` tokens.

    Args:
        vocab_size: ids are below it.
        seed: with the index, decides a sample.
        eod_mask_loss, reset_position_ids, reset_attention_mask: as for files; the end of a document is id 0.
    """

    def __init__(self, vocab_size: int, seq_length: int, seed: int, eod_mask_loss: bool = False, reset_position_ids: bool = False,
                 reset_attention_mask: bool = False):
        states = max(2, min(vocab_size, _MAX_STATES))
        self._states = states - 1 if states % _STRIDE == 0 else states
        self._seq_length, self._seed = seq_length, seed
        self._reset_position_ids, self._reset_attention_mask, self._eod_mask_loss = reset_position_ids, reset_attention_mask, eod_mask_loss

    def tokens(self, index: int) -> np.ndarray:
        """The seq_length + 1 token ids of sample `index`, int64."""
        positions: np.ndarray = np.arange(self._seq_length + 1, dtype=np.int64)
        noise = mix(positions.astype(np.uint64) + np.uint64(derive_key(self._seed, index)))
        fresh = (noise >> np.uint64(11)).astype(np.float64) / 2.0**53 >= _FOLLOW
        fresh[0] = True
        restart = np.maximum.accumulate(np.where(fresh, positions, 0))
        drawn = (mix(noise) % np.uint64(self._states)).astype(np.int64)
        return (drawn[restart] + _STRIDE * (positions - restart)) % self._states

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` >= 0 with the keys and shapes of a file's sample."""
        from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

        text = torch.from_numpy(self.tokens(index))
        tokens_S, labels_S = text[:-1].contiguous(), text[1:].contiguous()
        _, loss_mask_S, position_ids_S = _get_ltor_masks_and_position_ids(
            tokens_S, MOCK_EOD_ID, self._reset_position_ids, reset_attention_mask=False, eod_mask_loss=self._eod_mask_loss, create_attention_mask=False
        )
        sample = {"tokens": tokens_S, "labels": labels_S, "loss_mask": loss_mask_S, "position_ids": position_ids_S}
        return {**sample, "document_lengths": document_lengths(tokens_S, MOCK_EOD_ID)} if self._reset_attention_mask else sample
