"""One rank decides, all ranks know: the first rank looks at the disk or writes to it, and its answer or its error is everybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Made = TypeVar("Made")


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` gives on the first rank, on every rank; what it raises there is raised on every rank, so that none waits for another."""
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as failure:
            box[1] = failure
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return cast(Made, box[0])
