"""What a save has to write, taken down at one moment: after this, training may change every tensor it likes.

torch's planner decides who writes what, in collectives of all ranks. It hands its decision to a storage writer; the one here writes nothing, it keeps the
decision, with a copy of the numbers in host memory where they are written later in the background.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections import deque
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, _replace_state_dict_keys_with_sharded_keys, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_skywork.checkpoint.host_memory import available_bytes
from megatron_skywork.convert.progress import human


class Capture(StorageWriter):
    """Stands where torch expects a writer.

    Args:
        copies: copy tensors to host memory, if it has room; else they are read where they are, when they are written.

    Attributes:
        copied: whether they were, and may change from now on.
        file_name: of this rank's file.
        items: what belongs into it, in order: bytes, or tensors as torch.save writes them.
        index: on the first rank, the checkpoint's index without the places of the items.
    """

    def __init__(self, copies: bool):
        super().__init__()
        self.copied = copies
        self.file_name = ""
        self.items: deque[tuple[MetadataIndex, torch.Tensor | bytes]] = deque()
        self.index: Metadata | None = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.file_name = plan.storage_data
        found = [(item.index, planner.resolve_data(item)) for item in plan.items]
        needed = sum(data.nbytes for _, data in found if isinstance(data, torch.Tensor))
        available = available_bytes()
        if self.copied and available is not None and needed > available:
            self.copied = False
            print(f"warning: rank {torch.distributed.get_rank()} stands still while it writes a checkpoint: a copy needs {human(needed)} of host memory, "
                  f"and its share of what is left is {human(available)}", file=sys.stderr, flush=True)  # fmt: skip
        self.items.extend((index, self._taken(data)) for index, data in found)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def _taken(self, data: torch.Tensor | io.BytesIO) -> torch.Tensor | bytes:
        if isinstance(data, io.BytesIO):
            return data.getvalue()
        data = data.detach()
        return torch.empty(data.shape, dtype=data.dtype).copy_(data) if self.copied else data

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.index = metadata

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of torch's interface; there is nothing to reset."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of torch's interface; there is nothing to set up."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def capture(content: dict[str, Any], copies: bool) -> tuple[Capture, dict[str, Any]]:
    """Plan a checkpoint on all ranks together.

    Args:
        content: a state dict as megatron-core's `dist_checkpointing.save` takes it.

    Returns:
        this rank's part, and what all ranks have in common and the first one writes.

    Raises:
        CheckpointException (of torch; not an Exception): on all ranks, when one of them could not.
    """
    sharded, common = save_preprocess(content)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    writer = Capture(copies)
    torch.distributed.checkpoint.save(
        mcore_to_pyt_state_dict(by_key, False), storage_writer=writer, planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    )
    return writer, common


def tensor_bytes(index: Metadata) -> int:
    """Bytes of all tensors of a checkpoint."""
    tensors = [entry for entry in index.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
