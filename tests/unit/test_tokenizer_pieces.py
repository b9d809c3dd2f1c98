"""Ids by remembered pieces are the tokenizers package's own, whatever the text; and what is not known to work by pieces is left to the package."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from data_samples import sentences
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Package

from megatron_skywork.data import pieces
from megatron_skywork.data.tokenizers import HuggingFaceTokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


@pytest.fixture(autouse=True)
def every_text_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the package would see most of these strange texts whole, and be compared with itself."""
    monkeypatch.setattr(pieces, "_LEARNED_EVERY", 1)


def split(expression: str, **options: Any) -> pre_tokenizers.PreTokenizer:
    settings = {"behavior": "isolated", **options}
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), **settings), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN = {"gpt2": BYTE_LEVEL, "gpt2 as a split": split(GPT2), "llama3": split(LLAMA3), "qwen2": split(QWEN2),
         "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])}  # fmt: skip
UNKNOWN = {"prefix space": pre_tokenizers.ByteLevel(), "another expression": split(r"\p{L}+"), "none": None, "removed": split(GPT2, behavior="removed"),
           "inverted": split(GPT2, invert=True), "digits together": pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTE_LEVEL]),
           "no cut": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), "words": pre_tokenizers.Whitespace()}  # fmt: skip
# What the expressions and Unicode treat in their own way: \x1c is a space to `re` alone, \u1c8a and \ua7da are letters since Unicode 16, \u017f is a long s.
ORDINARY = [*"  \n\r\t'sTl.09é模"]
LETTERS = [*ORDINARY * 4, *"  \n\r\t'sTreVmld.,;aZ09é模ß½\x00\x1c\x85\xa0\u2028\u3000\u017f\u212a\u0301\u1c8a\ua7da\ufe0f🙂𝐀", "e\u0301"]


def mixtures(count: int, seed: int) -> list[str]:
    random_state = random.Random(seed)
    return ["".join(random_state.choices(LETTERS, k=random_state.randint(1, 20))) for _ in range(count)]


def tokenizer(folder: Path, cut: Any, normalizer: Any = None, added: list[AddedToken] | None = None, dropout: float | None = None) -> HuggingFaceTokenizer:
    package = Package(models.BPE(dropout=dropout))
    if normalizer is not None:
        package.normalizer = normalizer
    if cut is not None:
        package.pre_tokenizer = cut
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Trained on the same characters, so that it has tokens across every place where a wrong cut could fall.
    package.train_from_iterator([*["𝐀s𝐀 ", "'ſs'S", "\ua7das\u1c8a"] * 50, *mixtures(1000, seed=2), *sentences(200)],
                                trainers.BpeTrainer(vocab_size=700, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    package.add_tokens(added or [])
    folder.mkdir(exist_ok=True)
    package.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder / "tokenizer.json")


def assert_equal(ours: HuggingFaceTokenizer, folder: Path, texts: list[str]) -> None:
    package = Package.from_file(str(folder / "tokenizer.json"))
    package.encode_special_tokens = True
    found = [ids.tolist() for ids in ours.encode_batch(texts)]
    for text, ids in zip(texts, found, strict=True):
        assert ids == package.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("composes", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_ids_are_the_packages_own(tmp_path: Path, name: str, composes: bool) -> None:
    ours = tokenizer(tmp_path, KNOWN[name], normalizers.NFC() if composes else None)
    assert ours._pieces is not None
    texts = ["", *sentences(50), *mixtures(1000, seed=1)]
    assert sum(map(ours._pieces.fits, texts)) > 300
    assert_equal(ours, tmp_path, texts)


@pytest.mark.parametrize("name", KNOWN)
def test_every_character_in_its_class(tmp_path: Path, name: str) -> None:
    ours = tokenizer(tmp_path, KNOWN[name])
    plane = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    lines = ["".join(f"a{letter}{letter}1 {letter}.{letter}  {letter}b" for letter in plane[begin : begin + 256]) for begin in range(0, len(plane), 256)]
    assert ours._pieces is not None and sum(map(ours._pieces.fits, lines)) > 100
    assert_equal(ours, tmp_path, lines)


def test_added_tokens_are_read_and_control_tokens_are_not(tmp_path: Path) -> None:
    added = [AddedToken("<tool>"), AddedToken("the gate", lstrip=True), AddedToken("<|end|>", special=True)]
    ours = tokenizer(tmp_path, BYTE_LEVEL, added=added)
    assert ours._pieces is not None and not ours._pieces.fits("a <tool> b") and ours._pieces.fits("a <|end|></s> b")
    assert_equal(ours, tmp_path, ["a <tool> b", "at  the gate.", "a <|end|></s> b", "plain"])


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_way_to_cut_is_left_to_the_package(tmp_path: Path, name: str) -> None:
    ours = tokenizer(tmp_path, UNKNOWN[name])
    assert ours._pieces is None
    assert_equal(ours, tmp_path, sentences(20))


def test_another_normalizer_and_chance_are_left_to_the_package(tmp_path: Path) -> None:
    for number, options in enumerate(({"normalizer": normalizers.NFKC()}, {"dropout": 0.1}, {"added": [AddedToken("é")]})):
        assert tokenizer(tmp_path / str(number), BYTE_LEVEL, **options)._pieces is None


def test_a_file_older_than_use_regex_is_known(tmp_path: Path) -> None:
    tokenizer(tmp_path, BYTE_LEVEL)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["pre_tokenizer"]["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert ours._pieces is not None
    assert_equal(ours, tmp_path, sentences(20))


def test_a_text_of_new_pieces_is_seldom_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEARNED_EVERY", 3)
    ours = tokenizer(tmp_path, BYTE_LEVEL)
    texts = [" ".join(chr(0x4E00 + 20 * number + word) for word in range(20)) for number in range(9)]
    assert ours._pieces is not None
    assert [ours._pieces.encode(text) is not None for text in texts] == [False, False, True] * 3
    assert ours._pieces.encode(texts[2]) is not None, "its pieces are known by now"
    assert_equal(ours, tmp_path, [*texts, *texts])


def test_the_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_REMEMBERED_PIECES", 5)
    ours = tokenizer(tmp_path, BYTE_LEVEL)
    assert_equal(ours, tmp_path, [*sentences(20), "long" * 30])
    assert ours._pieces is not None and 0 < len(ours._pieces._ids_of) <= 5 and not any(len(piece) > 48 for piece in ours._pieces._ids_of)
