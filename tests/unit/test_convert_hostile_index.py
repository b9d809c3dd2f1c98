"""Distributed checkpoints from strangers: a crafted index ends in one clear CheckpointError; nothing in it runs, nothing large is allocated, nothing hangs."""

from __future__ import annotations

import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_folders import Attack, archive, refused
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.convert.safety import index_rules, safe_pickle

pytest_plugins = ("hostile_folders",)
pytestmark = pytest.mark.usefixtures("no_hang_and_no_flood")

# ----------------------------------------------------------------------------------------------------------------- distributed checkpoints


def change_index(folder: Path, change: Callable[[Metadata], Any]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    write_marker(folder)


KEY = "decoder.layers.0.mlp.linear_fc2.weight"
EXPERTS = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"
LARGE = 1 << 60
BOX = torch.Size((LARGE, 2, 2))


def entry_of(index: Metadata, key: str = EXPERTS) -> Any:
    return index.state_dict_metadata[key]


def place_of(index: Metadata, key: str = EXPERTS) -> _StorageInfo:
    return next(info for at, info in index.storage_data.items() if at.fqn == key)


def halves(index: Metadata, second: int) -> None:
    """The tensor in two boxes along its last axis, the second one beginning at `second`; both in the same place of the file."""
    entry, place = entry_of(index), place_of(index)
    shape, half = entry.size, entry.size[2] // 2
    entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0, start)), torch.Size((*shape[:2], half))) for start in (0, second)]
    index.storage_data.update({MetadataIndex(EXPERTS, chunk.offsets): place for chunk in entry.chunks})


def many(index: Metadata, count: int) -> None:
    """A tensor so often as large as the file: `count` boxes, side by side, all in one place."""
    entry, place = entry_of(index), place_of(index)
    shape = entry.size
    entry.size = torch.Size((count * shape[0], *shape[1:]))
    entry.chunks = [ChunkStorageMetadata(torch.Size((number * shape[0], 0, 0)), shape) for number in range(count)]
    index.storage_data.update({MetadataIndex(EXPERTS, chunk.offsets): place for chunk in entry.chunks})


def whole_file(index: Metadata) -> None:
    """A box whose place is a file of 2 GiB, which takes none on the disk."""
    place_of(index).__dict__.update(relative_path="sparse.distcp", offset=0, length=2 << 30)


