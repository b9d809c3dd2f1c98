"""Looks at the pickle in a file of torch.save: which tensors it describes, and whether each of them lies within the bytes that the file holds.

Nothing is built but records of shapes: `StoredTensor` stands for a tensor, and empty objects for arrays and dtypes of numpy, as saved random states have them.
Every other name is refused, also those that `torch.load(weights_only=True)` would call (sparse, quantized and nested tensors, tensors without a storage,
`bytearray` of any length): no weights need them, and each allocates what the file claims.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from megatron_skywork.convert.safety.pickle_inspector import Inspector, RefusedPickle, ordered
from megatron_skywork.convert.safety.shown import shown

_DTYPES = {kind: dtype for dtype, kind in torch.storage._dtype_to_storage_type_map().items()}
_NUMBERS = re.compile(r"[?biufc][0-9]{0,2}")
_PLAIN_DTYPE = (None, None, None, -1, -1, 0)
_RECONSTRUCT = numpy.zeros(1).__reduce__()[0]


@dataclass(frozen=True)
class StorageKind:
    """The class of a storage by the dtype of its elements."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Numbers in a file, under a key."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file describes it: a view of a storage that has room for it."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Dtype:
    """Stands for a dtype of numpy. Its state may change nothing but the order of bytes: flags in it would have numpy take numbers for addresses."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 8 or state[0] not in (3, 4) or state[1] not in ("<", ">", "|", "=") or state[2:] != _PLAIN_DTYPE:
            raise RefusedPickle("a dtype that is not one of plain numbers")


class _Array:
    """Stands for an array of numpy, which itself holds the bytes against the shape before it takes memory for it."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not _are_counts(state[1]) or not isinstance(state[2], _Dtype) or not isinstance(state[4], bytes):
            raise RefusedPickle("an array that is not one of plain numbers")


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Array or shape != (0,) or not isinstance(code, (str, bytes)):
        raise RefusedPickle("an array that does not begin empty")
    return _Array()


def _dtype(name: Any, align: Any, copy: Any) -> _Dtype:
    if not isinstance(name, str) or not _NUMBERS.fullmatch(name) or not isinstance(align, int) or not isinstance(copy, int):
        raise RefusedPickle(f"a dtype that is not one of plain numbers ({shown(name)})")
    return _Dtype()


def _bytes(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedPickle(f"text in {shown(encoding)}")
    return text.encode("latin1")


def _size(numbers: Any) -> tuple[int, ...]:
    if not _are_counts(numbers):
        raise RefusedPickle("a shape that is not made of numbers")
    return tuple(numbers)


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, wants_gradient: Any, hooks: Any, dtype: Any = None, metadata: Any = None) -> StoredTensor:
    if not isinstance(storage, Storage) or not _are_counts((offset,)) or not _are_counts(shape) or not _are_counts(strides) or len(shape) != len(strides):
        raise RefusedPickle("a tensor whose storage, shape or strides are damaged")
    if not isinstance(wants_gradient, bool) or hooks or not isinstance(hooks, (OrderedDict, type(None))) or metadata is not None:
        raise RefusedPickle("a tensor with more than numbers")
    kind = storage.dtype if dtype is None else dtype
    if not isinstance(kind, torch.dtype):
        raise RefusedPickle("a tensor of an unknown dtype")
    room, elements = storage.nbytes // kind.itemsize, math.prod(shape)
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) if elements else 0
    # An expanded tensor has strides of 0: every element lies in the storage, and together they are larger than it.
    if elements > room or last >= max(room, 1):
        raise RefusedPickle(f"a tensor of shape {shown(shape)}, of which the file holds {shown(room)} elements")
    return StoredTensor(storage, kind, shape)


def _tensor_2(storage: Any, offset: Any, shape: Any, strides: Any, wants_gradient: Any = False, hooks: Any = None, metadata: Any = None) -> StoredTensor:
    return _tensor(storage, offset, shape, strides, wants_gradient, hooks, None, metadata)


def _parameter(tensor: Any, wants_gradient: Any, hooks: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor) or not isinstance(wants_gradient, bool) or hooks or not isinstance(hooks, (OrderedDict, type(None))):
        raise RefusedPickle("a parameter with more than a tensor")
    return tensor


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): ordered,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): StorageKind(torch.uint8),
    ("torch", "UntypedStorage"): StorageKind(torch.uint8),
    ("_codecs", "encode"): _bytes,
    (_RECONSTRUCT.__module__, "_reconstruct"): _array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _dtype,
    **{("torch", kind): StorageKind(dtype) for kind, dtype in _DTYPES.items()},
}


class ArchiveInspector(Inspector):
    """Reads the pickle of a file of torch.save into plain values and `StoredTensor`s.

    Args:
        content: the pickle, or several one after another; each call of `load` reads one.
        held: bytes of each storage in the file by its key; None where the caller compares `storages` with the file.
    """

    made = (OrderedDict, _Array, _Dtype)
    dispatch = type(Inspector.dispatch)({**Inspector.dispatch, pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]]})  # type: ignore[attr-defined]

    def __init__(self, content: bytes, held: dict[str, int] | None):
        super().__init__(content)
        self.storages: dict[str, Storage] = {}
        self._held = held

    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise RefusedPickle(f"{module}.{name}")

    def persistent_load(self, said: Any) -> Storage:
        """The storage that a pickle names."""
        # Older files add what part of another storage this is; all that could be read then are whole ones.
        if not isinstance(said, tuple) or len(said) not in (5, 6) or said[0] != "storage" or (len(said) == 6 and said[5] is not None):
            raise RefusedPickle("a storage of an unknown kind")
        _, kind, key, location, count = said[:5]
        if not isinstance(kind, StorageKind) or not isinstance(key, str) or not isinstance(location, str) or not _are_counts((count,)):
            raise RefusedPickle("a storage of an unknown kind")
        storage = Storage(key, kind.dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise RefusedPickle(f"the storage {shown(key)} in two ways")
        if self._held is not None and storage.nbytes > self._held.get(key, -1):
            raise RefusedPickle(f"a storage of {shown(storage.nbytes)} bytes, of which the file holds {self._held.get(key, 0)}")
        return storage
