"""What a checkpoint's reader offers: names with shapes and dtypes at once, values one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_skywork.convert.layouts import Shape


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: Shape
    dtype: torch.dtype


class Reader(Protocol):
    """Tensors by their Hugging Face names."""

    @property
    def folder(self) -> Path:
        """Where they are, for what is said about them."""
        ...

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All of them."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One of them, whole. From any thread."""
        ...
