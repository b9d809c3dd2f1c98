"""What the index of a distributed checkpoint must satisfy before anything is allocated or read by it.

A box lies inside its tensor, its bytes inside its file; a tensor's boxes cover it, do not overlap, and have no more bytes than their places in the files, each
byte counted once. So a tensor of the index is never larger than what lies on the disk, whatever shape it claims. Everything wrong is collected, and the first
lines of it shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_skywork.convert.files.marker import inside
from megatron_skywork.convert.safety.shown import first_lines, shown
from megatron_skywork.errors import CheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]
_SHOWN_PROBLEMS = 20
# Boxes that no straight cut separates are compared pair by pair; nothing writes more than a few such.
_PAIRWISE = 256


def check_index(folder: Path, name: str, index: Any) -> None:
    """Hold an index against the files it speaks of.

    Args:
        folder: where the files are.
        name: of the index itself.

    Raises:
        CheckpointError: not an index, or what is wrong in it.
    """
    tensors, places = getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", None)
    if not isinstance(index, Metadata) or not isinstance(tensors, dict) or not isinstance(places, dict):
        raise CheckpointError(f"{folder / name}: is not the index of a distributed checkpoint")
    problems = list(_wrong_places(folder, name, places))
    for key, entry in tensors.items() if not problems else ():
        problems += _wrong_entry(key, entry, places)
        if len(problems) > _SHOWN_PROBLEMS:
            break
    if problems:
        lines = first_lines(problems, _SHOWN_PROBLEMS)
        if len(lines) == 1:
            raise CheckpointError(f"{folder / name}: {lines[0]}; the checkpoint is damaged")
        raise CheckpointError(f"{folder / name}: does not fit its files; the checkpoint is damaged:\n" + "\n".join("  " + line for line in lines))


def _wrong_places(folder: Path, name: str, places: dict[Any, Any]) -> Iterator[str]:
    sizes: dict[str, int] = {}
    missing = set()
    for key, info in places.items():
        if not isinstance(key, MetadataIndex) or not isinstance(info, _StorageInfo) or not isinstance(getattr(key, "fqn", None), str):
            raise CheckpointError(f"{folder / name}: holds an entry of an unknown kind ({type(key).__name__}: {type(info).__name__})")
        file, offset, length = (vars(info).get(field) for field in ("relative_path", "offset", "length"))
        if getattr(info, "transform_descriptors", None):
            yield f"{shown(key.fqn)} is stored with a transformation ({shown(info.transform_descriptors)}), which is not supported"
        elif not isinstance(offset, int) or not isinstance(length, int) or offset < 0 or length < 0:
            yield f"{shown(key.fqn)} lies at offset {shown(offset)}, length {shown(length)}"
        else:
            if not isinstance(file, str) or file not in sizes:
                path = inside(folder, file, name)
                sizes[str(file)] = path.stat().st_size if path.is_file() else -1
            if sizes[str(file)] < 0:
                missing.add(str(file))
            elif offset + length > sizes[str(file)]:
                yield f"{shown(key.fqn)} ends at byte {shown(offset + length)} of {file}, which has {sizes[str(file)]}"
    if missing:
        yield f"files it names are missing: {', '.join(sorted(missing))}"


def _wrong_entry(key: Any, entry: Any, places: dict[Any, Any]) -> Iterator[str]:
    if not isinstance(key, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
        yield f"{shown(key)} is of an unknown kind ({type(entry).__name__})"
        return
    if isinstance(entry, BytesStorageMetadata):
        return
    size: Any = getattr(entry, "size", None)
    chunks, dtype = getattr(entry, "chunks", None), getattr(getattr(entry, "properties", None), "dtype", None)
    if not _is_shape(size) or not isinstance(chunks, list) or not isinstance(dtype, torch.dtype):
        yield f"{shown(key)}: its record is damaged"
        return
    boxes, used = [], []
    for chunk in chunks:
        box = _box(chunk, tuple(size))
        if box is None:
            yield f"{shown(key)}: a box does not lie inside its shape {shown(tuple(size))}"
            return
        place = places.get(MetadataIndex(key, box[0]))
        needed = math.prod(box[1]) * dtype.itemsize
        if place is None:
            yield f"{shown(key)}: no place for the box at {shown(box[0])}"
            return
        if needed > place.length:
            yield f"{shown(key)}: the box at {shown(box[0])} needs {shown(needed)} bytes, and its place has {place.length}"
            return
        boxes.append(box)
        used.append((str(place.relative_path), place.offset, place.length))
    if not disjoint([box for box in boxes if math.prod(box[1])], len(size)):
        yield f"{shown(key)}: its boxes overlap"
        return
    elements, covered, held = math.prod(size), sum(math.prod(box[1]) for box in boxes), _distinct_bytes(used)
    if covered != elements:
        yield f"{shown(key)}: its boxes cover {shown(covered)} of {shown(elements)} elements"
    elif covered * dtype.itemsize > held:
        yield f"{shown(key)}: its boxes need {shown(covered * dtype.itemsize)} bytes, and share places of {held}"


def _distinct_bytes(used: list[tuple[str, int, int]]) -> int:
    """Bytes of files that at least one place takes."""
    total, file, end = 0, "", 0
    for name, offset, length in sorted(used):
        if name != file:
            file, end = name, 0
        total += max(0, offset + length - max(offset, end))
        end = max(end, offset + length)
    return total


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(number, int) and number >= 0 for number in value)


def _box(chunk: Any, whole: tuple[int, ...]) -> Box | None:
    """Offset and shape of a chunk that lies inside the tensor."""
    offset: Any = getattr(chunk, "offsets", None)
    sizes: Any = getattr(chunk, "sizes", None)
    if not isinstance(chunk, ChunkStorageMetadata) or not _is_shape(offset) or not _is_shape(sizes) or not len(offset) == len(sizes) == len(whole):
        return None
    if any(start + count > end for start, count, end in zip(offset, sizes, whole, strict=True)):
        return None
    return tuple(offset), tuple(sizes)


def disjoint(boxes: list[Box], rank: int) -> bool:
    """Whether no two boxes share an element.

    Straight cuts along one axis split the boxes into groups that cannot touch; each group is cut along the next axis, and so on around. A grid, and all that
    checkpoints are cut into, falls apart in n log n steps. What no cut separates is compared pair by pair; many such boxes count as overlapping.
    """
    pending = [(boxes, 0, 0)]
    while pending:
        group, axis, idle = pending.pop()
        if len(group) < 2:
            continue
        if idle >= rank:
            if len(group) > _PAIRWISE or any(_overlap(a, b) for index, a in enumerate(group) for b in group[index + 1 :]):
                return False
            continue
        groups = _cut(group, axis)
        pending += [(part, (axis + 1) % rank, idle + 1 if len(groups) == 1 else 0) for part in groups]
    return True


def _cut(boxes: list[Box], axis: int) -> list[list[Box]]:
    """Groups of boxes whose ranges along the axis are connected."""
    groups: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        if box[0][axis] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box[0][axis] + box[1][axis])
    return groups


def _overlap(a: Box, b: Box) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(*a, *b, strict=True))