INDEX_CHANGES: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "offset beyond the file": (lambda index: setattr(place_of(index), "offset", 1 << 40), "which has"),
    "length beyond the file": (lambda index: setattr(place_of(index), "length", 1 << 40), "which has"),
    "offset negative": (lambda index: setattr(place_of(index), "offset", -1), "lies at offset -1"),
    "offset a text": (lambda index: setattr(place_of(index), "offset", "0"), "lies at offset '0'"),
    "offset of a million digits": (lambda index: setattr(place_of(index), "offset", 10**1_000_000), "bits"),
    "length too short for the box": (lambda index: setattr(place_of(index), "length", 100), "needs"),
    "file missing": (lambda index: setattr(place_of(index), "relative_path", "__9_9.distcp"), "missing: __9_9.distcp"),
    "file outside": (lambda index: setattr(place_of(index), "relative_path", "../__0_0.distcp"), "outside the folder"),
    "file no text": (lambda index: setattr(place_of(index), "relative_path", ["a"]), "not a file name"),
    "file unset": (lambda index: place_of(index).__dict__.pop("relative_path"), "not a file name"),
    "transformed": (lambda index: setattr(place_of(index), "transform_descriptors", ["zstd"]), "transformation"),
    "shape of 2^60": (lambda index: setattr(entry_of(index), "size", torch.Size((LARGE, LARGE, 2))), "cover|outside|lie"),
    "shape and box of 2^60": (
        lambda index: (setattr(entry_of(index), "size", BOX), setattr(entry_of(index).chunks[0], "sizes", BOX)), "needs"),
    "box too long": (lambda index: setattr(entry_of(index).chunks[0], "sizes", torch.Size((5, 16, 24))), "inside its shape"),
    "box moved": (lambda index: setattr(entry_of(index).chunks[0], "offsets", torch.Size((1, 0, 0))), "inside its shape"),
    "box of another rank": (lambda index: setattr(entry_of(index).chunks[0], "sizes", torch.Size((4, 16))), "inside its shape"),
    "box a text": (lambda index: entry_of(index).chunks.__setitem__(0, "box"), "inside its shape"),
    "boxes overlap": (lambda index: halves(index, 6), "overlap"),
    "boxes with a hole": (lambda index: (halves(index, 12), entry_of(index).chunks.pop()), "cover"),
    "a box twice": (lambda index: entry_of(index).chunks.append(entry_of(index).chunks[0]), "overlap"),
    "no boxes": (lambda index: entry_of(index).chunks.clear(), "cover"),
    "box without a place": (lambda index: [index.storage_data.pop(at) for at in list(index.storage_data) if at.fqn == EXPERTS], "no place"),
    "another dtype": (lambda index: setattr(entry_of(index).properties, "dtype", torch.int32), "dtype|not the tensor"),
    "another tensor's place": (
        lambda index: place_of(index).__dict__.update(vars(place_of(index, "embedding.word_embeddings.weight"))), "not the tensor|needs"),
    "many boxes in one place": (lambda index: many(index, 100), "share places"),
    "a place of the whole file": (lambda index: whole_file(index), "many more than the box needs"),
    "no size": (lambda index: entry_of(index).__dict__.pop("size"), "damaged"),
    "entry a number": (lambda index: index.state_dict_metadata.update({KEY: 3}), "unknown kind"),
    "key a number": (lambda index: index.state_dict_metadata.update({3: entry_of(index)}), "unknown kind"),
    "no entries": (lambda index: setattr(index, "state_dict_metadata", None), "is not the index"),
    "no places": (lambda index: index.__dict__.pop("storage_data"), "is not the index"),
}  # fmt: skip


@pytest.mark.parametrize("change", INDEX_CHANGES)
def test_an_index_that_does_not_fit_its_files(copies: dict[str, Path], change: str):
    with open(copies["ours"] / "sparse.distcp", "wb") as file:
        file.truncate(2 << 30)
    change_index(copies["ours"], INDEX_CHANGES[change][0])
    text = refused(copies["ours"])
    assert re.search(INDEX_CHANGES[change][1], text), text


def test_everything_wrong_in_an_index_is_listed_up_to_a_limit(copies: dict[str, Path]):
    def change(index: Metadata) -> None:
        index.storage_data.update({MetadataIndex(f"decoder.x{number}"): _StorageInfo("__0_0.distcp", 1 << 40, 1) for number in range(100)})

    change_index(copies["ours"], change)
    text = refused(copies["ours"])
    assert text.count("\n") == 21 and "more" in text.splitlines()[-1]


def nested(depth: int) -> tuple[Any, ...]:
    """A tuple of 2^depth leaves in a few bytes; hashing or printing it takes forever."""
    value: tuple[Any, ...] = ()
    for _ in range(depth):
        value = (value, value)
    return value


class Record:
    """Pickles as a call of a class with a state."""

    def __init__(self, kind: Any, arguments: tuple[Any, ...], state: Any = None):
        self.content = (kind, arguments, state)

    def __reduce__(self) -> Any:
        return self.content


BOMBS: dict[str, Callable[[], bytes]] = {
    "memo number": lambda: b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 1) + b".",
    "text memo number": lambda: b"}p4000000000\n.",
    "bytes": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "bytearray": lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "text": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b".",
    "frame": lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
    "nested key": lambda: nested_key(),
    "nested field": lambda: pickle.dumps(Metadata({}, None, {MetadataIndex("a"): Record(_StorageInfo, (nested(60), nested(60), nested(60)))})),
    "nested index key": lambda: nested_index_key(),
    "nested layout": lambda: pickle.dumps(Record(torch.serialization._get_layout, (nested(60),))),
    "deep": lambda: b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "persistent": lambda: b"Pname\n.",
    "extension": lambda: b"\x80\x02\x82\x01.",
    "state for a class": lambda: b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}X\x08\x00\x00\x00__hash__Ns\x86b.",
    "a million places": lambda: pickle.dumps({MetadataIndex(str(number)): number for number in range(20_000)}),
}


