"""Runs a conversion: files are written by several threads and, under torchrun, by several processes; what was finished before an interruption is kept."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_skywork.convert.files.checkpoint_folder import versions
from megatron_skywork.convert.files.marker import sha256_of
from megatron_skywork.convert.files.output_folder import check_space
from megatron_skywork.convert.progress import Progress
from megatron_skywork.convert.streaming.file_writer import FileRecord, FileWriter, Stopped
from megatron_skywork.convert.streaming.ranks import PeerFailed, Ranks
from megatron_skywork.convert.streaming.staged import Staged
from megatron_skywork.convert.streaming.targets import PlannedFile, Target
from megatron_skywork.convert.streaming.units import Recipe, Ref, Unit
from megatron_skywork.errors import CheckpointError, UserError

DEFAULT_WORKERS = 2
_SOURCE = "source/"
_WAIT_SECONDS = 0.2
Read = Callable[[Ref], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A conversion, ready to run.

    Attributes:
        label: what it is called in its progress.
        recipe, target, read: what is made, where it goes, and how a source tensor is read (from any thread).
        decides: whatever else decides the bytes that are written, as JSON; a resumed conversion must agree in it.
        source_files: files that are hashed for the manifest, by the name they get there.
        complete: writes what lies beside the weights, given the folder and the SHA-256 of its files and of the source files.
        accept: looks at the finished folder before it gets its name; an error from it refuses the folder. Its answer is part of the outcome.
    """

    label: str
    recipe: Recipe
    target: Target
    read: Read
    decides: dict[str, Any]
    source_files: dict[str, Path]
    complete: Callable[[Path, Mapping[str, str], Mapping[str, str]], None]
    accept: Callable[[Path], dict[str, Any]] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.num_bytes for file in self.target.files)


@dataclass(frozen=True)
class Options:
    """How a conversion is run; none of it changes what is written.

    Attributes:
        workers: files that this process writes at the same time.
        overwrite: replace a checkpoint.
        finite: refuse a source tensor with NaN or infinite numbers.
        progress: where progress goes.
        ranks: the processes that share the work.
    """

    workers: int = DEFAULT_WORKERS
    overwrite: bool = False
    finite: bool = False
    progress: TextIO | None = None
    ranks: Ranks = field(default_factory=Ranks)


@dataclass(frozen=True)
class Outcome:
    """What a conversion did, as far as this rank knows.

    Attributes:
        seconds: without the start of Python, with what `accept` took.
        write_seconds: until all files were written.
        num_bytes: bytes of the weight files, all ranks together.
        resumed_files: files that an interrupted conversion had finished.
        accepted: the answer of `Job.accept`.
    """

    seconds: float
    write_seconds: float
    num_bytes: int
    resumed_files: int
    accepted: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a command's answer."""
        found: dict[str, Any] = {
            "bytes": self.num_bytes, "seconds": round(self.seconds, 3), "write_seconds": round(self.write_seconds, 3), "resumed_files": self.resumed_files
        }  # fmt: skip
        return found if self.accepted is None else {**found, "verify": self.accepted}


def run(job: Job, out: Path | str, options: Options) -> Outcome:
    """Write the folder.

    Raises:
        UserError: a source or a setting was refused, `out` exists, or the disk is too small; nothing is left behind but what an interrupted
            conversion had finished where there is no room for the rest now.
        OSError: a disk failed or is full; the same command goes on where this one stopped, as it does after a crash.
    """
    started = time.monotonic()
    staged = Staged(out, _plan_hash(job), options.overwrite)
    resumed = 0
    try:
        if options.ranks.rank == 0:
            resumed = _begin(job, staged, options)
        options.ranks.meet()
        _write_share(job, staged, options)
        options.ranks.meet()
        write_seconds = time.monotonic() - started
        accepted = None
        if options.ranks.rank == 0:
            accepted = _complete(job, staged)
            staged.commit()
        options.ranks.meet()
    except UserError as error:
        # A disk that cannot be read now and a rank that failed are no refusals: what was finished waits for the same command.
        if options.ranks.rank == 0 and not isinstance(error, PeerFailed) and not isinstance(error.__cause__, OSError):
            staged.remove_if_taken()
        raise
    finally:
        staged.leave()
    return Outcome(time.monotonic() - started, write_seconds, job.num_bytes, resumed, accepted)


def _begin(job: Job, staged: Staged, options: Options) -> int:
    """Take the folder; returns how many files were finished before."""
    for path in job.source_files.values():
        if path.resolve().is_relative_to(staged.out.resolve()):
            raise CheckpointError(f"{staged.out}: holds {path.name}, which is read; choose another --out")
    staged.open()
    finished = [file for file in job.target.files if _finished(staged, file) is not None]
    staged.keep({file.name for file in finished})
    if finished and options.progress is not None:
        options.progress.write(f"{job.label}: going on, {len(finished)} of {len(job.target.files)} files were finished before\n")
    try:
        check_space(staged.content, job.num_bytes - sum(file.num_bytes for file in finished))
    except CheckpointError:
        if finished:
            staged.leave()  # they wait until there is room
        raise
    return len(finished)


