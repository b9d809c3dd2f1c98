"""Both kinds of tokenizer behind one interface."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data_samples import make_bpe_folder, make_sentencepiece, sentences

from megatron_skywork.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_skywork.errors import DataError


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bpe_folder(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def test_a_folder_and_its_file_are_the_same_tokenizer(bpe: Path, sentencepiece: Path) -> None:
    for path, file, kind in ((bpe, bpe / "tokenizer.json", HuggingFaceTokenizer), (sentencepiece.parent, sentencepiece, SentencePieceTokenizer)):
        folder, single = load_tokenizer(path), load_tokenizer(str(file))
        assert type(folder) is type(single) is kind
        assert (folder.fingerprint, folder.vocab_size, folder.bos_id, folder.eos_id) == (single.fingerprint, single.vocab_size, single.bos_id, single.eos_id)


def test_text_survives_and_ids_stay_inside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for text in ["the gate", "naïve été 模型", "tab\tnewline\nend", "🙂", *sentences(5, seed=9)]:
        ids = tokenizer.encode(text)
        assert ids and max(ids) < tokenizer.vocab_size
        assert all(isinstance(token, int) for token in ids)
        assert " ".join(tokenizer.decode(ids).split()) == " ".join(text.split())
    assert tokenizer.encode("") == []


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", *sentences(20, seed=3), "x"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_special_ids(bpe: Path, sentencepiece: Path) -> None:
    hf = load_tokenizer(bpe)
    assert (hf.bos_id, hf.eos_id) == (hf.token_id("<s>"), hf.token_id("</s>")) == (0, 1)
    sp = load_tokenizer(sentencepiece)
    assert (sp.bos_id, sp.eos_id, sp.vocab_size) == (1, 2, 400)
    assert sp.token_id("</s>") == 2
    assert sp.token_id("no such piece") is None and hf.token_id("no such token") is None


def test_a_document_cannot_contain_a_control_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("before </s> after <s>")
    assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids


def test_truncation_and_padding_of_the_file_are_ignored(bpe: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw

    raw = Raw.from_file(str(bpe / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=4)
    raw.save(str(tmp_path / "tokenizer.json"))
    plain, changed = load_tokenizer(bpe), load_tokenizer(tmp_path)
    long_text = "the router keeps every token of a layer"
    assert len(plain.encode(long_text)) > 4
    for found, expected in zip(changed.encode_batch([long_text, "a"]), plain.encode_batch([long_text, "a"]), strict=True):
        assert found.tolist() == expected.tolist()
    assert changed.fingerprint == plain.fingerprint


def test_the_fingerprint_is_of_the_vocabulary_not_of_the_formatting(bpe: Path, tmp_path: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=4, sort_keys=True))
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(bpe).fingerprint
    other = make_bpe_folder(tmp_path / "other", seed=5, vocab_size=390)
    assert load_tokenizer(other).fingerprint != load_tokenizer(bpe).fingerprint
    assert len(load_tokenizer(bpe).fingerprint) == 64


def test_special_tokens_map_serves_where_the_config_is_silent(bpe: Path, tmp_path: Path) -> None:
    shutil.copy(bpe / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "</s>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": null}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_what_is_no_tokenizer_is_named(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "broken.json").write_text('{"model": ')
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "odd.json").write_text('{"model": {"type": "Nonsense"}}')
    (tmp_path / "broken.model").write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "vocab.txt").write_text("a")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(bpe / "tokenizer.json", foreign)
    (foreign / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    expected = {
        "nowhere": "no such file", "empty": "holds neither", "config.json": "has no `model`", "broken.json": "not valid JSON",
        "deep.json": "not valid JSON", "odd.json": "cannot read it",
        "broken.model": "not a sentencepiece model", "empty.model": "not a sentencepiece model", "vocab.txt": "ends in neither",
        "foreign": "do not belong together"}
    for name, reason in expected.items():
        with pytest.raises(DataError, match=reason) as caught:
            load_tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
