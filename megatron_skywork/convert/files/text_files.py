"""Reads the small text files of a checkpoint folder (JSON, YAML) so that a stranger's one does no harm.

Such a folder may hold a link to a file of ours, a pipe that is never filled, a file of zeros that takes no place on the disk, a list nested so deep that
comparing or printing it ends in a RecursionError somewhere else. Each is refused here, once, in one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_skywork.convert.files.marker import check_link
from megatron_skywork.errors import CheckpointError

# The index of 140,000 tensors takes 15 MB; parsed, an object takes up to twenty times its text.
LARGEST_JSON_BYTES = 64 << 20
# YAML is read by a slow parser, and a run's whole configuration takes 10 kB.
LARGEST_YAML_BYTES = 1 << 20
_DEEPEST = 64


def text_of(path: Path, largest_bytes: int) -> str:
    """The text of a file of a checkpoint folder.

    Raises:
        CheckpointError: missing, no regular file, a link out of the folder, too large, or not UTF-8.
    """
    check_link(path.parent, path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'is not a regular file' if path.exists() else 'missing'}")
        size = path.stat().st_size
        if size > largest_bytes:
            raise CheckpointError(f"{path}: is {size:,} bytes large, and {largest_bytes:,} are more than any such file needs; it was not read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start}); the file is damaged") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint folder.

    Raises:
        CheckpointError: as `text_of`; or it is not JSON, no object, or nested deeper than any such file is.
    """
    text = text_of(path, LARGEST_JSON_BYTES)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON (nested deeper than {_DEEPEST} levels)") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    if _is_deep(content):
        raise CheckpointError(f"{path}: cannot be read as JSON (nested deeper than {_DEEPEST} levels)")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [item for value in level if isinstance(value, (dict, list)) for item in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return False
    return True
