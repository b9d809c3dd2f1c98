"""The dataset on disk, and the side file that vouches for it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_bpe_folder, make_dataset, sentences

from megatron_skywork.data.file_lock import exclusive
from megatron_skywork.data.indexed import IndexedWriter, check_dataset, paths_of, read_side_file, verify_content
from megatron_skywork.data.tokenizers import load_tokenizer
from megatron_skywork.errors import DataError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("indexed")
    return make_dataset(folder, "set", make_bpe_folder(folder / "tokenizer"), count=30)


@pytest.fixture
def prefix(original: str, tmp_path: Path) -> str:
    for path in paths_of(original).values():
        shutil.copy(path, tmp_path)
    return str(tmp_path / "set")


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


def test_a_whole_dataset_passes(prefix: str) -> None:
    side = read_side_file(prefix)
    assert check_dataset(prefix, side.largest_token_id + 1, side.tokenizer_fingerprint) == side


def test_a_model_or_tokenizer_that_does_not_fit_is_refused(prefix: str) -> None:
    side = read_side_file(prefix)
    with pytest.raises(DataError, match=rf"set.json: token id {side.largest_token_id} is beyond the model's vocabulary of {side.largest_token_id}"):
        check_dataset(prefix, side.largest_token_id)
    with pytest.raises(DataError, match="another tokenizer"):
        check_dataset(prefix, 512, "0" * 64)


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_files_of_another_size_are_refused(prefix: str, kind: str) -> None:
    path = paths_of(prefix)[kind]
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"set.{kind}: {len(content)} bytes, .*set.json says {len(whole)}"):
            check_dataset(prefix, 512)
    path.unlink()
    with pytest.raises(DataError, match=rf"set.{kind}: missing"):
        check_dataset(prefix, 512)


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_flipped_bit_is_found_by_reading_everything(prefix: str, kind: str) -> None:
    path = paths_of(prefix)[kind]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    check_dataset(prefix, 512)
    with pytest.raises(DataError, match=rf"set.{kind}: sha256"):
        verify_content(prefix)


def test_a_side_file_that_is_missing_or_odd_is_named(prefix: str) -> None:
    path = paths_of(prefix)["json"]
    content = json.loads(path.read_text())
    for changed, reason in [({**content, "num_tokens": content["num_tokens"] + 1}, "the side file was changed"), ({**content, "format": 2}, "found 2"),
                            ({key: value for key, value in content.items() if key != "dtype"}, r"fields missing: \['dtype'\]"), ([], "found 'list'")]:
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=reason):
            check_dataset(prefix, 512)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        check_dataset(prefix, 512)
    path.unlink()
    with pytest.raises(DataError, match="missing beside set.bin and set.idx"):
        check_dataset(prefix, 512)
    with pytest.raises(DataError, match="no such file.*give the prefix without .bin"):
        check_dataset(f"{prefix}.bin", 512)


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
    from megatron_skywork.data.indexed import SideFile

    assert all(field.name in (SideFile.__doc__ or "") for field in dataclasses.fields(SideFile) if field.name != "format")
