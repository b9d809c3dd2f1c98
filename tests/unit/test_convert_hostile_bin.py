"""Files of torch.save from strangers (`.bin`, `common.pt`, objects): each ends in one clear CheckpointError; nothing in it runs, floods or hangs."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hostile_folders import Attack, archive, refused, use

from megatron_skywork.convert.files.hf_files import HfReader
from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.convert.safety.archive_inspector import ArchiveInspector
from megatron_skywork.errors import CheckpointError

pytest_plugins = ("hostile_folders",)
pytestmark = pytest.mark.usefixtures("no_hang_and_no_flood")

# ------------------------------------------------------------------------------------------------------------------------------------ .bin


NAME = "model.norm.weight"


def test_a_bin_file_runs_nothing(copies: dict[str, Path], tmp_path: Path):
    path, target = copies["bin"] / "pytorch_model.bin", tmp_path / "hacked"
    for content in (pickle.dumps(Attack(target)), archive({"a": Attack(target)}), archive(Attack(target))):
        path.write_bytes(content)
        assert "pytorch_model.bin" in refused(copies["bin"])
    torch.save({"a": Attack(target)}, path, _use_new_zipfile_serialization=False)
    assert "pytorch_model.bin" in refused(copies["bin"])
    assert not target.exists()
    pickle.loads(pickle.dumps(Attack(target)))
    assert target.exists(), "the attack is a real one"


def test_bin_files_that_are_none(copies: dict[str, Path]):
    path = copies["bin"] / "pytorch_model.bin"
    content = path.read_bytes()
    for size in (0, 1, 10, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "pytorch_model.bin" in refused(copies["bin"])
    for value in ([1], 3, {"a": 3}, {3: torch.zeros(2)}, {NAME: {"nested": torch.zeros(2)}}):
        torch.save(value, path)
        refused(copies["bin"])


def test_packed_bin_files_are_not_unpacked(copies: dict[str, Path]):
    """500 MB of zeros in half a megabyte."""
    value = torch.load(copies["bin"] / "pytorch_model.bin", weights_only=True)
    content = archive(value, {"data/0": 500 << 20}, zipfile.ZIP_DEFLATED)
    assert len(content) < 2 << 20
    (copies["bin"] / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refused(copies["bin"])


def test_bin_tensors_that_pretend_to_be_large(copies: dict[str, Path]):
    """A tensor of 2^40 equal numbers takes no space as a view of one."""
    path = copies["bin"] / "pytorch_model.bin"
    value = torch.load(path, weights_only=True)
    torch.save({**value, NAME: torch.zeros(1).expand(1 << 40)}, path)
    refused(copies["bin"])
    config = json.loads((copies["bin"] / "config.json").read_text())
    (copies["bin"] / "config.json").write_text(json.dumps({**config, "vocab_size": 1 << 40}))
    wide = {name: torch.zeros(1, 1).expand(1 << 40, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    torch.save({**value, **wide}, path)
    refused(copies["bin"])


class Call:
    """Unpickling this calls something with arguments."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.content = (function, arguments, *(() if state is None else (state,)))

    def __reduce__(self) -> Any:
        return self.content


def nested_key() -> bytes:
    """{nested pairs: 1} by hand: hashing the key takes 2^60 steps."""
    return b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"K\x01s."


