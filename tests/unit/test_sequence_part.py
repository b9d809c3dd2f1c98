"""What a context-parallel rank reads: together the ranks see every token once, in the order that rotary positions are cut in."""

from __future__ import annotations

import pytest
import torch

from megatron_skywork.parallel import sequence_part


def test_ranks_share_a_sequence_early_with_late() -> None:
    tokens_BS = torch.arange(16).reshape(2, 8)
    parts = [sequence_part(tokens_BS, rank, 2) for rank in range(2)]
    assert parts[0].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]] and parts[1].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]


def test_it_is_the_cut_of_the_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    class Group:
        def __init__(self, rank: int):
            self._rank = rank

        def size(self) -> int:
            return 3

        def rank(self) -> int:
            return self._rank

    create = torch.tensor
    # megatron-core pins the indices of the parts, which only a machine with a GPU can.
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **kwargs: create(*args, **kwargs))
    positions_S = torch.arange(12)
    for rank in range(3):
        embedded = get_pos_emb_on_this_cp_rank(positions_S.reshape(12, 1, 1, 1), 0, Group(rank))
        assert embedded.flatten().tolist() == sequence_part(positions_S.reshape(1, 12), rank, 3).flatten().tolist()
