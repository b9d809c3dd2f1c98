"""What a checkpoint says of the data: by content, and how far in each source."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import data_config
from numbered_data import write_numbered

from megatron_skywork.data.datasets import build_train_dataset
from megatron_skywork.data.identity import blend_position, data_identity
from megatron_skywork.data.order import SampleOrder
from megatron_skywork.errors import DataError


def test_the_position_is_what_the_order_reads(tmp_path: Path) -> None:
    """Counted one by one, through epochs that end at different times."""
    sizes, weights = [7, 5, 3], [0.5, 0.3, 0.2]
    sources = [{"path": write_numbered(tmp_path / f"d{size}", size, 8), "weight": weight} for size, weight in zip(sizes, weights, strict=True)]
    config = data_config(tmp_path, {"train": sources, "seq_length": 8})
    data = data_identity(config)
    assert [len(dataset) for dataset in build_train_dataset(config).datasets] == sizes  # type: ignore[attr-defined]
    order = SampleOrder(sizes, weights, seed=5)
    for samples in range(60):
        dataset_N, _ = order.locate(range(samples))
        expected = [divmod(int((dataset_N == number).sum()), size) for number, size in enumerate(sizes)]
        assert [(place["epochs"], place["samples"]) for place in blend_position(data, 8, samples)] == expected
    assert blend_position(data, 8, 10**12)[0]["epochs"] == 5 * 10**11 // 7


def test_the_identity_follows_the_content_and_not_the_path(tmp_path: Path) -> None:
    def identity(*prefixes: str, weight: float = 1.0) -> dict:
        return data_identity(data_config(tmp_path, {"train": [{"path": prefix, "weight": weight} for prefix in prefixes], "seq_length": 8}))

    one, same = write_numbered(tmp_path / "one", 7, 8), write_numbered(tmp_path / "two", 7, 8)
    other, tokenized = write_numbered(tmp_path / "other", 7, 8, first=1), write_numbered(tmp_path / "tok", 7, 8, tokenizer="u")
    assert identity(one) == identity(same)
    assert identity(one)["train"] != identity(other)["train"] and identity(one)["train"] != identity(one, weight=0.5)["train"]
    assert identity(one)["tokenizer"] == "t" * 64 and identity(tokenized)["tokenizer"] == "u" * 64
    assert identity(one, other)["train"] == identity(one)["train"] + identity(other)["train"]
    with pytest.raises(DataError, match="nowhere"):
        identity(str(tmp_path / "nowhere"))


def test_mock_data_have_no_identity(tmp_path: Path) -> None:
    data = data_identity(data_config(tmp_path, {"mock": True, "seq_length": 8}))
    assert data == {"tokenizer": None, "train": None} and blend_position(data, 8, 5) == []
