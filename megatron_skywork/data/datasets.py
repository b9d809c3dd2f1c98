"""Datasets that a run reads: megatron-core's GPTDataset over each indexed file, blended by `order`.

megatron-core sizes its indices for the length of a run, so that a longer run cuts and shuffles the same files differently. Here each file is cut into
samples once, for exactly one epoch, and `order` says which sample of which file comes at each sample index; a run can then be prolonged, resumed, or
spread over other ranks without changing what sample i is.

Indices are kept in a cache folder under a name that includes the content of the dataset (see `index_cache`). No collective is involved, so it does not matter
which ranks build a dataset, or when.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_skywork.config.schema import Config, Source
from megatron_skywork.data.boundaries import document_lengths
from megatron_skywork.data.index_cache import cached_arrays
from megatron_skywork.data.indexed import SideFile, paths_of, read_side_file
from megatron_skywork.data.mock import MockDataset
from megatron_skywork.data.order import SampleOrder
from megatron_skywork.data.tokenizers import load_tokenizer
from megatron_skywork.data.verification import check_dataset
from megatron_skywork.errors import DataError

logger = logging.getLogger(__name__)

NO_EOD = -2  # never a token id, and not megatron-core's padding id -1 either
_VALID_STREAM = 1 << 40  # mock validation samples stand far behind any training sample


class UnknownToken(DataError):
    """A token id that the model has no embedding for. A loader process hands its error on as the class called with a text that ends with the traceback;
    a user is shown what stands behind the last mention of the class.
    """

    def __init__(self, text: str):
        super().__init__(text.rpartition(f"{UnknownToken.__qualname__}: ")[2].strip())


@dataclass(frozen=True)
class DatasetVocabulary:
    """What GPTDataset asks of a tokenizer, taken from a side file; `unique_identifiers` names the content in the cache.

    Attributes:
        side: what is in the dataset.
        model_vocab_size: ids of the model; one beyond them reaches no embedding.
    """

    side: SideFile
    model_vocab_size: int

    @property
    def eod(self) -> int:
        """Id that ends a document."""
        return NO_EOD if self.side.eod_id is None else self.side.eod_id

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer that made the dataset, or of the model where nobody knows."""
        return self.model_vocab_size if self.side.vocab_size is None else self.side.vocab_size

    @property
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """Changes whenever a file of the dataset does, so that a rewritten dataset never meets the indices of the old one."""
        return OrderedDict(bin_sha256=self.side.bin_sha256, idx_sha256=self.side.idx_sha256, eod=self.eod)


class OneEpochDataset(GPTDataset):
    """A GPTDataset over one epoch: documents in shuffled order, laid end to end, cut every seq_length tokens (plus one for the last label)."""

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """megatron-core's sample, with `document_lengths` [S] instead of its mask where documents are kept apart."""
        sample = super().__getitem__(idx)
        if self.config.reset_attention_mask:
            sample["document_lengths"] = document_lengths(sample["tokens"], self.config.tokenizer.eod)
        return sample

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, ...]:
        """(ids [S + 1], ...) of a sample. An id outside the vocabulary would be an assertion on a GPU, without a word about the file; and -1 is what
        megatron-core pads with, so it would be left out of the loss.
        """
        found = super()._query_document_sample_shuffle_indices(idx)
        ids = found[0]
        outside = (ids < 0) | (ids >= self.config.tokenizer.model_vocab_size)
        if outside.any():
            place = int(np.argmax(outside))
            self._refuse(idx, place, int(ids[place]))
        return found

    def _refuse(self, idx: int, place: int, token_id: int) -> NoReturn:
        entry, begin = map(int, self.sample_index[idx])
        while place >= (length := int(self.dataset.sequence_lengths[self.document_index[entry]]) - begin):
            entry, begin, place = entry + 1, 0, place - length
        known = self.config.tokenizer.side.largest_token_id
        advice = "it was made with a larger vocabulary, or is damaged" if known is None else f"it was changed after it was written (largest id {known})"
        where = f"token {begin + place} of document {self.document_index[entry]} (both counted from 0)"
        raise UnknownToken(f"{self.dataset_path}.bin: {where} is {token_id}, outside the model's vocabulary of {self.config.tokenizer.model_vocab_size} "
                           f"(model.vocab_size); {advice}: see tools/preprocess_data.py verify {self.dataset_path}")

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, range]:
        """(document order [documents], sample starts [samples + 1, 2], sample order). megatron-core calls this from its constructor.

        The sample order is the identity: `order.SampleOrder` permutes samples, anew in every epoch. megatron-core's own version builds on
        global rank 0 only, writes in place, and reads with pickle allowed.
        """
        document_index, sample_index = cached_arrays(Path(self.config.path_to_cache), self.unique_description_hash, ("documents", "samples"), self._cut)
        return document_index, sample_index, range(sample_index.shape[0] - 1)

    def _cut(self) -> tuple[np.ndarray, np.ndarray]:
        from megatron.core.datasets import helpers

        document_index = np.array(self.indices, dtype=np.int32)
        # RandomState, unlike numpy's Generator, promises the same stream in every version.
        np.random.RandomState(self.config.random_seed % 2**32).shuffle(document_index)
        sample_index = helpers.build_sample_idx(
            np.array(self.dataset.sequence_lengths), document_index, self.config.sequence_length,
            num_epochs=1, tokens_per_epoch=self._get_num_tokens_per_epoch(), drop_last_partial_sequence=True, add_extra_token_to_sequence=True)
        return document_index, sample_index


