"""Hugging Face folders from strangers, and any folder with flipped bytes: each ends in one clear CheckpointError; nothing runs, floods or hangs."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_folders import refused, use

from megatron_skywork.convert.check.verify_manifest import verify_folder
from megatron_skywork.convert.files.marker import write_marker
from megatron_skywork.convert.import_hf import import_hf
from megatron_skywork.errors import CheckpointError, ConfigError

pytest_plugins = ("hostile_folders",)
pytestmark = pytest.mark.usefixtures("no_hang_and_no_flood")

# ----------------------------------------------------------------------------------------------------------------------------- safetensors


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_truncated_at_many_places(copies: dict[str, Path]):
    path = copies["hf"] / "model.safetensors"
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for size in [0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9, len(content) // 2, len(content) - 4, len(content) - 1]:
        path.write_bytes(content[:size])
        assert "model.safetensors" in refused(copies["hf"])
    path.write_bytes(content + b"\0")
    assert "model.safetensors" in refused(copies["hf"])


HEADER_LENGTHS = [0, 1, 1 << 20, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("length", HEADER_LENGTHS, ids=str)
def test_header_lengths(copies: dict[str, Path], length: int):
    path = copies["hf"] / "model.safetensors"
    header, data = parts_of(path)
    put_together(path, header, data, length)
    assert "model.safetensors" in refused(copies["hf"])


HEADERS = [
    b"not json", b"[]", b"3", b'"a"', b"{", b"[" * 200_000, b"\xff\xfe", b"{}", b'{"a": 3}', b'{"a": {"dtype": "F32"}}']  # fmt: skip


@pytest.mark.parametrize("text", HEADERS, ids=repr)
def test_headers_that_are_none(copies: dict[str, Path], text: bytes):
    path = copies["hf"] / "model.safetensors"
    put_together(path, text, parts_of(path)[1])
    refused(copies["hf"])


NAME, OTHER = "model.norm.weight", "model.layers.0.input_layernorm.weight"
ENTRIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "offsets swapped": lambda header: header[NAME]["data_offsets"].reverse(),
    "offsets overlap": lambda header: header[NAME].update(data_offsets=header[OTHER]["data_offsets"]),
    "a gap": lambda header: header[NAME].update(data_offsets=[value + 4 for value in header[NAME]["data_offsets"]]),
    "offsets beyond the file": lambda header: header[NAME].update(data_offsets=[1 << 40, (1 << 40) + 64]),
    "offsets negative": lambda header: header[NAME].update(data_offsets=[-64, 0]),
    "offsets of 2^64": lambda header: header[NAME].update(data_offsets=[1 << 64, (1 << 64) + 64]),
    "offsets as text": lambda header: header[NAME].update(data_offsets=["0", "64"]),
    "shape larger": lambda header: header[NAME].update(shape=[17]),
    "shape of 2^60": lambda header: header[NAME].update(shape=[1 << 60]),
    "shape that overflows": lambda header: header[NAME].update(shape=[1 << 62, 16, 1 << 62]),
    "shape negative": lambda header: header[NAME].update(shape=[-16]),
    "shape nested": lambda header: header[NAME].update(shape=[[16]]),
    "dtype wider": lambda header: header[NAME].update(dtype="F64"),
    "dtype unknown": lambda header: header[NAME].update(dtype="F31"),
    "dtype a number": lambda header: header[NAME].update(dtype=3),
    "integers": lambda header: header[NAME].update(dtype="I32"),
    "renamed": lambda header: header.update({"model.norm.wei\nght\x1b[2J": header.pop(NAME)}),
    "gone": lambda header: header.pop(NAME),
}


@pytest.mark.parametrize("change", ENTRIES)
def test_entries_that_do_not_fit(copies: dict[str, Path], change: str):
    path = copies["hf"] / "model.safetensors"
    header, data = parts_of(path)
    ENTRIES[change](header)
    put_together(path, header, data)
    refused(copies["hf"])


def test_a_name_given_twice(copies: dict[str, Path]):
    path = copies["hf"] / "model.safetensors"
    header, data = parts_of(path)
    text = json.dumps(header)
    again = json.dumps({OTHER: header[OTHER]})[1:-1]
    moved = again.replace(json.dumps(header[OTHER]["data_offsets"]), json.dumps(header[NAME]["data_offsets"]))
    put_together(path, f"{text[:-1]}, {moved}}}".encode(), data)
    refused(copies["hf"])


# ----------------------------------------------------------------------------------------------------------------------- index and links


INDEX_NAMES = [
    "../model.safetensors", "/etc/passwd", "a/../../b", "", ".", "..", "\0", 3, None, ["a"], {"a": 1}, "C:\\x", "\\\\host\\x",
    "a" * 5000, "a/" * 5000, "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", INDEX_NAMES)
def test_index_names(copies: dict[str, Path], name: object):
    path = copies["sharded"] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NAME] = name
    path.write_text(json.dumps(index))
    refused(copies["sharded"])


INDEX_FILES = [
    "", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "[" * 200_000, "[" * 100 + "]" * 100,
    '{"weight_map": {"a": "b"}}', "\x00"]  # fmt: skip


@pytest.mark.parametrize("text", INDEX_FILES)
def test_index_files(copies: dict[str, Path], text: str):
    (copies["sharded"] / "model.safetensors.index.json").write_text(text)
    refused(copies["sharded"])


def test_an_index_that_disagrees_with_its_shards(copies: dict[str, Path]):
    path = copies["sharded"] / "model.safetensors.index.json"
    original = json.loads(path.read_text())
    first, second = sorted(set(original["weight_map"].values()))
    for change in ({NAME: second if original["weight_map"][NAME] == first else first}, {"extra": first}):
        path.write_text(json.dumps({"weight_map": {**original["weight_map"], **change}}))
        assert next(iter(change)) in refused(copies["sharded"])
    left_out = {name: file for name, file in original["weight_map"].items() if name != NAME}
    path.write_text(json.dumps({"weight_map": left_out}))
    assert f"{NAME}: in " in refused(copies["sharded"])


@pytest.mark.parametrize("kind", ["hf", "sharded", "ours", "bin"])
def test_links_out_of_the_folder_are_not_followed(copies: dict[str, Path], tmp_path: Path, kind: str):
    folder = copies[kind]
    for name in [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".distcp")]:
        outside = tmp_path / f"outside-{name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)
    assert "is a link to" in refused(folder)


@pytest.mark.parametrize("kind", ["hf", "sharded", "bin"])
def test_links_of_a_hugging_face_cache_are_followed(copies: dict[str, Path], tmp_path: Path, kind: str):
    """`snapshots/REVISION/NAME` -> `../../blobs/HASH`, and the folder itself may be a link too."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "main"
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(copies[kind].iterdir())):
        blob = blobs / f"{number:064x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (tmp_path / "link").symlink_to(snapshot)
    expected = use(copies[kind])
    assert torch.equal(use(snapshot), expected) and torch.equal(use(tmp_path / "link"), expected)
    name = "config.json"
    (snapshot / name).unlink()
    (blobs / "not-a-hash").write_bytes((copies[kind] / name).read_bytes())
    (snapshot / name).symlink_to(blobs / "not-a-hash")
    assert "is a link to" in refused(snapshot)