CLAIMS: dict[str, Callable[[], bytes]] = {
    "an array of bytes": lambda: archive({NAME: Call(bytearray, 1 << 33)}),
    "a tensor of a length": lambda: archive({NAME: Call(torch.FloatTensor, 1 << 31)}),
    "a tensor without storage": lambda: archive({NAME: Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (1 << 40,), (1,), False)}),
    "a sparse tensor": lambda: archive({NAME: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (1 << 40,))}),
    "a nested key": lambda: archive({NAME: 1}, {"data.pkl": nested_key()}),
    "a deep list": lambda: archive({NAME: 1}, {"data.pkl": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."}),
    "a longer storage": lambda: archive({NAME: torch.zeros(16)}, {"data/0": b"\0" * 60}),
    "no storage": lambda: archive({NAME: torch.zeros(16)}, {"data.pkl": pickled_storage("1", 16)}),
    "a huge storage": lambda: archive({NAME: torch.zeros(16)}, {"data.pkl": pickled_storage("0", 1 << 40)}),
    "an array whose flags say addresses": lambda: archive({NAME: Call(numpy.dtype, "u4", False, True, state=(3, "<", None, None, None, -1, -1, 63))}),
    "an array of objects": lambda: archive({NAME: numpy.array([[], {}], dtype=object)}),
    "a pickle that is too large": lambda: archive({NAME: 1}, {"data.pkl": b"\x80\x02N." + b"\0" * (40 << 20)}),
}


def pickled_storage(key: str, count: int) -> bytes:
    """The pickle of {NAME: a tensor of 16 numbers} with another storage."""
    buffer = io.BytesIO()
    torch.save({NAME: torch.zeros(16)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        content = next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
    length = pickle.dumps(count, protocol=2)[2:-1]
    # The key is a text of one letter, the count a byte behind the location.
    return content.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00" + key.encode(), 1).replace(b"cpuq\x06K\x10", b"cpuq\x06" + length, 1)


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "common.pt"])
def test_what_torch_would_allocate_or_hash_is_refused_before(copies: dict[str, Path], claim: str, name: str):
    folder = copies["bin" if name == "pytorch_model.bin" else "ours"]
    (folder / name).write_bytes(CLAIMS[claim]())
    write_marker(folder)
    if name == "common.pt" and claim in ("a deep list", "a pickle that is too large"):
        use(folder)  # plain data, as large as the file
    else:
        assert name in refused(folder)


def test_the_storages_of_the_claims_are_what_they_should_be():
    """Otherwise the two by hand would be refused for another reason."""
    for key, count, said in (("0", 16, None), ("1", 16, "holds 0"), ("0", 1 << 40, "holds 64")):
        inspector = ArchiveInspector(pickled_storage(key, count), {"0": 64})
        if said is None:
            assert inspector.load()[NAME].shape == (16,)
        else:
            with pytest.raises(pickle.UnpicklingError, match=said):
                inspector.load()


def test_an_archive_with_a_name_twice_is_refused(copies: dict[str, Path]):
    """Two readers may take two different records for the same one."""
    content = io.BytesIO(archive({NAME: torch.zeros(16)}))
    with zipfile.ZipFile(content, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    (copies["bin"] / "pytorch_model.bin").write_bytes(content.getvalue())
    assert "one name" in refused(copies["bin"])


def test_old_files_that_claim_more_than_they_hold(copies: dict[str, Path]):
    """The format before torch 1.6: storages are allocated by what the pickle says."""
    path = copies["bin"] / "pytorch_model.bin"
    value = torch.load(path, weights_only=True)
    expected = use(copies["bin"])
    torch.save(value, path, _use_new_zipfile_serialization=False)
    assert torch.equal(use(copies["bin"]), expected)
    torch.save({NAME: torch.zeros(16)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"cpuq\x06K\x10") == 1
    path.write_bytes(content.replace(b"cpuq\x06K\x10", b"cpuq\x06" + pickle.dumps(1 << 40, protocol=2)[2:-1]))
    assert "its tensors claim" in refused(copies["bin"])
    with tarfile.open(path, "w") as file:
        file.add(copies["bin"] / "config.json", "storages")
    assert "tar archive" in refused(copies["bin"])


def test_what_people_save_is_read(tmp_path: Path):
    """A module's state with its versions, parameters, slices and transposed views, tensors of one storage, other dtypes."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    base = torch.randn(6, 4)
    extra = {"slice": base[2:4], "turned": base.T, "parameter": torch.nn.Parameter(base), "empty": torch.zeros(0, 3), "one": torch.tensor(2.0),
             "bf16": base.bfloat16(), "bytes": torch.arange(4, dtype=torch.uint8), "fp8": base.to(torch.float8_e4m3fn)}  # fmt: skip
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    state.update(extra)
    for new in (True, False):
        if not new:
            del state["fp8"]  # torch itself cannot read these in its old format
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        reader = HfReader(tmp_path)
        assert set(reader.tensors) == set(state)
        for name, value in state.items():
            assert torch.equal(reader.read(name).float(), value.detach().float()), name


def test_random_flips_of_a_pickle_are_refused_or_harmless(copies: dict[str, Path]):
    """Most bytes of a file are numbers; here only the pickle is hit."""
    path = copies["bin"] / "pytorch_model.bin"
    value = {name: tensor for number, (name, tensor) in enumerate(torch.load(path, weights_only=True).items()) if number < 4}
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as file:
        content = next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
    generator, refusals = random.Random(0), 0
    for number in range(300):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 8])):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(archive(value, {"data.pkl": bytes(changed)}))
        try:
            HfReader(path.parent)
        except CheckpointError as error:
            refusals += 1
            assert str(error)
        except Exception as error:
            raise AssertionError(f"flips {number}: {type(error).__name__}: {error}") from error
    assert refusals > 100