class Blend(Dataset):
    """Samples of several datasets, addressed by global sample index; endless, since every dataset starts again after its last sample."""

    def __init__(self, datasets: Sequence[Dataset], order: SampleOrder):
        self.datasets, self.order = datasets, order

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The sample at global index `index` >= 0: tokens, labels, loss_mask, position_ids [S], and document_lengths [S] where documents are kept apart."""
        dataset_N, sample_N = self.order.locate([index])
        return self.datasets[int(dataset_N[0])][int(sample_N[0])]


class Shifted(Dataset):
    """Another dataset, seen from sample `begin` on."""

    def __init__(self, dataset: Dataset, begin: int):
        self._dataset, self._begin = dataset, begin

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._dataset[self._begin + index]


def build_train_dataset(config: Config) -> Dataset:
    """The training blend, addressed by global sample index.

    Raises:
        DataError: nothing to train on, a dataset is damaged or does not fit the model, or is too short for one sample.
    """
    if config.data.mock:
        return _mock(config)
    if not config.data.train:
        raise DataError("data.train: no dataset named; give the prefix of one, or data.mock=true")
    return _blend(config, config.data.train, "data.train", Split.train)


def build_valid_datasets(config: Config) -> dict[str, Dataset]:
    """The named validation sets, each addressed by sample index; with mock data and no name, one called `mock`.

    Raises:
        DataError: as for training.
    """
    if config.data.mock:
        return {name: Shifted(_mock(config), _VALID_STREAM * (1 + number)) for number, name in enumerate(config.data.valid or ["mock"])}
    return {name: _blend(config, sources, f"data.valid.{name}", Split.valid) for name, sources in config.data.valid.items()}


def _mock(config: Config) -> MockDataset:
    data = config.data
    return MockDataset(config.model.vocab_size, data.seq_length, config.train.seed, data.eod_mask_loss, data.reset_position_ids, data.reset_attention_mask)


def _blend(config: Config, sources: Sequence[Source], key: str, split: Split) -> Blend:
    if not sources:
        raise DataError(f"{key}: no dataset named; give the prefix of one")
    tokenizer = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    sides = [check_dataset(source.path, config.model.vocab_size, tokenizer) for source in sources]
    for source, side in zip(sources, sides, strict=True):
        _check_fit(config, key, source.path, side)
    recorded = [(source.path, side) for source, side in zip(sources, sides, strict=True) if side.is_recorded]
    _check_same_tokenizer(key, [*_first_recorded(config.data.train), *recorded])
    datasets = [_open(config, source.path, side, split) for source, side in zip(sources, sides, strict=True)]
    order = SampleOrder([len(dataset) for dataset in datasets], [source.weight for source in sources], config.train.seed)
    return Blend(datasets, order)


def _check_fit(config: Config, key: str, path: str, side: SideFile) -> None:
    needed = config.data.seq_length + 1
    if side.num_tokens < needed:
        raise DataError(f"{key}: {path} holds {side.num_tokens} tokens, and one sample of data.seq_length={config.data.seq_length} needs {needed}; "
                        f"give more text, or a data.seq_length of at most {side.num_tokens - 1}")
    asked = [name for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask") if getattr(config.data, name)]
    if asked and side.eod_id is None:
        named = "" if side.is_recorded or config.data.tokenizer else "name data.tokenizer, so that its end token is known, "
        raise DataError(f"{path}.{'json' if side.is_recorded else 'bin'}: its documents carry no end token, which data.{asked[0]}=true needs; {named}"
                        f"write it again with --append-eod, or set data.{asked[0]}=false")
    if not side.is_recorded and os.environ.get("RANK", "0") == "0":
        logger.warning("%s.json: missing; sizes and structure were checked, but neither the tokenizer that made this dataset nor its content can be", path)


def _first_recorded(sources: Sequence[Source]) -> list[tuple[str, SideFile]]:
    """The first dataset with a side file, if any: what says which tokenizer the others must have."""
    return next(([(source.path, read_side_file(source.path))] for source in sources if paths_of(source.path)["json"].is_file()), [])


def _check_same_tokenizer(key: str, recorded: Sequence[tuple[str, SideFile]]) -> None:
    for path, side in recorded:
        first_path, first = recorded[0]
        if side.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise DataError(f"{key}: {path} was made with {side.tokenizer_name} (fingerprint {str(side.tokenizer_fingerprint)[:12]}), {first_path} with "
                            f"{first.tokenizer_name} ({str(first.tokenizer_fingerprint)[:12]}); a run has one tokenizer: write one of them again")


def _open(config: Config, path: str, side: SideFile, split: Split) -> OneEpochDataset:
    data = config.data
    cache = data.cache_dir or os.path.join(config.run_dir, "data_cache")
    settings = GPTDatasetConfig(
        random_seed=config.train.seed, sequence_length=data.seq_length, blend=([path], None), split="1", path_to_cache=cache,
        tokenizer=DatasetVocabulary(side, config.model.vocab_size), reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask, eod_mask_loss=data.eod_mask_loss, create_attention_mask=False)
    indexed = IndexedDataset(path)
    try:
        return OneEpochDataset(indexed, path, np.arange(side.num_sequences, dtype=np.int32), None, split, settings)
    except OSError as error:
        raise DataError(f"{error.filename or cache}: {error.strerror or error}; sample indices are kept there: "
                        "set data.cache_dir to a folder this run can write") from error