# ----------------------------------------------------------------------------------------------------------------------------- config.json

KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings",
        "rms_norm_eps", "rope_theta", "rope_parameters", "head_dim", "model_type", "tie_word_embeddings", "initializer_range", "num_experts",
        "num_experts_per_tok", "moe_gate_norm_std", "moe_layer_indices", "moe_use_logits_norm", "hidden_act")  # fmt: skip
VALUES = ["text", "16", "", [], [[[1]]], {}, {"a": [1]}, True, -1, 0, 1.5, float("nan"), float("inf"), -float("inf"), 10**30, 10**400, 1 << 62, 9999, None,
          [1, "a", None], {"rope_theta": 10**400}, {"rope_type": "llama3", "factor": 10**400}, [7], [10**400]]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_nonsense_in_the_config_is_refused_or_harmless(copies: dict[str, Path], key: str):
    path = copies["sharded"] / "config.json"
    config = json.loads(path.read_text())
    for value in VALUES:
        path.write_text(json.dumps({**config, key: value}))
        try:
            use(copies["sharded"])
        except (CheckpointError, ConfigError) as error:
            assert len(str(error)) < 20_000, (key, value)
        except Exception as error:
            raise AssertionError(f"{key}={value!r}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 200_000, '{"a": ' * 100_000, "\x00\x01", '{"model_type": "llama"}', '{"num_hidden_layers": 1e999}'])
def test_configs_that_are_none(copies: dict[str, Path], text: str):
    (copies["hf"] / "config.json").write_text(text)
    refused(copies["hf"])
    (copies["hf"] / "config.json").write_bytes(b"\xff\xfe{}")
    refused(copies["hf"])


def test_claims_of_many_experts_or_layers_make_no_list_of_names(copies: dict[str, Path]):
    """The schema allows these numbers; names for all of them would fill the memory."""
    path = copies["sharded"] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_experts": [65_536]}))
    assert "description claims" in refused(copies["sharded"])
    path.write_text(json.dumps({**config, "num_hidden_layers": 10_000, "num_experts": [10_000]}))
    assert "description claims" in refused(copies["sharded"])
    dense = json.loads((copies["hf"] / "config.json").read_text())
    (copies["hf"] / "config.json").write_text(json.dumps({**dense, "num_hidden_layers": 1000}))
    lines = refused(copies["hf"]).splitlines()
    assert "8982 tensors" in lines[0] and "8942 more" in lines[-1]
    model = (copies["ours"] / "model.yaml").read_text()
    (copies["ours"] / "model.yaml").write_text(model.replace("num_experts: 4", "num_experts: 65536"))
    write_marker(copies["ours"])
    assert "description claims" in refused(copies["ours"])


MODEL_FILES = {
    "sections that are none": b"model: 3\nmoe: [1]\n",
    "no sections": b"- 1\n",
    "no text": b"\xff\xfe\x00",
    "no MoE layers": None,
    "settings that are none": b"model:\n  num_layers: [1]\nmegatron: 3\n",
    "too long": b"# " + b"x" * (2 << 20),
    "nested": b"model: " + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", MODEL_FILES)
def test_model_files_that_are_none(copies: dict[str, Path], kind: str):
    path = copies["ours"] / "model.yaml"
    path.write_bytes(MODEL_FILES[kind] or path.read_bytes() + b"  layers: []\n")
    write_marker(copies["ours"])
    assert "model.yaml" in refused(copies["ours"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.yaml", "metadata.json", ".metadata", "common.pt", "__0_0.distcp"])
def test_pipes_and_endless_files_are_not_waited_for(copies: dict[str, Path], name: str):
    """An archive can carry a pipe that nobody fills, and a file of 4 GiB of zeros that takes no place."""
    folder = copies["hf" if name in ("config.json", "model.safetensors") else "ours"]
    (folder / name).unlink()
    os.mkfifo(folder / name)
    write_marker(folder)
    refused(folder)
    (folder / name).unlink()
    with open(folder / name, "wb") as file:
        file.truncate(1 << 32)
    write_marker(folder)
    refused(folder)


def test_control_characters_of_names_are_not_printed(copies: dict[str, Path]):
    path = copies["hf"] / "model.safetensors"
    header, data = parts_of(path)
    header["\x1b[2J\x07"] = header.pop(NAME)
    put_together(path, header, data)
    text = refused(copies["hf"])
    assert "\x1b" not in text and "\\x1b[2J\\x07" in text
    header["a" * 100_000] = header.pop("\x1b[2J\x07")
    put_together(path, header, data)
    refused(copies["hf"])
    index = copies["sharded"] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["\ud800"] = content["weight_map"][NAME]
    index.write_text(json.dumps(content))
    refused(copies["sharded"]).encode()


def test_carried_files_are_no_links_out_of_the_folder(copies: dict[str, Path], tmp_path: Path):
    """An import copies the tokenizer; what a link leads to is not the sender's to give."""
    (tmp_path / "secret").write_text("{}")
    (copies["hf"] / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link to"):
        import_hf(copies["hf"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------------------- byte flips


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "names"), [
    ("hf", ["model.safetensors", "config.json"]), ("sharded", ["model.safetensors.index.json", "config.json"]), ("bin", ["pytorch_model.bin"]),
    ("ours", [".metadata", "metadata.json", "common.pt", "model.yaml", "complete.json", "__0_0.distcp"])])  # fmt: skip
def test_random_flips_are_refused_or_harmless(copies: dict[str, Path], kind: str, names: list[str], seed: int):
    """Seeded flips in headers and metadata: a clear refusal or a result, never another exception, a hang or a flood."""
    generator = random.Random(seed)
    folder, refusals = copies[kind], 0
    for number in range(60):
        path = folder / names[number % len(names)]
        content = path.read_bytes()
        changed = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 8])):
            changed[generator.randrange(min(len(content), 6000))] = generator.randrange(256)
        path.write_bytes(changed)
        if path.name != "complete.json" and kind == "ours":
            write_marker(folder)
        try:
            use(folder)
        except (CheckpointError, ConfigError) as error:
            refusals += 1
            assert str(error)
        except Exception as error:
            raise AssertionError(f"{path.name}, flips of seed {seed} number {number}: {type(error).__name__}: {error}") from error
        verify_folder(folder)
        path.write_bytes(content)
        if kind == "ours":
            write_marker(folder)
    assert refusals > 10
