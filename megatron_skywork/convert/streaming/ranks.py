"""The processes that share a conversion: one, or those that torchrun started, on as many nodes as there are. They meet in the output's file system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch

from megatron_skywork.errors import ConfigError, UserError

Task = TypeVar("Task")
Made = TypeVar("Made")
# A rank with a small share waits for those with large ones; torchrun ends it when one of them fails.
_PATIENCE = timedelta(days=7)


class PeerFailed(UserError):
    """Another rank ended; its own message says why."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    Attributes:
        rank, world_size: as torchrun counts them.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says, or a process on its own.

        Raises:
            ConfigError: the environment has only some of torchrun's variables, or nonsense in them.
            PeerFailed: the ranks do not find each other.
        """
        given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        world_size, rank = (given[name] or default for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
        if not (world_size.isdigit() and rank.isdigit() and int(rank) < int(world_size)) or (int(world_size) > 1 and None in given.values()):
            said = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            raise ConfigError(f"{said}: do not describe a rank of a job; unset them to run alone, or start the command with torchrun, which sets all of them")
        ranks = cls(int(rank), int(world_size))
        if ranks.world_size > 1 and not torch.distributed.is_initialized():
            with ranks._together():
                torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
        return ranks

    def meet(self) -> None:
        """Wait until all ranks are here.

        Raises:
            PeerFailed: one of them never comes.
        """
        if self.world_size > 1:
            with self._together():
                torch.distributed.barrier()

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes, on every rank."""
        if self.world_size == 1:
            return make()
        box = [make() if self.rank == 0 else None]
        with self._together():
            torch.distributed.broadcast_object_list(box, src=0)
        return cast(Made, box[0])

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:  # gloo's words for a connection that was closed or never made
            raise PeerFailed(f"rank {self.rank}: another rank ended, and its message says why") from error

    def close(self) -> None:
        """Leave the group that `from_environment` made."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def share(self, tasks: Sequence[tuple[Task, int]]) -> list[Task]:
        """This rank's part of (task, size): the largest first, each to whoever has least; all ranks compute the same."""
        loads = [0] * self.world_size
        mine = []
        for number in sorted(range(len(tasks)), key=lambda index: (-tasks[index][1], index)):
            owner = min(range(self.world_size), key=lambda rank: loads[rank])
            loads[owner] += tasks[number][1]
            if owner == self.rank:
                mine.append(number)
        return [tasks[number][0] for number in sorted(mine)]
