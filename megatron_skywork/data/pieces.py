"""Remembered token ids of the pieces a byte-level tokenizer cuts a text into, because a text repeats its words.

A byte-level BPE (GPT-2, Llama 3, Qwen2, SmolLM2) first cuts a text into pieces p_1 ... p_n by a regular expression, and merges bytes within a piece only:

    ids(text) = ids(p_1) + ... + ids(p_n)

Cutting and merging are most of the cost, and the tokenizer repeats both for every occurrence of a word. Here the cut is made by Python's `re`, and every
piece is given to the tokenizer once. The ids are the tokenizer's own, exactly, for these reasons:

* Only the expressions listed below are known; any other tokenizer, and any text that is not certain (`Pieces.fits`), is left to the tokenizer,
  and so is a text of new pieces, for speed alone: Chinese repeats few, as its pieces are whole clauses.
* Which characters are letters, numbers and spaces is asked of the tokenizers package itself, whose Unicode tables differ from Python's.
* A piece alone is cut into itself. Its alternative of the expression matches it as before, and none listed earlier does: that one would have matched
  in the text too, as only the alternative of spaces looks ahead, and it and the one after it both match spaces to their end.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# A piece of many characters is a table row or a run of Chinese, seldom seen twice. The memory is emptied when it is full: what is frequent comes back at once.
_REMEMBERED_PIECES = 1 << 18
_REMEMBERED_CHARACTERS = 48
# A new piece alone costs several times its share of one call for the whole text. Where more of a text's first pieces are new, only every eighth is learned.
_SAMPLED_PIECES = 256
_MOST_NEW = 0.25
_LEARNED_EVERY = 8

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_GPT2 = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _AFTER_GPT2 % "{1,3}", _AFTER_GPT2 % ""
# Each digit is cut out before the expression of GPT-2 sees what lies between the digits: a number takes no space, and spaces end where a number begins.
_SINGLE_DIGITS = _CONTRACTIONS + r"| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class Pieces:
    """Ids of texts by remembered pieces.

    Args:
        pattern: of one piece.
        encode: the tokenizer's ids of one piece.
        read_tokens: spellings the tokenizer reads as one token wherever they stand, across pieces too.
        composes: whether the tokenizer first brings the text into Unicode's form NFC.
    """

    def __init__(self, pattern: re.Pattern[str], encode: Callable[[str], list[int]], read_tokens: Sequence[str], composes: bool):
        self._cut, self._ids_of = pattern.findall, _Memory(encode)
        self._read_tokens, self._composes = tuple(read_tokens), composes
        self._find_uncertain = _uncertain_characters().search
        self._num_new_texts = 0

    def fits(self, text: str) -> bool:
        """Whether the ids of this text can be had by pieces."""
        if not text.isascii() and (self._find_uncertain(text) or (self._composes and not unicodedata.is_normalized("NFC", text))):
            return False
        return not any(token in text for token in self._read_tokens)

    def encode(self, text: str) -> np.ndarray | None:
        """Ids int32 of a text; None where the tokenizer must, or had better, see it whole."""
        if not self.fits(text):
            return None
        cut = self._cut(text)
        sample = cut[:_SAMPLED_PIECES]
        if sum(piece not in self._ids_of for piece in sample) > _MOST_NEW * len(sample):
            self._num_new_texts += 1
            if self._num_new_texts % _LEARNED_EVERY:
                return None
        return np.frombuffer(b"".join(map(self._ids_of.__getitem__, cut)), dtype=np.int32)


class _Memory(dict[str, bytes]):
    """Piece to its ids as bytes of int32: bytes, because joining them is faster than anything done to lists or arrays."""

    def __init__(self, encode: Callable[[str], list[int]]):
        super().__init__()
        self._encode = encode

    def __missing__(self, piece: str) -> bytes:
        ids = np.array(self._encode(piece), dtype=np.int32).tobytes()
        if len(piece) <= _REMEMBERED_CHARACTERS:
            if len(self) >= _REMEMBERED_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def pieces_of(content: dict[str, Any], encode: Callable[[str], list[int]]) -> Pieces | None:
    """What remembers the pieces of a tokenizer; None where it is not known to work by pieces.

    Args:
        content: of its tokenizer.json.
        encode: ids of one text without special tokens, which are not read out of the text either.
    """
    normalizer, model = content.get("normalizer"), content["model"]
    pattern = _pattern(content.get("pre_tokenizer"))
    if pattern is None or normalizer not in (None, {"type": "NFC"}) or not isinstance(model, dict) or model.get("dropout"):
        return None
    read_tokens = [token["content"] for token in content.get("added_tokens") or [] if not token["special"]]
    if not all(token.isascii() for token in read_tokens):  # NFC may change its spelling
        return None
    return Pieces(pattern, encode, read_tokens, composes=normalizer is not None)


def _pattern(pre_tokenizer: Any) -> re.Pattern[str] | None:
    """The expression of one piece, for `re`."""
    match pre_tokenizer:
        case {"type": "ByteLevel"} if _is_byte_level(pre_tokenizer, use_regex=True):
            return _compiled(_GPT2)
        case {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": str(cut)}, "behavior": "Isolated", "invert": False}, last]}:
            return _compiled(cut) if cut in (_GPT2, _LLAMA3, _QWEN2) and _is_byte_level(last, use_regex=False) else None
        case {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, last]} if _is_byte_level(last, use_regex=True):
            return _compiled(_SINGLE_DIGITS) if _digits() == _characters(r"\p{N}") else None
    return None


def _is_byte_level(pre_tokenizer: Any, use_regex: bool) -> bool:
    # Files older than the setting use_regex mean yes.
    return pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"] and pre_tokenizer.get("use_regex", True) == use_regex


@functools.cache
def _compiled(expression: str) -> re.Pattern[str]:
    """The expression with its classes of characters written out: `re` has no \\p, and a \\s of its own."""
    spaces = _ranges(_characters(r"\s"))
    classes = {r"\p{L}": _ranges(_characters(r"\p{L}")), r"\p{N}": _ranges(_characters(r"\p{N}")), r"\s": spaces}

    def written_out(found: re.Match[str]) -> str:
        if found[0] == r"\S":
            return f"[^{spaces}]"
        inside = found[0][1:-1] if found[0].startswith("[") else found[0]
        for name, ranges in classes.items():
            inside = inside.replace(name, ranges)
        return f"[{inside}]"

    return re.compile(re.sub(r"\[[^\]]*\]|\\p\{\w\}|\\[sS]", written_out, expression))


@functools.cache
def _plane() -> str:
    """The characters below 65536, where all but rare scripts and emoji are, and where `re` looks a class up in a table."""
    return "".join(chr(code) for code in range(1 << 16) if not 0xD800 <= code < 0xE000)


@functools.cache
def _characters(name: str) -> frozenset[str]:
    """The characters of a class, as the engine inside the tokenizers package has it."""
    from tokenizers import Regex, pre_tokenizers

    plane = _plane()
    others = pre_tokenizers.Split(Regex(name), "removed").pre_tokenize_str(plane)
    return frozenset(plane).difference(*(plane[begin:end] for _, (begin, end) in others))


def _digits() -> frozenset[str]:
    """The characters the package cuts out as digits: each is put between two letters, from which only a digit is cut."""
    from tokenizers import pre_tokenizers

    spaced = "a" + "a".join(_plane()) + "a"
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(spaced)
    return frozenset(spaced[begin] for _, (begin, end) in pieces if end - begin == 1 and begin % 2)


@functools.cache
def _uncertain_characters() -> re.Pattern[str]:
    """Beyond the plane, or so new that Python does not know how it composes."""
    unknown = _ranges(frozenset(letter for letter in _plane() if unicodedata.category(letter) == "Cn"))
    return re.compile(f"[{unknown}\U00010000-{chr(sys.maxunicode)}]")


def _ranges(letters: frozenset[str]) -> str:
    """The characters as the inside of a class of `re`."""
    runs: list[list[int]] = []
    for code in sorted(map(ord, letters)):
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\u{begin:04x}-\\u{end:04x}" for begin, end in runs)
