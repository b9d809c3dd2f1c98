"""A damaged dataset: every cut is noticed at the start, every flipped bit by `verify`; and a pair that Megatron-LM wrote is read without a side file."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_bpe_folder, make_dataset

from megatron_skywork.convert.files.marker import sealed
from megatron_skywork.data.indexed import IndexedWriter, paths_of, read_side_file
from megatron_skywork.data.tokenizers import Tokenizer, load_tokenizer
from megatron_skywork.data.verification import check_dataset, describe, verify_content
from megatron_skywork.errors import DataError

NUM_DOCUMENTS = 30
HEADER, LENGTHS, OFFSETS = 34, 34 + 4 * NUM_DOCUMENTS, 34 + 12 * NUM_DOCUMENTS


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("verification")
    return make_dataset(folder, "set", make_bpe_folder(folder / "tokenizer"), count=NUM_DOCUMENTS)


@pytest.fixture(scope="module")
def tokenizer(original: str) -> Tokenizer:
    return load_tokenizer(Path(original).parent / "tokenizer")


@pytest.fixture
def prefix(original: str, tmp_path: Path) -> str:
    for path in paths_of(original).values():
        shutil.copy(path, tmp_path)
    return str(tmp_path / "set")


@pytest.fixture
def plain(prefix: str) -> str:
    """The pair as Megatron-LM writes it (`test_data_indexed` compares the bytes)."""
    paths_of(prefix)["json"].unlink()
    return prefix


def refused(prefix: str, check: Callable[[str], object]) -> bool:
    """Whether the check refuses; anything but a DataError is a failure of the test."""
    try:
        check(prefix)
    except DataError:
        return True
    return False


def start(prefix: str) -> object:
    return check_dataset(prefix, 512)


def test_a_whole_dataset_passes(prefix: str, tokenizer: Tokenizer) -> None:
    side = read_side_file(prefix)
    assert side.largest_token_id is not None
    assert check_dataset(prefix, side.largest_token_id + 1, tokenizer) == verify_content(prefix) == side


def test_a_model_or_tokenizer_that_does_not_fit_is_refused(prefix: str, tmp_path: Path) -> None:
    side = read_side_file(prefix)
    with pytest.raises(DataError, match=rf"set.json: token id {side.largest_token_id} is beyond the model's vocabulary of {side.largest_token_id}"):
        check_dataset(prefix, side.largest_token_id or 0)
    with pytest.raises(DataError, match=r"another tokenizer .*write the dataset again with this tokenizer, or name the one that made it"):
        check_dataset(prefix, 512, load_tokenizer(make_bpe_folder(tmp_path / "other", seed=9)))


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
@pytest.mark.parametrize("with_side_file", [True, False])
def test_the_start_notices_every_cut(prefix: str, kind: str, with_side_file: bool) -> None:
    """At every byte of the .idx (header, lengths, offsets, document ends, and the places between them), and all over the .bin."""
    paths = paths_of(prefix)
    if not with_side_file:
        paths["json"].unlink()
    whole = paths[kind].read_bytes()
    cuts = set(range(len(whole))) if kind == "idx" else {0, 1, 2, *range(3, len(whole), 37), len(whole) - 2, len(whole) - 1}
    assert {0, HEADER - 1, HEADER, LENGTHS - 1, LENGTHS, OFFSETS} <= cuts or kind == "bin"
    assert not refused(prefix, start)
    missed = []
    for cut in sorted(cuts):
        paths[kind].write_bytes(whole[:cut])
        if not (refused(prefix, start) and refused(prefix, verify_content)):
            missed.append(cut)
    assert missed == []
    paths[kind].write_bytes(whole + b"\0\0")
    assert refused(prefix, start)


def test_verify_notices_every_flipped_bit_of_every_file(prefix: str) -> None:
    """200 at random over the three files. Those of the .idx the start notices too: its offsets say again what its lengths say."""
    choose = random.Random(6)
    paths = paths_of(prefix)
    whole = {kind: path.read_bytes() for kind, path in paths.items()}
    missed = []
    for number in range(200):
        kind = ("bin", "idx", "json")[number % 3]
        position, bit = choose.randrange(len(whole[kind])), choose.randrange(8)
        damaged = bytearray(whole[kind])
        damaged[position] ^= 1 << bit
        paths[kind].write_bytes(damaged)
        if not refused(prefix, verify_content) or (kind != "bin" and not refused(prefix, start)):
            missed.append((kind, position, bit))
        paths[kind].write_bytes(whole[kind])
    assert missed == []
    assert not refused(prefix, verify_content)


def test_without_a_side_file_every_flipped_bit_of_the_index_is_noticed_and_of_the_tokens_none(plain: str) -> None:
    """The second half is why there is a side file."""
    choose = random.Random(7)
    paths = paths_of(plain)
    index, tokens = paths["idx"].read_bytes(), bytearray(paths["bin"].read_bytes())
    for _ in range(200):
        damaged = bytearray(index)
        damaged[choose.randrange(len(index))] ^= 1 << choose.randrange(8)
        paths["idx"].write_bytes(damaged)
        assert refused(plain, start)
    paths["idx"].write_bytes(index)
    tokens[40] ^= 1
    paths["bin"].write_bytes(tokens)
    assert not refused(plain, verify_content)


def test_a_side_file_that_is_missing_or_odd_is_named(prefix: str) -> None:
    path = paths_of(prefix)["json"]
    content = json.loads(path.read_text())
    del content["seal"]
    for changed, reason in [({**content, "num_tokens": content["num_tokens"] + 1}, "these files do not belong together"), ({**content, "format": 9}, "found 9"),
                            ({key: value for key, value in content.items() if key != "dtype"}, r"fields missing: \['dtype'\]"),
                            ({**content, "num_tokens": "12"}, "num_tokens='12' is of the wrong type"), ({**content, "dtype": "float32"}, "dtype='float32'"),
                            ({**content, "bin_bytes": content["bin_bytes"] + 2}, "set.json says")]:
        path.write_text(sealed(changed))
        with pytest.raises(DataError, match=reason):
            check_dataset(prefix, 512)
    path.write_text(json.dumps({**content, "seal": "0" * 64}, indent=1) + "\n")
    with pytest.raises(DataError, match="changed after it was written"):
        check_dataset(prefix, 512)
    for text, reason in [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "found 'list'")]:
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            check_dataset(prefix, 512)
    paths_of(prefix)["bin"].unlink()
    path.unlink()
    with pytest.raises(DataError, match="no such file.*give the prefix without .bin"):
        check_dataset(f"{prefix}.bin", 512)


def test_a_side_file_from_before_the_seal_is_read(prefix: str) -> None:
    path = paths_of(prefix)["json"]
    content = json.loads(path.read_text())
    del content["seal"]
    path.write_text(json.dumps({**content, "format": 1}))
    assert dataclasses.replace(verify_content(prefix), format=2) == dataclasses.replace(check_dataset(prefix, 512), format=2)
    path.write_text(json.dumps({**content, "format": 1, "seal": "0" * 64}))
    assert refused(prefix, start)
    path.write_text(json.dumps(content))
    assert refused(prefix, start)


def test_a_pair_of_megatron_lm_is_described_by_its_index(plain: str, original: str, tokenizer: Tokenizer) -> None:
    recorded, found = read_side_file(original), check_dataset(plain, 512, tokenizer)
    same = ("dtype", "num_documents", "num_sequences", "num_tokens", "idx_sha256", "idx_bytes", "bin_bytes", "eod_id")
    assert {name: getattr(found, name) for name in same} == {name: getattr(recorded, name) for name in same}
    assert not found.is_recorded and recorded.is_recorded
    assert (found.bin_sha256, found.largest_token_id, found.tokenizer_fingerprint) == (None, None, None)
    assert describe(plain).eod_id is None  # nobody says which id would end a document
    assert verify_content(plain).largest_token_id == recorded.largest_token_id


def test_an_end_token_is_believed_only_where_the_documents_carry_it(tmp_path: Path, tokenizer: Tokenizer, original: str) -> None:
    path = make_dataset(tmp_path, "none", Path(original).parent / "tokenizer", count=5, append_eod=False)
    paths_of(path)["json"].unlink()
    assert check_dataset(path, 512, tokenizer).eod_id is None


@pytest.mark.parametrize(("field", "value", "reason"), [
    ("code", 7, "token type 7"), ("version", 2, "version 2"), ("magic", None, "no index of"), ("empty", None, "nothing to train on"),
    ("multimodal", None, "which is not supported"), ("lengths", (3, -5), "sequence 3 has -5 tokens"), ("offsets", (4, 1), "sequence 4 .* from byte 1"),
    ("ends", (5, 99), "document end 5 is 99"), ("ends", (5, 2), "document end 5 is 2"), ("ends", (5, -(2**63)), "document end 5"),
    ("ends", (0, 1), "document end 0"), ("ends", (30, 29), "document end 30")])
def test_an_index_that_is_wrong_says_where(plain: str, field: str, value: object, reason: str) -> None:
    path = paths_of(plain)["idx"]
    content = bytearray(path.read_bytes())
    begin, size, form = {"lengths": (HEADER, 4, "<i"), "offsets": (LENGTHS, 8, "<q"), "ends": (OFFSETS, 8, "<q")}.get(field, (0, 0, ""))
    if isinstance(value, tuple):
        struct.pack_into(form, content, begin + size * value[0], value[1])
    elif field == "code":
        content[17] = 7
    elif field == "version":
        content[9] = 2
    elif field == "multimodal":
        content += bytes(NUM_DOCUMENTS)
    elif field == "empty":
        content = content[:18] + struct.pack("<QQ", 0, 1) + bytes(8)
    else:
        content[0] = 0
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        check_dataset(plain, 512)


@pytest.mark.parametrize("together", [1, 7, 30, 31, 1000])
def test_the_index_is_read_in_parts(plain: str, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr("megatron_skywork.data.index_structure._SEQUENCES_AT_ONCE", together)
    assert describe(plain).num_documents == NUM_DOCUMENTS
    path = paths_of(plain)["idx"]
    content = path.read_bytes()
    for begin, size, form, count in ((HEADER, 4, "<i", NUM_DOCUMENTS), (LENGTHS, 8, "<q", NUM_DOCUMENTS), (OFFSETS, 8, "<q", NUM_DOCUMENTS + 1)):
        for number in range(count):
            damaged = bytearray(content)
            struct.pack_into(form, damaged, begin + size * number, 10_000)
            path.write_bytes(damaged)
            assert refused(plain, start), (begin, number)
    for number in range(2, NUM_DOCUMENTS):  # an end that goes back, wherever a part begins
        damaged = bytearray(content)
        struct.pack_into("<q", damaged, OFFSETS + 8 * number, number - 2)
        path.write_bytes(damaged)
        assert refused(plain, start), number


def test_a_name_that_no_file_can_have_is_answered_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for prefix in ("x" * 5000, str(tmp_path / "folder"), "nowhere/at/all", ""):
        for check in (start, verify_content):
            with pytest.raises(DataError, match="cannot be read|no such file"):
                check(prefix)


def test_documents_of_several_sequences_pass(tmp_path: Path) -> None:
    """As Megatron-LM writes them with --split-sentences; an empty one has as many ends as the one before it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "sentences.bin"), dtype=np.int32)
    builder.add_document([1, 2, 3, 4, 5, 6], [2, 3, 1])
    builder.add_document([7], [1])
    builder.finalize(str(tmp_path / "sentences.idx"))
    found = describe(str(tmp_path / "sentences"))
    assert (found.num_documents, found.num_sequences, found.num_tokens, found.dtype) == (2, 4, 7, "int32")


def test_a_negative_id_is_damage(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "a"), 70_000)
    writer.add(np.array([1, -7, 2], dtype=np.int32), np.array([3]))
    writer.finish({"tokenizer_name": "t", "tokenizer_fingerprint": "f", "vocab_size": 70_000, "eod_id": None}, [], {}, {})
    writer.publish()
    paths_of(str(tmp_path / "a"))["json"].unlink()
    with pytest.raises(DataError, match=r"a.bin: token 1 of the file is -7"):
        verify_content(str(tmp_path / "a"))
