"""Router rows for upcycling from what the dense model makes of given text: the inputs each router will see, and from them its first weights.

One text gives every router the centroids of its inputs (`methods.router_init.from_hidden`), as many texts as experts give each expert a text
(`methods.router_init.from_texts`); that module has the sources. The dense model is run by `reference`, and only as far as the last layer that needs rows.

A mixture's router sees what the dense layer's feed-forward saw as long as the layers below compute what they did in the dense model: exact methods do, and an
inexact one begins near it.

All texts go through the model side by side, each sequence by itself, so that attention does not mix them, and a layer's matrices are read once for all: first
those of the attention, then those of the feed-forward, so that never more than four are held. What grows with the text is the residual stream.

Shape letters: T tokens, H hidden, E experts (rows).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TextIO

import torch

from megatron_skywork.convert.check.reference import Forward
from megatron_skywork.convert.check.reference_weights import FeedForward, Layer, Layers
from megatron_skywork.convert.check.text_tokens import encode, find_tokenizer, ids_tensor
from megatron_skywork.convert.upcycling.methods.router_init import from_hidden, from_texts
from megatron_skywork.convert.upcycling.methods.seeds import generator
from megatron_skywork.errors import CheckpointError, ConfigError, DataError

OPTION = "--router-text"
DEFAULT_TOKENS = 4096
SEQUENCE_TOKENS = 1024
# What is read of a file for each token wanted, far more than a token is long: a corpus of gigabytes is not read whole.
_CHARACTERS_PER_TOKEN = 32


def count_problem(num_texts: int, num_rows: int) -> str | None:
    """What is wrong with a number of texts for routers of `num_rows` rows, or None; known before anything is read."""
    if num_texts in (1, num_rows):
        return None
    return f"{OPTION}: {num_texts} texts; give 1, whose tokens are divided among the experts, or {num_rows}, one for each expert"


def token_lists_for(folder: Path | str, paths: Sequence[Path | str], limit: int = DEFAULT_TOKENS) -> list[list[int]]:
    """Token ids of text files (UTF-8), at most `limit` of each, by the tokenizer in the dense model's folder or its `hf/`.

    Raises:
        ConfigError: a limit below 1.
        DataError: a file that is missing, empty, or no UTF-8 text.
        CheckpointError: the folder has no tokenizer, or it cannot be used.
    """
    if limit < 1:
        raise ConfigError(f"{OPTION}: a limit of {limit} tokens a text; at least 1 is needed")
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder}: has neither tokenizer.json nor tokenizer.model, so {OPTION} cannot be made into tokens; put the model's tokenizer there"
        )
    texts = [_read(Path(path), limit * _CHARACTERS_PER_TOKEN) for path in paths]
    lists = [ids[:limit] for ids in encode(tokenizer, texts)]
    for path, ids in zip(paths, lists, strict=True):
        if not ids:
            raise DataError(f"{OPTION} {path}: its text gives no tokens; give another text")
    return lists


def _read(path: Path, num_characters: int) -> str:
    """The beginning of a text file, line ends as they are."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read(num_characters)
    except UnicodeDecodeError as error:
        raise DataError(f"{OPTION} {path}: is no UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{OPTION} {path}: {error.strerror or error}; give a file with text") from error
    if not text.strip():
        raise DataError(f"{OPTION} {path}: holds no text; give a file with text")
    return text


