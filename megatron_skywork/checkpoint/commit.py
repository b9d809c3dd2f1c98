"""What the first rank does when every rank's file is on the disk: index, small files, manifest, marker, and the rename that makes it a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_skywork.checkpoint.folders import LATEST, replaced_of
from megatron_skywork.checkpoint.write import Part
from megatron_skywork.convert.files.checkpoint_folder import MANIFEST, manifest_text
from megatron_skywork.convert.files.marker import MARKER, fsync, marker_text
from megatron_skywork.convert.files.torch_record import record
from megatron_skywork.convert.safety.safe_pickle import BACKEND, COMMON, METADATA
from megatron_skywork.convert.streaming.mcore_target import BACKEND_CONTENT


def commit(staging: Path, folder: Path, index: Metadata, common: dict[str, Any], texts: dict[str, str], step: int, parts: Sequence[Part]) -> int:
    """Make `staging` the checkpoint `folder`; an older folder of that name, which was not good enough to go on from, makes room.

    Args:
        index, common: as `capture` gave them.
        texts: small files beside them.
        parts: what each rank wrote.

    Returns:
        bytes of the checkpoint.

    Raises:
        OSError: what could not be written, or a rank's file that this rank does not see as it was written.
    """
    index.storage_data = {at: place for part in parts for at, place in part.places}
    # Neither a path nor a random number belongs into a checkpoint: two of the same state are equal to the byte.
    index.storage_meta, index.version = StorageMeta(), CURRENT_DCP_VERSION
    small = {METADATA: pickle.dumps(index), COMMON: record(common), BACKEND: json.dumps(BACKEND_CONTENT).encode()}
    small |= {name: text.encode("utf-8") for name, text in texts.items()}
    files = {name: (made.num_bytes, made.sha256) for part in parts for name, made in part.files.items()}
    for name, (num_bytes, _) in files.items():
        if (staging / name).stat().st_size != num_bytes:
            raise OSError(f"{staging / name}: is not as another rank wrote it; do all ranks see the same {staging.parent}?")
    files |= {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in small.items()}
    manifest = manifest_text({"kind": "training", "method": "training", "step": step}, files).encode("utf-8")
    sizes = {**{name: num_bytes for name, (num_bytes, _) in files.items()}, MANIFEST: len(manifest)}
    for name, content in {**small, MANIFEST: manifest, MARKER: marker_text(sizes).encode("utf-8")}.items():
        write_durably(staging / name, content)
    fsync(staging)
    _put_in_place(staging, folder)
    return sum(sizes.values())


def _put_in_place(staging: Path, folder: Path) -> None:
    older = replaced_of(folder)
    if folder.exists():
        os.rename(folder, older)
    try:
        os.rename(staging, folder)
    except OSError:
        if older.exists():
            os.rename(older, folder)
        raise
    fsync(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


def point_to(folder: Path) -> None:
    """Leave the hint which checkpoint is the newest. It is for people: a start looks at the folders themselves."""
    hint = folder.parent / LATEST
    temporary = hint.with_name(f".{LATEST}.tmp")
    write_durably(temporary, f"{folder.name}\n".encode())
    os.replace(temporary, hint)


def write_durably(path: Path, content: bytes) -> None:
    """A small file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
