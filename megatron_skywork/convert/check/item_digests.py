"""What a distributed checkpoint holds, item by item, in a form that two checkpoints can be compared by.

Tensors and random states count by their bytes. The settings that megatron-core keeps beside them (in `common.pt`, from 0.19 on as an item of its own) count
by content: the bytes of equal settings depend on which of them happened to be one object in memory when they were pickled.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_skywork.convert.safety.safe_pickle import COMMON, read_metadata, read_object

_SETTINGS = "common_state"


def item_digests(folder: Path | str) -> dict[str, str]:
    """Item -> SHA-256 of its bytes, or the settings themselves.

    Raises:
        CheckpointError: the folder's index or an item cannot be read, or holds more than plain data.
    """
    folder, found = Path(folder), {}
    for key, place in read_metadata(folder).storage_data.items():
        path = folder / place.relative_path
        name = key.fqn if key.offset is None else f"{key.fqn} at {tuple(key.offset)}"
        if key.fqn.startswith(_SETTINGS):
            found[name] = repr(read_object(path, place.offset, place.length))
            continue
        with path.open("rb") as file:
            file.seek(place.offset)
            found[name] = hashlib.sha256(file.read(place.length)).hexdigest()
    if (folder / COMMON).is_file():
        found[COMMON] = repr(read_object(folder / COMMON))
    return found
