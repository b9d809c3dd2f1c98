"""Is a checkpoint folder what it was when it was written? Every file against `manifest.json` and `complete.json`, every tensor against the weight table.

Works on any folder, ours or Hugging Face. Where there is no manifest, contents are compared with what else names them: the files of a Hugging Face cache are
called by their hash. What was compared and what could not be is part of the answer.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_skywork.convert.compare_names import check_ours
from megatron_skywork.convert.files.checkpoint_folder import MANIFEST, describe, is_ours, step_of
from megatron_skywork.convert.files.marker import MARKER, blob_hash, check_link, inside, list_files, marker_text, seal_holds
from megatron_skywork.convert.files.mcore_files import DistributedReader
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.progress import Progress
from megatron_skywork.convert.safety.safe_pickle import check_metadata
from megatron_skywork.convert.sources import open_hf
from megatron_skywork.errors import CheckpointError, UserError

_READ_BYTES = 4 << 20
_THREADS = 8


@dataclass
class _Findings:
    """What was compared, and what is wrong."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, error: UserError) -> None:
        """A refusal: its headline alone, or the lines below it."""
        lines = [line.strip() for line in str(error).splitlines()]
        self.problems += lines[1:] if len(lines) > 1 else lines


def verify_folder(
    folder: Path | str, source: Path | str | Sequence[Path | str] | None = None, progress: TextIO | None = None, finite: bool = False
) -> dict[str, Any]:
    """Check a folder against everything that says what it should be.

    Args:
        source: folders (or files) that its manifest should name as what it was made from; their contents are compared with the hashes recorded there.
        progress: where lines of progress go.
        finite: also read every tensor and name those with NaN or infinite numbers.

    Returns:
        folder, kind (`huggingface`, `weights`, `training`), files, bytes, checked (what was compared, in words), problems (one line each), passed.

    Raises:
        CheckpointError: there is no such folder, or it holds no checkpoint at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    kind = kind_of(folder)
    found = _Findings()
    files = _files(folder, found)
    manifest = _manifest(folder, files, found, progress)
    if kind != "huggingface":
        _marker(folder, found)
    _tensors(folder, kind, found, finite)
    if source is not None:
        _source(manifest, [source] if isinstance(source, (str, Path)) else list(source), found, progress)
    problems = list(dict.fromkeys(found.problems))
    sizes = [path.stat().st_size for path in files.values()]
    return {
        "folder": str(folder), "kind": kind, "files": len(sizes), "bytes": sum(sizes), "checked": "; ".join(found.checked), "problems": problems,
        "passed": not problems,
    }  # fmt: skip


def refuse_if_wrong(result: dict[str, Any]) -> None:
    """Raise a CheckpointError that names everything `verify_folder` found."""
    if not result["passed"]:
        raise CheckpointError(f"{result['folder']}: is not what it should be:\n" + "\n".join("  " + line for line in result["problems"]))


def kind_of(folder: Path) -> str:
    """`training`, `weights` or `huggingface`."""
    if is_ours(folder) or (folder / MARKER).is_file():
        try:
            return "weights" if step_of(folder) is None else "training"
        except CheckpointError:  # a damaged state.json; that there is one says enough here, and what is wrong with it is found below
            return "training"
    names = ("config.json", MANIFEST, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if any((folder / name).is_file() for name in names):
        return "huggingface"
    raise CheckpointError(f"{folder}: holds no checkpoint, neither a Hugging Face folder nor one of ours")


def _files(folder: Path, found: _Findings) -> dict[str, Path]:
    """Files of the folder that may be read."""
    files = {}
    for name in list_files(folder):
        try:
            check_link(folder, folder / name)
            files[name] = folder / name
        except CheckpointError as error:
            found.add(error)
    return files


# ------------------------------------------------------------------------------------------------------------------------- files by content


def _manifest(folder: Path, files: dict[str, Path], found: _Findings, progress: TextIO | None) -> dict[str, Any]:
    """Every file against the manifest, or where there is none against the hash a cache calls it by; returns the manifest."""
    expected: dict[str, tuple[str, str]] = {}
    manifest: dict[str, Any] = {}
    if MANIFEST in files:
        manifest = _read_manifest(folder, found)
        expected = {name: ("sha256", digest) for name, digest in _listed(folder, manifest, files, found)}
        found.problems += _unlisted(manifest, files)
        found.checked.append(f"every file's size and SHA-256 against {MANIFEST}")
    else:
        blobs = {name: blob for name, path in files.items() if path.is_symlink() and (blob := blob_hash(path))}
        expected = {name: ("sha256" if len(blob) == 64 else "git", blob) for name, blob in blobs.items()}
        compared = f"the contents of {len(blobs)} files were compared with the hashes the cache calls them by" if blobs else "contents could not be compared"
        found.checked.append(f"there is no {MANIFEST}, so {compared}")
    digests = _hash_all({(files[name], kind) for name, (kind, _) in expected.items()}, found, "verify", progress)
    for name, (kind, digest) in expected.items():
        got = digests.get((files[name], kind))
        if got is not None and got != digest:
            found.problems.append(f"{name}: its content differs, {kind} {got[:16]}..., recorded is {digest[:16]}...")
    return manifest


def _read_manifest(folder: Path, found: _Findings) -> dict[str, Any]:
    try:
        manifest = json_object(folder / MANIFEST)
        text = (folder / MANIFEST).read_bytes().decode("utf-8")
    except CheckpointError as error:
        found.add(error)
        return {}
    if not seal_holds(text, manifest):
        found.problems.append(f"{MANIFEST}: its seal is missing or broken; it was changed after it was written")
    return manifest


def _listed(folder: Path, manifest: dict[str, Any], files: dict[str, Path], found: _Findings) -> Iterator[tuple[str, str]]:
    """Files of the manifest that are there in the recorded size, with their hashes; the others are problems."""
    entries = manifest.get("files")
    if not isinstance(entries, dict):
        if manifest:
            found.problems.append(f"{MANIFEST}: lists no files")
        return
    for name, entry in entries.items():
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or not isinstance(digest, str):
            found.problems.append(f"{MANIFEST}: its entry for {name} is damaged")
            continue
        try:
            inside(folder, name, MANIFEST)
        except CheckpointError as error:
            found.add(error)
            continue
        if name not in files:
            found.problems.append(f"{name}: missing")
        elif files[name].stat().st_size != size:
            found.problems.append(f"{name}: {files[name].stat().st_size} bytes, {size} recorded")
        else:
            yield name, digest


def _unlisted(manifest: dict[str, Any], files: dict[str, Path]) -> list[str]:
    entries = manifest.get("files")
    strangers = [name for name in files if name not in entries and name not in (MANIFEST, MARKER)] if isinstance(entries, dict) else []
    return [f"{name}: is there, and not in {MANIFEST}" for name in strangers]


def recorded_hashes(folder: Path) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of the files that a manifest names and that are there in its sizes, and what is wrong with the rest; what it does not name is not looked at."""
    found = _Findings()
    files = _files(folder, found)
    return dict(_listed(folder, _read_manifest(folder, found), files, found)), found.problems


