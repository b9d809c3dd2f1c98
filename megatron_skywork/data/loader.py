"""Micro-batches for one data-parallel rank, addressed by sample index.

Samples are numbered over the whole run. A step takes the next global_batch_size of them; with micro-batches of b rows on each of D data-parallel ranks,
row i of micro-batch m on rank r is sample

    consumed + m (b D) + r b + i .

The samples of a step are therefore the same set for every D and b, and a run that goes on from `consumed` under another layout
neither repeats nor skips one. Nothing else is state: the position in the data is one number.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_skywork import lifeline
from megatron_skywork.config.schema import Config
from megatron_skywork.data.datasets import build_train_dataset, build_valid_datasets

PADDING = -1
# What a scheduler or a terminal sends to every process of a job.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class MicroBatches:
    """Sample indices of each micro-batch of one rank, as lists of `micro` numbers.

    Args:
        begin: first sample index over all ranks.
        end: index after the last one; None goes on forever. Rows at or beyond `end` are PADDING, so every rank has equally many micro-batches.
    """

    def __init__(self, begin: int, end: int | None, micro: int, dp_rank: int, dp_size: int):
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} of dp_size={dp_size}")
        self._begin, self._end, self._micro, self._rank, self._stride = begin, end, micro, dp_rank, micro * dp_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self._begin
        while self._end is None or start < self._end:
            rows = range(start + self._rank * self._micro, start + (self._rank + 1) * self._micro)
            yield [row if self._end is None or row < self._end else PADDING for row in rows]
            start += self._stride

    def __len__(self) -> int:
        if self._end is None:
            raise TypeError("an endless loader has no length")
        return -(-(self._end - self._begin) // self._stride)


class Padded(Dataset):
    """A dataset that answers PADDING with a sample no loss is taken from."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index != PADDING:
            return self._dataset[index]
        sample = dict(self._dataset[0])
        sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        return sample


def build_train_loader(config: Config, *, dp_rank: int, dp_size: int, consumed_samples: int, pin_memory: bool = False) -> Iterator[dict[str, Tensor]]:
    """Endless micro-batches of this rank from sample `consumed_samples` on.

    Args:
        dp_rank, dp_size: place among the data-parallel ranks; ranks that share it (TP, PP, CP) get the same micro-batches.
        consumed_samples: samples all ranks together have consumed.
        pin_memory: page-lock the batches, where a GPU reads them.
    Yields:
        tokens_BS, labels_BS, position_ids_BS int64, loss_mask_BS float32, and document_lengths_BS int32 (see `boundaries`) with data.reset_attention_mask.
    Raises:
        DataError: a dataset is missing, damaged, too short, or does not fit the model.
    """
    batches = MicroBatches(consumed_samples, None, config.train.micro_batch_size, dp_rank, dp_size)
    # A step takes all its micro-batches at once, so all of the next one must be there by then; they are small beside anything else in memory.
    num_ahead = config.train.global_batch_size // (config.train.micro_batch_size * dp_size)
    loader = _loader(build_train_dataset(config), batches, config.data.num_workers, pin_memory, num_ahead)
    # A signal to a loader process that is not yet prepared for it would end the process, perhaps with a lock that the others wait for.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULER_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def build_valid_loaders(config: Config, *, dp_rank: int, dp_size: int, pin_memory: bool = False) -> dict[str, DataLoader]:
    """For each validation set an iterable over samples 0 .. eval_samples - 1, the same at every evaluation; `len` is its micro-batches on every rank.

    Each sample is on exactly one data-parallel rank; rows that fill up the last micro-batch have a loss_mask of zeros. A set that holds fewer
    samples is read again from its start, as in training.

    Raises:
        DataError: as for training.
    """
    batches = MicroBatches(0, config.train.eval_samples, config.train.micro_batch_size, dp_rank, dp_size)
    # Evaluations are short and far apart: processes of their own would cost more than they bring.
    return {name: _loader(Padded(dataset), batches, 0, pin_memory, 0) for name, dataset in build_valid_datasets(config).items()}


def _loader(dataset: Dataset, batches: MicroBatches, num_workers: int, pin_memory: bool, num_ahead: int) -> DataLoader:
    # Two for each worker at least: one to hand over, one in the making.
    per_worker = max(2, -(-num_ahead // num_workers)) if num_workers else None
    # A generator of its own: DataLoader draws a seed for its workers, which must not move the run's random state.
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        prefetch_factor=per_worker,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_worker_signals() if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
    )


def _worker_signals() -> Callable[[int], None]:
    """Loader processes outlive the signals that ask a run to save and stop: a scheduler sends them to every process of a job, and the
    run cannot finish its step once a loader process is gone. They still end with the run, which sets `closing` first, and with a rank that is killed.
    """
    # A byte of shared memory: an Event has a lock, which a second signal would wait for while it interrupts the handler of the first.
    closing = multiprocessing.RawValue(ctypes.c_bool, False)

    def close() -> None:
        closing.value = True

    # Registered after torch's and multiprocessing's own exit handlers, hence called before these terminate the processes.
    atexit.register(close)
    rank = os.getpid()

    def prepare(_: int) -> None:
        lifeline.die_with(rank)
        signal.set_wakeup_fd(-1)  # inherited: a signal to this process would be told to the rank's watchdog

        def stop_when_closing(number: int, frame: FrameType | None) -> None:
            if closing.value:
                os._exit(0)

        for number in SCHEDULER_SIGNALS:
            signal.signal(number, stop_when_closing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SCHEDULER_SIGNALS)

    return prepare