@torch.no_grad()
def rows_from_text(
    layers: Layers, token_lists: Sequence[Sequence[int]], wanted: Collection[int], num_rows: int, std: float, seed: int, progress: TextIO | None = None
) -> dict[int, torch.Tensor]:
    """First router weights of the wanted layers from the dense model's hidden states: layer index (from 0) -> rows [E, H] in fp32.

    The rows of a layer depend on the texts and the seed, not on which other layers are wanted. They are the same to the last bit on one machine with one
    number of threads; another number may round the hidden states differently.

    Args:
        layers: the dense model (`verify.open_layers`), which decides what is computed in.
        token_lists: ids of each text; one text, or one for each row.
        num_rows: experts; for virtual groups the copies.
        std: root mean square of a layer's rows.
        progress: where a line goes for every tenth of the layers.

    Raises:
        ConfigError: another number of texts, layers the model does not have, fewer than two rows, a std that scales to nothing.
        CheckpointError: the model is a mixture already; tokens outside its vocabulary.
        DataError: texts without tokens, texts too short or too much alike, hidden states that are not finite.
    """
    _check(layers, token_lists, wanted, num_rows, std)
    texts = _sequences(token_lists, layers.model.vocab_size)
    forwards = _begin(layers, [sequence_T for text in texts for sequence_T in text])
    rows: dict[int, torch.Tensor] = {}
    last = max(wanted)
    for index, layer in zip(range(last + 1), layers.layers(), strict=False):
        _attend(forwards, layer)
        if index in wanted:
            hidden = iter(forward.ffn_input_TH(layer) for forward in forwards)
            by_text = [torch.cat([next(hidden) for _ in text]) for text in texts]
            rows[index] = from_hidden(by_text[0], num_rows, std, generator(seed, "router", index)) if len(texts) == 1 else from_texts(by_text, std)
        if index < last:
            _feed_forward(forwards, layer)
        if progress is not None and ((index + 1) % max(1, (last + 1) // 10) == 0 or index == last):
            progress.write(f"router text: layer {index + 1} of {last + 1}, rows for {len(rows)} of {len(set(wanted))} routers\n")
            progress.flush()
    return rows


def _check(layers: Layers, token_lists: Sequence[Sequence[int]], wanted: Collection[int], num_rows: int, std: float) -> None:
    if layers.moe is not None:
        raise CheckpointError(f"{OPTION}: the model is a mixture of experts already; rows are made from a dense model")
    problems = []
    if problem := count_problem(len(token_lists), num_rows):
        problems.append(problem)
    if num_rows < 2:
        problems.append(f"{OPTION}: a router of {num_rows} rows has nothing to choose from; at least 2 experts are needed")
    if not (math.isfinite(std) and std > 0):
        problems.append(f"--router-init-std={std}: with {OPTION} it must be above 0, or the rows are all the same")
    outside = sorted(index for index in wanted if not 0 <= index < layers.model.num_layers)
    if outside or not wanted:
        problems.append(f"--moe-layers: {outside or 'none given'}; the model has layers 0 to {layers.model.num_layers - 1}")
    if problems:
        raise ConfigError(problems)
    empty = [str(number) for number, ids in enumerate(token_lists, start=1) if not len(ids)]
    if empty:
        raise DataError(f"{OPTION}: text number {', '.join(empty)} has no tokens")


def _sequences(token_lists: Sequence[Sequence[int]], vocab_size: int) -> list[list[torch.Tensor]]:
    """Each text in as few sequences as may be, of nearly one length: a short last one would be tokens without context."""
    return [list(ids_tensor(ids, vocab_size).tensor_split(-(-len(ids) // SEQUENCE_TOKENS))) for ids in token_lists]


def _begin(layers: Layers, sequences: list[torch.Tensor]) -> list[Forward]:
    """A run for each sequence; the embedding is read once."""
    embedded_TH = layers.embed(torch.cat(sequences)).split([len(tokens_T) for tokens_T in sequences])
    return [Forward(layers, tokens_T, part_TH) for tokens_T, part_TH in zip(sequences, embedded_TH, strict=True)]


def _attend(forwards: list[Forward], layer: Layer) -> None:
    """The attention of a layer in every sequence, its matrices read once and dropped at the end."""
    held = replace(layer, query_key_value=cache(layer.query_key_value), proj=cache(layer.proj))
    for forward in forwards:
        forward.attend(held)


def _feed_forward(forwards: list[Forward], layer: Layer) -> None:
    """The same of its feed-forward."""
    dense = layer.expert(0)
    kept = FeedForward(cache(dense.gate), cache(dense.up), cache(dense.down))
    held = replace(layer, expert=lambda _: kept)
    for forward in forwards:
        forward.feed_forward(held)
