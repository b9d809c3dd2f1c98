"""Is a checkpoint what was written? Every file of it is hashed, by all ranks together, each its share: no rank alone reads terabytes.

Every function here is a collective of all ranks, and gives each the same answer. The first rank looks at names and sizes for all, because another node's view
of a shared folder may be a moment old.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_skywork.checkpoint.folders import step_folders
from megatron_skywork.checkpoint.together import from_first
from megatron_skywork.convert.check.verify_manifest import recorded_hashes
from megatron_skywork.convert.files.checkpoint_folder import MANIFEST
from megatron_skywork.convert.files.marker import MARKER, check_marker, marker_text, sha256_of
from megatron_skywork.convert.progress import Progress
from megatron_skywork.convert.streaming.ranks import Ranks
from megatron_skywork.errors import CheckpointError

_THREADS = 4


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run whose every byte is what was written, and a line about each newer one that was passed over.

    A folder from before there were manifests is compared by the sizes in its marker.
    """
    passed_over: list[str] = []
    for folder in reversed(from_first(lambda: step_folders(run_dir))):
        problem = problem_of(folder)
        if problem is None:
            return folder, passed_over
        passed_over.append(problem)
    return None, passed_over


def problem_of(folder: Path) -> str | None:
    """Why a folder must not be loaded, in words for people; None when it verifies."""
    files, problem = from_first(lambda: _recorded(folder))
    if problem is not None:
        return problem
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    mine = ranks.share([(name, num_bytes) for name, (num_bytes, _) in sorted(files.items())])
    label = f"verify {folder.name}" if ranks.world_size == 1 else f"verify {folder.name} (rank 0's share of {ranks.world_size})"
    bar = Progress(label, sum(files[name][0] for name in mine), sys.stderr if ranks.rank == 0 else None)

    def compare(name: str) -> str | None:
        try:
            return None if sha256_of(folder / name, bar) == files[name][1] else f"{name}: its content is not what was written (SHA-256)"
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror or error})"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        wrong = [line for line in pool.map(compare, mine) if line is not None]
    by_rank: list[list[str]] = [[] for _ in range(ranks.world_size)]
    torch.distributed.all_gather_object(by_rank, wrong)
    if mine:
        bar.close()
    wrong = [line for lines in by_rank for line in lines]
    return f"{folder} is damaged: {'; '.join(sorted(wrong))}" if wrong else None


def _recorded(folder: Path) -> tuple[dict[str, tuple[int, str]], str | None]:
    """Bytes and SHA-256 of each file by the manifest, and what names and sizes alone say against the folder."""
    try:
        marked = check_marker(folder)
    except CheckpointError as damage:
        return {}, str(damage)
    if (folder / MARKER).read_bytes() != marker_text(marked).encode():
        return {}, f"{folder} is damaged: {MARKER}: was changed after it was written"
    if MANIFEST not in marked and not (folder / MANIFEST).exists():
        print(f"{folder} was written without a {MANIFEST}: the sizes of its files were compared, not their contents", file=sys.stderr, flush=True)
        return {}, None
    hashes, problems = recorded_hashes(folder)
    if not problems and (not_in_both := sorted({*hashes, MANIFEST} ^ set(marked))):
        problems = [f"{MARKER} and {MANIFEST} do not list the same files: {', '.join(not_in_both)}"]
    files = {name: ((folder / name).stat().st_size, digest) for name, digest in hashes.items()}
    return files, f"{folder} is damaged: {'; '.join(problems)}" if problems else None