def _hash_all(wanted: Iterable[tuple[Path, str]], found: _Findings, label: str, progress: TextIO | None) -> dict[tuple[Path, str], str]:
    """Hashes of files, several at a time: hashing is slower than a good disk."""
    jobs = sorted(set(wanted))
    bar = Progress(label, sum(path.stat().st_size for path, _ in jobs), progress)
    lock = threading.Lock()

    def count(length: int) -> None:
        with lock:
            bar(length)

    digests: dict[tuple[Path, str], str] = {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        running = {job: pool.submit(_hash, *job, count) for job in jobs}
        for job, result in running.items():
            try:
                digests[job] = result.result()
            except OSError as error:
                found.problems.append(f"{job[0].name}: cannot be read ({error.strerror or error})")
    if jobs:
        bar.close()
    return digests


def _hash(path: Path, kind: str, count: Callable[[int], None]) -> str:
    """SHA-256 of a file, or with kind `git` the SHA-1 that git names its content by."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
            count(length)
    return digest.hexdigest()


def _marker(folder: Path, found: _Findings) -> None:
    """The completion marker must be what `write_marker` would write now."""
    found.checked.append(f"every file's size against {MARKER}")
    if not (folder / MARKER).is_file():
        found.problems.append(f"{MARKER}: missing, so this folder was never finished")
        return
    try:
        recorded = json_object(folder / MARKER)
    except CheckpointError as error:
        found.add(error)
        return
    sizes = {name: (folder / name).stat().st_size for name in list_files(folder) if name != MARKER}
    for name in sorted(sizes.keys() | recorded.keys()):
        if sizes.get(name) != recorded.get(name):
            there = f"{sizes[name]} bytes" if name in sizes else "missing"
            found.problems.append(f"{name}: {there}, and {MARKER} has {recorded.get(name, 'no entry for it')}")
    if sizes == recorded and (folder / MARKER).read_bytes() != marker_text(sizes).encode():
        found.problems.append(f"{MARKER}: was changed after it was written")


# ------------------------------------------------------------------------------------------------------------------------------- contents


def _tensors(folder: Path, kind: str, found: _Findings, finite: bool) -> None:
    """Names, shapes and dtypes of all tensors against the table, for a sharded folder its index too."""
    found.checked.append("names, shapes and dtypes of all tensors against the model's description")
    try:
        if kind == "huggingface":
            reader: Any = open_hf(folder).reader
        else:
            model, moe = describe(folder)
            check_metadata(folder)
            reader = DistributedReader(folder)
            check_ours(reader, model, moe)
        if finite:
            found.checked.append("every number is finite")
            found.problems += [f"{name}: has NaN or infinite numbers" for name in reader.tensors if not _finite(reader, name)]
    except UserError as error:
        found.add(error)
    except OSError as error:
        found.problems.append(f"{error.filename or folder}: cannot be read ({error.strerror or error})")


def _finite(reader: Any, name: str) -> bool:
    """Whether all numbers of a tensor are; those of experts one at a time, so that a layer of them is never whole."""
    shape = reader.tensors[name].shape
    if len(shape) < 3:
        return bool(torch.isfinite(reader.read(name)).all())
    return all(bool(torch.isfinite(reader.read(name, (index, *[0] * (len(shape) - 1)), (1, *shape[1:]))).all()) for index in range(shape[0]))


# --------------------------------------------------------------------------------------------------------------------------------- source


def _source(manifest: dict[str, Any], given: list[Path | str], found: _Findings, progress: TextIO | None) -> None:
    """Folders against what the manifest says the weights were made from."""
    recorded = list(_recorded(manifest.get("source")))
    found.checked.append(f"{len(given)} given source{'s' if len(given) > 1 else ''} against {MANIFEST}")
    if not recorded:
        found.problems.append(f"{MANIFEST}: does not say what the weights were made from, so the source cannot be compared")
        return
    for place in map(Path, given):
        base = place if place.is_dir() else place.parent
        there = {base / name for files in recorded for name in files if (base / name).is_file()}
        digests = _hash_all({(path, "sha256") for path in there}, found, f"verify {place.name}", progress)
        wrong = [[name for name, digest in files.items() if digests.get((base / name, "sha256")) != digest] for files in recorded]
        found.problems += [f"source {place}: {name} {'differs' if base / name in there else 'is missing'}" for name in min(wrong, key=len)]


def _recorded(source: Any) -> Iterator[dict[str, Any]]:
    """Every list of files with hashes, however deep: one source has one, experts from several models have several."""
    if isinstance(source, list):
        for item in source:
            yield from _recorded(item)
    elif isinstance(source, dict):
        files = source.get("files")
        if isinstance(files, dict) and files:
            yield {name: entry.get("sha256") if isinstance(entry, dict) else entry for name, entry in files.items()}
        for name, item in source.items():
            if name != "files":
                yield from _recorded(item)
