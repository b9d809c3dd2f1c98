"""Is there host memory for a copy of what a rank saves? Where there is none, the kernel would kill the run in the middle of its first save."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """What this rank may take: an equal part of what the machine, or the control group it is confined to (SLURM, containers), has left. None if unknown."""
    free = [found for found in (_of_machine(), _of_group()) if found is not None]
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if free else None


def _of_machine() -> int | None:
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_group() -> int | None:
    """The limit of this process' group or the nearest one above it that has one, less what is used and cannot be given back."""
    try:
        name = next(line[3:] for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
        group = CGROUP / name.lstrip("/")
        for folder in [group, *group.parents]:
            limit = (folder / "memory.max").read_text(encoding="ascii").strip() if (folder / "memory.max").is_file() else "max"
            if limit != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                return int(limit) - int((folder / "memory.current").read_text(encoding="ascii")) + int(stat.get("inactive_file", 0))
    except (OSError, StopIteration, ValueError):
        return None
    return None