def _plan_hash(job: Job) -> str:
    sources = {name: [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for name, path in job.source_files.items()}
    files = [[file.name, file.num_bytes, hashlib.sha256(file.head).hexdigest()] for file in job.target.files]
    plan = {"label": job.label, "decides": job.decides, "files": files, "sources": sources, "versions": versions()}
    return hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()


def _finished(staged: Staged, file: PlannedFile) -> FileRecord | None:
    """The journal's record of a file that is there in its size."""
    found, path = staged.recorded(file.name), staged.content / file.name
    return found if found is not None and path.is_file() and path.stat().st_size == found.num_bytes == file.num_bytes else None


def _write_share(job: Job, staged: Staged, options: Options) -> None:
    """This rank's files and its share of the source's hashes."""
    files = options.ranks.share([(file, file.num_bytes) for file in job.target.files])
    sources = options.ranks.share([((name, path), path.stat().st_size) for name, path in job.source_files.items()])
    files = [file for file in files if _finished(staged, file) is None]
    sources = [(name, path) for name, path in sources if staged.recorded(_SOURCE + name) is None]
    label = job.label if options.ranks.world_size == 1 else f"{job.label} (rank {options.ranks.rank} of {options.ranks.world_size})"
    bar = Progress(label, sum(file.num_bytes for file in files), options.progress if options.ranks.rank == 0 else None)
    stopped = threading.Event()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // options.workers))
    try:
        with ThreadPoolExecutor(options.workers) as writers, ThreadPoolExecutor(1) as hasher:
            read = _finite(job.read) if options.finite else job.read
            try:
                jobs: list[Future[None]] = [writers.submit(_write_file, job, file, read, staged, bar, stopped) for file in files]
                jobs += [hasher.submit(_hash_source, name, path, staged, stopped) for name, path in sources]
                _wait(jobs, stopped)
            finally:
                stopped.set()  # an interrupt from the keyboard can arrive before all are handed out
    finally:
        torch.set_num_threads(threads)
        bar.close()


def _wait(jobs: Sequence[Future[None]], stopped: threading.Event) -> None:
    """Until all are done, or one has failed and the others have stopped; raises what went wrong first."""
    try:
        # In short waits: a signal that arrives just before one begins does not end it.
        while wait(jobs, _WAIT_SECONDS, FIRST_EXCEPTION).not_done and not any(job.done() and job.exception() for job in jobs):
            pass
    finally:  # an interrupt from the keyboard arrives here too
        if not all(job.done() and not job.cancelled() and job.exception() is None for job in jobs):
            stopped.set()
            for job in jobs:
                job.cancel()
    failures = [error for job in jobs if not job.cancelled() and (error := job.exception()) is not None]
    for error in failures:
        if not isinstance(error, Stopped):
            raise error


def _finite(read: Read) -> Read:
    """The same, but for a tensor that has numbers which are none."""

    def checked(ref: Ref) -> torch.Tensor:
        tensor = read(ref)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{ref[1]}: has NaN or infinite numbers; the source is damaged (leave out --check-finite to convert it all the same)")
        return tensor

    return checked


def _write_file(job: Job, file: PlannedFile, read: Read, staged: Staged, progress: Progress, stopped: threading.Event) -> None:
    if stopped.is_set():
        raise Stopped
    with FileWriter(staged.content / file.name, progress, stopped) as out:
        out.write(file.head)
        for unit, tensors in _read_ahead(file.units, read):
            for piece, parts in zip(unit.pieces, job.recipe.make(unit, tensors), strict=True):
                for content in job.target.encode(unit, piece, parts):
                    out.write(content)
        made = out.finish()
    if made.num_bytes != file.num_bytes:
        raise RuntimeError(f"{file.name} has {made.num_bytes} bytes, {file.num_bytes} were planned")
    staged.record(file.name, made)


def _read_ahead(units: Sequence[Unit], read: Read) -> Iterator[tuple[Unit, list[torch.Tensor]]]:
    """Units with their source tensors; the next unit's are read while one is written, and what two neighbours share is read once."""
    held: dict[Ref, torch.Tensor] = {}

    def load(unit: Unit) -> list[torch.Tensor]:
        nonlocal held
        held = {ref: held[ref] if ref in held else read(ref) for ref in unit.sources}
        return [held[ref] for ref in unit.sources]

    with ThreadPoolExecutor(1) as reader:
        following = [*units[1:], None]
        coming = reader.submit(load, units[0]) if units else None
        for unit, after in zip(units, following, strict=False):
            assert coming is not None
            tensors = coming.result()
            coming = reader.submit(load, after) if after is not None else None
            yield unit, tensors
            del tensors


def _hash_source(name: str, path: Path, staged: Staged, stopped: threading.Event) -> None:
    if not stopped.is_set():
        staged.record(_SOURCE + name, FileRecord(path.stat().st_size, sha256_of(path)))


def _complete(job: Job, staged: Staged) -> dict[str, Any] | None:
    records = {file.name: _finished(staged, file) for file in job.target.files}
    sources = {name: staged.recorded(_SOURCE + name) for name in job.source_files}
    missing = [name for name, found in [*records.items(), *sources.items()] if found is None]
    if missing:
        raise RuntimeError(f"not written, though every rank is done: {', '.join(missing)}; do all ranks see {staged.out.parent}?")
    hashes = {name: found.sha256 for name, found in records.items() if found is not None}
    job.complete(staged.content, {**hashes, **job.target.finish(staged.content)}, {name: found.sha256 for name, found in sources.items() if found is not None})
    return job.accept(staged.content) if job.accept is not None else None
