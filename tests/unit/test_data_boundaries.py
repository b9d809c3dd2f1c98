"""Where documents end in a sample."""

from __future__ import annotations

import pytest
import torch

from megatron_skywork.data.boundaries import document_lengths

EOD = 9


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        ([1, 2, 3, 4], [4, 0, 0, 0]),
        ([1, EOD, 3, 4], [2, 2, 0, 0]),
        ([EOD, 2, EOD, 4], [1, 2, 1, 0]),
        ([1, 2, 3, EOD], [4, 0, 0, 0]),
        ([EOD, EOD, EOD, EOD], [1, 1, 1, 1]),
    ],
)
def test_lengths_of_documents(tokens: list[int], lengths: list[int]) -> None:
    found = document_lengths(torch.tensor(tokens), EOD)
    assert found.tolist() == lengths and found.dtype == torch.int32