def nested_key() -> bytes:
    """{nested(60): 1}, written by hand: the pickler itself would hash it."""
    return b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"K\x01s."


def nested_index_key() -> bytes:
    """{MetadataIndex(fqn=nested(60)): 1}."""
    make = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)" + b"q\x01h\x01\x86" * 60 + b"\x85R"
    return b"\x80\x02}" + make + b"K\x01s."


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_index_that_is_a_bomb(copies: dict[str, Path], bomb: str):
    (copies["ours"] / ".metadata").write_bytes(BOMBS[bomb]())
    write_marker(copies["ours"])
    assert ".metadata" in refused(copies["ours"])


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_distributed_checkpoint_runs_nothing(copies: dict[str, Path], tmp_path: Path, name: str):
    folder, target = copies["ours"], tmp_path / "hacked"
    if name == ".metadata":
        (folder / name).write_bytes(pickle.dumps(Attack(target)))
    elif name == "common.pt":
        (folder / name).write_bytes(archive({"a": Attack(target)}))
    else:
        index = pickle.loads((folder / ".metadata").read_bytes())
        (at,) = [at for at in index.storage_data if "_extra_state" in at.fqn]
        content = archive([Attack(target)])
        size = (folder / name).stat().st_size
        with open(folder / name, "ab") as file:
            file.write(content)
        change_index(folder, lambda index: index.storage_data[at].__dict__.update(offset=size, length=len(content)))
    write_marker(folder)
    text = refused(folder)
    assert name in text and "\n" not in text and not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage" * 100, pickle.dumps({"a": 1}), archive({"a": torch.zeros(8)})[:-30]], ids=range(5))
def test_common_settings_that_are_none(copies: dict[str, Path], content: bytes):
    (copies["ours"] / "common.pt").write_bytes(content)
    write_marker(copies["ours"])
    assert "common.pt" in refused(copies["ours"])


def test_packed_objects_are_not_unpacked(copies: dict[str, Path]):
    (copies["ours"] / "common.pt").write_bytes(archive(torch.zeros(1 << 20), {"data/0": 500 << 20}, zipfile.ZIP_DEFLATED))
    write_marker(copies["ours"])
    assert "compressed records" in refused(copies["ours"])


def test_many_boxes_that_no_cut_separates_are_refused_quickly():
    pinwheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert index_rules.disjoint(pinwheel, 2), "a pinwheel has no straight cut, and no overlap"
    assert not index_rules.disjoint([*pinwheel, ((1, 1), (1, 1))], 2)
    grid = [((row, 2 * column, 0), (1, 2, 5)) for row in range(100) for column in range(100)]
    random.Random(0).shuffle(grid)
    assert index_rules.disjoint(grid, 3) and not index_rules.disjoint([*grid, ((50, 51, 4), (1, 1, 1))], 3)
    assert not index_rules.disjoint([((number, number), (10_000, 10_000)) for number in range(5000)], 2)


@pytest.mark.parametrize("boxes", range(30))
def test_overlaps_are_found_as_by_painting(boxes: int):
    """Random boxes of a small cube against counting its cells."""
    generator = random.Random(boxes)
    found = []
    painted = torch.zeros(4, 4, 4, dtype=torch.int64)
    for _ in range(generator.randrange(1, 6)):
        start = [generator.randrange(4) for _ in range(3)]
        size = [generator.randrange(1, min(3, 5 - at)) for at in start]
        painted[tuple(slice(at, at + count) for at, count in zip(start, size, strict=True))] += 1
        found.append((tuple(start), tuple(size)))
    assert index_rules.disjoint(found, 3) == bool(painted.max() <= 1)


def test_the_inspector_refuses_what_the_fast_reader_would_choke_on():
    """The bombs are real: without `_Inspector` the fast unpickler would clear 64 GiB for this one."""
    with pytest.raises(pickle.UnpicklingError, match="memo number"):
        safe_pickle._Inspector(b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 1) + b".").load()
