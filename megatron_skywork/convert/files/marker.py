"""The completion marker: `complete.json`, the size of every file of a checkpoint folder, written last.

A folder without it was interrupted while being written and is never read. Sizes notice a truncated file; a flipped bit is noticed by `manifest.json`
(SHA-256) where a folder has one, because neither safetensors nor torch's files carry checksums that are verified on load. The manifest in turn is sealed: it
carries the SHA-256 of its own text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_skywork.convert.safety.shown import first_lines
from megatron_skywork.errors import CheckpointError

MARKER = "complete.json"
SEAL = "seal"
_BLANK = "0" * 64
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def write_marker(folder: Path | str) -> None:
    """Record the size of every file below `folder` in its `complete.json`, durably; the last write of a checkpoint."""
    folder = Path(folder)
    sizes = {name: (folder / name).stat().st_size for name in list_files(folder) if name != MARKER}
    temporary = folder / (MARKER + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(marker_text(sizes))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MARKER)
    fsync(folder)


def marker_text(sizes: dict[str, int]) -> str:
    """What a marker of these sizes holds, to the byte."""
    return json.dumps(sizes, indent=1, sort_keys=True) + "\n"


def is_complete(folder: Path | str) -> bool:
    """Whether the folder carries a completion marker (its sizes are not looked at)."""
    return (Path(folder) / MARKER).is_file()


def check_marker(folder: Path | str) -> dict[str, int]:
    """Sizes recorded in the marker, after comparing them with the files.

    Raises:
        CheckpointError: no folder, no marker, or files that are missing or of another size, all of them listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if not is_complete(folder):
        raise CheckpointError(
            f"{folder}: no {MARKER}, so this folder was never finished (the marker is written last); use another checkpoint, or write this one again"
        )
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / MARKER}: cannot be read as JSON ({error}); the folder is damaged") from error
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        raise CheckpointError(f"{folder / MARKER}: expected file names with their sizes in bytes; the folder is damaged")
    problems = []
    for name, size in sizes.items():
        path = inside(folder, name, MARKER)
        if not path.is_file():
            problems.append(f"{name}: missing ({size} bytes expected)")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes, {size} expected")
    if problems:
        raise CheckpointError(f"{folder}: files differ from {MARKER}; the folder is damaged:\n" + "\n".join("  " + line for line in first_lines(problems)))
    return sizes


def sealed(content: dict[str, Any]) -> str:
    """JSON text of a manifest, with the SHA-256 of that text, its own digits taken as zeros, as its last entry."""
    text = json.dumps({**content, SEAL: _BLANK}, indent=1) + "\n"
    before, _, after = text.rpartition(_BLANK)
    return before + hashlib.sha256(text.encode()).hexdigest() + after


def seal_holds(text: str, content: dict[str, Any]) -> bool:
    """Whether a manifest is what `sealed` wrote, to the byte; `content` is what the text says."""
    seal = content.get(SEAL)
    if not isinstance(seal, str) or len(seal) != 64 or seal == _BLANK:
        return False
    before, found, after = text.rpartition(seal)
    return bool(found) and hashlib.sha256((before + _BLANK + after).encode()).hexdigest() == seal


def list_files(folder: Path) -> list[str]:
    """Every regular file below the folder, as sorted relative names with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def inside(folder: Path, name: object, said_by: str) -> Path:
    """`folder / name`, where `name` was read from a file and must not lead out of the folder, by itself or by a link (see `check_link`)."""
    if not isinstance(name, str) or not _is_name(name):
        raise CheckpointError(f"{folder}: {said_by} names the file {reprlib.repr(name)}, which is not a file name")
    parts = Path(name.replace("\\", "/")).parts
    if not parts or Path(name).is_absolute() or ".." in parts or name.startswith("\\") or ":" in parts[0]:
        raise CheckpointError(f"{folder}: {said_by} names the file {reprlib.repr(name)}, which lies outside the folder; nothing was read from it")
    check_link(folder, folder / name)
    return folder / name


def _is_name(name: str) -> bool:
    """Whether an operating system takes it: neither empty nor with a NUL or half a character in it, and not too long."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(encoded) and b"\0" not in encoded and len(encoded) < 2048 and all(len(part) <= 255 for part in encoded.split(b"/"))


def check_link(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of the folder: an archive or a repository can carry links, and a copied folder must not bring along what one points to.

    The one exception is how Hugging Face's cache keeps files: `snapshots/REVISION/NAME` is a link into `blobs/` beside `snapshots/`, whose files are named by
    the hash of their content. Any link to such a blob is followed, from wherever: what lies there was downloaded from the hub.

    Raises:
        CheckpointError: names the link and where it leads.
    """
    root, target = os.path.realpath(folder), Path(os.path.realpath(path))
    if target.is_relative_to(root) or blob_hash(path) is not None:
        return
    raise CheckpointError(
        f"{path}: is a link to {target}, outside the folder and not in a Hugging Face cache; put the file itself there, or give the folder it is in"
    )


def blob_hash(path: Path) -> str | None:
    """The hash that a linked file of a Hugging Face cache is named by: SHA-256 for large files, 40 digits of git's for others. None for any other file."""
    target = Path(os.path.realpath(path))
    is_blob = target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir() and _HASH.fullmatch(target.name)
    return target.name if is_blob else None


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hash of a file's content; `progress` is called with the number of bytes after each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
