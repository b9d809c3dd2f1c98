"""`verify_folder`: any change to any file of a folder is named, and what could not be compared is said."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_folders import MODEL, MOE, ours_of, random_tensors, write_hf, write_ours

from megatron_skywork.convert.check.verify_manifest import refuse_if_wrong, verify_folder
from megatron_skywork.convert.files.checkpoint_folder import write_manifest
from megatron_skywork.convert.files.marker import seal_holds, sealed, write_marker
from megatron_skywork.errors import CheckpointError

KINDS = ("huggingface", "weights")


def with_manifest(folder: Path, kind: str, source: Any = None) -> Path:
    (folder / "complete.json").unlink(missing_ok=True)
    write_manifest(folder, {"kind": kind, "method": {"name": "copy", "exact": True}, "source": source or {}}, {})
    if kind == "weights":
        write_marker(folder)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("originals")
    tensors = random_tensors(MODEL, MOE)
    hf = write_hf(at / "hf", tensors, MODEL, MOE, "skywork_moe", shards=2)
    ours = write_ours(at / "ours", ours_of(tensors, MODEL, MOE), MODEL, MOE)
    (ours / "hf").mkdir()
    (ours / "hf" / "tokenizer.json").write_text("{}")
    return {"huggingface": with_manifest(hf, "huggingface"), "weights": with_manifest(ours, "weights")}


@pytest.fixture
def copies(originals: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {kind: Path(shutil.copytree(folder, tmp_path / kind)) for kind, folder in originals.items()}


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_folder_passes(originals: dict[str, Path], kind: str):
    lines = io.StringIO()
    result = verify_folder(originals[kind], progress=lines, finite=True)
    assert result["passed"] and result["problems"] == [] and result["kind"] == kind
    assert result["files"] == len(names(originals[kind])) and result["bytes"] == sum((originals[kind] / name).stat().st_size for name in names(originals[kind]))
    assert all(part in result["checked"] for part in ("SHA-256 against manifest.json", "names, shapes and dtypes", "finite"))
    assert "verify: " in lines.getvalue() and "100 %" in lines.getvalue()
    refuse_if_wrong(result)


@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_byte_anywhere_is_named(copies: dict[str, Path], kind: str):
    folder, random_ = copies[kind], random.Random(0)
    for name in names(folder):
        path = folder / name
        content = path.read_bytes()
        many = 40 if path.suffix == ".json" and "/" not in name else 8
        for offset in {0, len(content) - 1, *(random_.randrange(len(content)) for _ in range(many))}:
            changed = bytearray(content)
            changed[offset] ^= 1 << random_.randrange(8)
            path.write_bytes(changed)
            result = verify_folder(folder)
            assert not result["passed"] and any(name in problem for problem in result["problems"]), (name, offset, result["problems"])
        path.write_bytes(content)
    assert verify_folder(folder)["passed"]


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes"),
    "emptied": (lambda path: path.write_bytes(b""), "bytes"),
    "removed": (lambda path: path.unlink(), "missing"),
    "replaced by a folder": (lambda path: (path.unlink(), path.mkdir()), "missing"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_files_that_are_cut_or_gone_are_named(copies: dict[str, Path], kind: str, change: str):
    folder = copies[kind]
    for name in [name for name in names(folder) if name not in ("manifest.json", "complete.json", "model.yaml")]:
        path = folder / name
        content = path.read_bytes()
        CHANGES[change][0](path)
        problems = verify_folder(folder)["problems"]
        assert any(problem.startswith(f"{name}: ") and CHANGES[change][1] in problem for problem in problems), (name, problems)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
    assert verify_folder(folder)["passed"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_added_is_named(copies: dict[str, Path], kind: str):
    (copies[kind] / "hf").mkdir(exist_ok=True)
    (copies[kind] / "hf" / "evil.py").write_text("import os")
    result = verify_folder(copies[kind])
    assert any(problem == "hf/evil.py: is there, and not in manifest.json" for problem in result["problems"])
    with pytest.raises(CheckpointError, match="evil.py"):
        refuse_if_wrong(result)


def test_the_marker_is_needed_and_held_against_the_files(copies: dict[str, Path]):
    (copies["weights"] / "complete.json").unlink()
    assert any("complete.json: missing" in problem for problem in verify_folder(copies["weights"])["problems"])
    (copies["weights"] / "complete.json").write_text(json.dumps({"../outside": 3}))
    problems = verify_folder(copies["weights"])["problems"]
    assert any(problem.startswith("../outside: missing") for problem in problems) and any("no entry for it" in problem for problem in problems)


@pytest.mark.parametrize("entry", [3, {"bytes": "3"}, {"bytes": 3}, None])
def test_a_damaged_manifest_entry_is_named_even_under_a_valid_seal(copies: dict[str, Path], entry: object):
    folder = copies["huggingface"]
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    manifest["files"]["config.json"] = entry
    (folder / "manifest.json").write_text(sealed(manifest))
    assert verify_folder(folder)["problems"] == ["manifest.json: its entry for config.json is damaged"]


@pytest.mark.parametrize("name", ["../hf/config.json", "/etc/passwd"])
def test_a_manifest_that_leads_out_of_the_folder_is_not_followed(copies: dict[str, Path], name: str):
    folder = copies["huggingface"]
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(sealed(manifest))
    (problem,) = verify_folder(folder)["problems"]
    assert "outside the folder" in problem


def test_a_seal_is_the_hash_of_the_text():
    text = sealed({"a": "0" * 64, "b": [1, 2]})
    content = json.loads(text)
    assert seal_holds(text, content) and list(content) == ["a", "b", "seal"]
    assert hashlib.sha256(text.replace(content["seal"], "0" * 64).encode()).hexdigest() == content["seal"]
    for wrong in (text.replace("[", "[ "), text.replace("1", "7", 1), text + "\n"):
        assert not seal_holds(wrong, json.loads(wrong))
    assert not seal_holds("{}", {}) and not seal_holds('{"seal": 3}', {"seal": 3})


# ------------------------------------------------------------------------------------------------------------------------ without a manifest


def test_without_a_manifest_what_can_be_checked_is(copies: dict[str, Path]):
    for folder in copies.values():
        (folder / "manifest.json").unlink()
    result = verify_folder(copies["huggingface"])
    assert result["passed"] and "there is no manifest.json, so contents could not be compared" in result["checked"]
    os.truncate(next(copies["huggingface"].glob("*-00002-*")), 500)
    assert any("00002" in problem for problem in verify_folder(copies["huggingface"])["problems"])
    assert any("manifest.json: missing, and complete.json has" in problem for problem in verify_folder(copies["weights"])["problems"])
    write_marker(copies["weights"])
    assert verify_folder(copies["weights"])["passed"]


def into_cache(folder: Path, cache: Path) -> Path:
    """The folder as Hugging Face's cache keeps it: links of a snapshot into blobs that are called by their hash."""
    snapshot = cache / "models--a--b" / "snapshots" / "0123456789abcdef"
    (cache / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        content = path.read_bytes()
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        blob = cache / "models--a--b" / "blobs" / (hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else git)
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_files_of_a_cache_are_compared_with_what_they_are_called(copies: dict[str, Path], tmp_path: Path):
    (copies["huggingface"] / "manifest.json").unlink()
    snapshot = into_cache(copies["huggingface"], tmp_path / "cache")
    result = verify_folder(snapshot)
    assert result["passed"] and "contents of 4 files were compared with the hashes the cache calls them by" in result["checked"]
    for name in ("model-00001-of-00002.safetensors", "config.json"):
        blob = (snapshot / name).resolve()
        content = blob.read_bytes()
        blob.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert any(problem.startswith(f"{name}: its content differs") for problem in verify_folder(snapshot)["problems"])
        blob.write_bytes(content)


def test_a_link_out_of_the_folder_is_not_read(copies: dict[str, Path], tmp_path: Path):
    (tmp_path / "secret").write_text("{}")
    for folder in copies.values():
        (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
        assert any("tokenizer.json: is a link to" in problem for problem in verify_folder(folder)["problems"])


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        verify_folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        verify_folder(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------- names and values


def test_tensors_that_do_not_fit_are_named(tmp_path: Path):
    tensors = random_tensors(MODEL, MOE)
    del tensors["model.norm.weight"]
    tensors["extra"] = torch.zeros(2)
    folder = with_manifest(write_hf(tmp_path / "hf", tensors, MODEL, MOE, "skywork_moe"), "huggingface")
    problems = verify_folder(folder)["problems"]
    assert any("model.norm.weight: missing" in problem for problem in problems) and any("extra: left over" in problem for problem in problems)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_are_named_when_asked_for(tmp_path: Path, kind: str):
    tensors = random_tensors(MODEL, MOE)
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][0, 0] = float("nan")
    if kind == "huggingface":
        folder = write_hf(tmp_path / kind, tensors, MODEL, MOE, "skywork_moe")
    else:
        folder = write_ours(tmp_path / kind, ours_of(tensors, MODEL, MOE), MODEL, MOE)
    assert verify_folder(folder)["passed"]
    (problem,) = verify_folder(folder, finite=True)["problems"]
    expected = {"huggingface": "model.layers.1.block_sparse_moe.experts.3.w2.weight", "weights": "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"}
    assert problem == f"{expected[kind]}: has NaN or infinite numbers"


def test_a_training_checkpoint_says_so(copies: dict[str, Path]):
    folder = copies["weights"]
    (folder / "state.json").write_text(json.dumps({"step": 7}))
    with_manifest(folder, "weights")
    assert verify_folder(folder)["kind"] == "training"


# --------------------------------------------------------------------------------------------------------------------------------- source


def test_the_recorded_source_is_compared(copies: dict[str, Path], tmp_path: Path):
    one, two = copies["huggingface"], tmp_path / "two"
    shutil.copytree(one, two)
    (two / "config.json").write_text((two / "config.json").read_text() + " ")
    files = [{name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in names(place) if name != "manifest.json"} for place in (one, two)]
    folder = copies["weights"]
    with_manifest(folder, "weights", {"family": "llama", "files": files[0], "experts": [{"files": {k: {"sha256": v} for k, v in files[1].items()}}]})
    assert verify_folder(folder, source=[one, two])["passed"] and verify_folder(folder, source=two)["passed"]
    (one / "config.json").write_text("{}")
    os.remove(one / "model-00001-of-00002.safetensors")
    problems = verify_folder(folder, source=one)["problems"]
    assert problems == [f"source {one}: config.json differs", f"source {one}: model-00001-of-00002.safetensors is missing"]
    with_manifest(folder, "weights")
    assert any("does not say what the weights were made from" in problem for problem in verify_folder(folder, source=one)["problems"])
