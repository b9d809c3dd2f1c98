"""The dataset on disk as it is written; `test_data_verification` damages it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_bpe_folder, make_dataset, sentences

from megatron_skywork.data.file_lock import exclusive
from megatron_skywork.data.indexed import IndexedWriter, SideFile, paths_of, read_side_file
from megatron_skywork.data.tokenizers import load_tokenizer
from megatron_skywork.data.verification import check_dataset, verify_content


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("indexed")
    return make_dataset(folder, "set", make_bpe_folder(folder / "tokenizer"), count=30)


def test_megatron_core_reads_what_was_written(original: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_tokenizer(Path(original).parent / "tokenizer")
    dataset, side = IndexedDataset(original), read_side_file(original)
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in sentences(30)]
    assert [dataset[number].tolist() for number in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == list(range(31))
    assert side.num_documents == side.num_sequences == 30
    assert side.num_tokens == sum(map(len, expected))
    assert side.largest_token_id == max(map(max, expected))
    assert (side.dtype, side.eod_id, side.vocab_size, side.tokenizer_fingerprint) == ("uint16", 1, tokenizer.vocab_size, tokenizer.fingerprint)
    assert (side.bin_bytes, side.idx_bytes) == tuple(paths_of(original)[kind].stat().st_size for kind in ("bin", "idx"))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    writer = IndexedWriter(str(tmp_path / "a"), vocab_size)
    writer.add(np.array([1, 65498, 2], dtype=np.int32), np.array([2, 1]))
    side = writer.finish({"tokenizer_name": "t", "tokenizer_fingerprint": "f", "vocab_size": vocab_size, "eod_id": None}, [], {}, {})
    assert not paths_of(str(tmp_path / "a"))["json"].exists()
    writer.publish()
    assert side.dtype == dtype
    assert check_dataset(str(tmp_path / "a"), vocab_size) == side
    assert verify_content(str(tmp_path / "a")) == side
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_the_files_are_those_of_megatron_cores_builder(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    documents = [[1, 2, 3], [65498], [5] * 7, [0, 9]]
    ours = IndexedWriter(str(tmp_path / "ours"), vocab_size)
    for part in (documents[:3], [], documents[3:]):
        ours.add(np.array(sum(part, []), dtype=np.int32), np.array([len(document) for document in part], dtype=np.int64))
    ours.finish({"tokenizer_name": "t", "tokenizer_fingerprint": "f", "vocab_size": vocab_size, "eod_id": None}, [], {}, {})
    ours.publish()
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        theirs.add_document(document, [len(document)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()


def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path) as alone:
        assert alone
        with pytest.raises(BlockingIOError), exclusive(path, wait=False):
            pass
    assert not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.close(descriptor)  # as when the owner is killed: the file stays, the lock does not
    with exclusive(path, wait=False) as alone:
        assert alone


def test_the_side_file_holds_every_field_it_documents() -> None:
    assert all(field.name in (SideFile.__doc__ or "") for field in dataclasses.fields(SideFile) if field.name != "format")
