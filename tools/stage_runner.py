"""Runs a list of stages, each a few ordinary commands, and remembers which are finished.

A stage's key is a hash of its commands, the content of the files it reads and the keys of the stages before it. A finished stage leaves a stamp
with its key; as long as the key is the same and its outputs are there, it is not run again. Nothing is hidden: each command, with all it printed,
is in the stage's log.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_skywork.errors import UserError

TAIL_LINES = 40
SAMPLE_SECONDS = 2.0
AGENT_REPORT = "failed (exitcode:"


class StageFailed(UserError):
    """A command of a stage ended with an error."""


@dataclass(frozen=True)
class Command:
    """One command line.

    Args:
        argv: the words, as typed in the project's folder.
        stdout: file that receives standard output (for commands that print JSON); otherwise it goes to the log.
        allowed: exit codes that are not a failure.
    """

    argv: Sequence[str]
    stdout: Path | None = None
    allowed: Sequence[int] = (0,)

    def __str__(self) -> str:
        return shlex.join(self.argv) + (f" > {self.stdout}" if self.stdout else "")


@dataclass(frozen=True)
class Stage:
    """A named step of the work.

    Args:
        name: short; names the log and the stamp.
        says: what it does, for the printed line.
        commands: run one after another.
        reads: files and folders whose content decides whether it must run again (scripts, settings, the user's own input).
        makes: files and folders that must be there for the stage to count as finished.
        clears: removed before it runs.
        finding: what it found, in a few words, computed when it is done.
    """

    name: str
    says: str
    commands: Sequence[Command]
    reads: Sequence[Path] = ()
    makes: Sequence[Path] = ()
    clears: Sequence[Path] = ()
    finding: Callable[[], str] | None = None


@dataclass
class Peak:
    """Largest memory of the process tree and size of a folder while sampling runs, in bytes."""

    folder: Path
    memory_bytes: int = 0
    disk_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            self.memory_bytes = max(self.memory_bytes, sum(resident_bytes(p) for p in me.children(recursive=True)))
            self.disk_bytes = max(self.disk_bytes, folder_bytes(self.folder))
            if self._stop.wait(SAMPLE_SECONDS):
                return


def resident_bytes(process: psutil.Process) -> int:
    """Memory of a process: what it shares is counted once over all sharers where the system says so (PSS), else resident size."""
    try:
        full = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return 0
    return int(getattr(full, "pss", 0) or full.rss)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def content_hash(path: Path) -> str:
    """Hash of a small file's content; of a folder's or a large file's names, sizes and times of change."""
    if path.is_file() and path.stat().st_size < 1 << 20:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    listing = [(str(p.relative_to(path.parent)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


class Runner:
    """Runs stages in order.

    Args:
        folder: where `logs/`, `stages/` and the work itself live.
        cwd: where the commands run.
        env: environment of the commands.
        seed: anything else every stage depends on (say, the package's version).
    """

    def __init__(self, folder: Path, cwd: Path, env: dict[str, str], seed: str):
        self.folder, self.cwd, self.env = folder, cwd, env
        self.key = hashlib.sha256(seed.encode()).hexdigest()
        self.records: list[dict] = []

    def run_all(self, stages: Sequence[Stage], total: int | None = None) -> None:
        """Run what is not finished, one printed line each.

        Args:
            total: stages of the whole work, where it is given in several parts.

        Raises:
            StageFailed: a command ended with an error; the end of its log is in the message.
        """
        for number, stage in enumerate(stages, start=len(self.records) + 1):
            print(f"{number:3}/{total or len(stages)}  {stage.name:13}  {stage.says}", end="", flush=True)
            try:
                record = self._run(stage)
            except StageFailed:
                print("  FAILED", flush=True)
                raise
            self.records.append(record)
            time_text = "(reused)" if record["reused"] else f"{record['seconds']:.1f} s"
            finding = stage.finding() if stage.finding else ""
            print(f"  {time_text}{f'  {finding}' if finding else ''}", flush=True)

    def _key_of(self, stage: Stage) -> str:
        parts = [self.key, *map(str, stage.commands), *(content_hash(self.cwd / path) for path in stage.reads)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _run(self, stage: Stage) -> dict:
        self.key = self._key_of(stage)
        stamp = self.folder / "stages" / f"{stage.name}.json"
        if stamp.is_file() and all((self.cwd / path).exists() for path in stage.makes):
            record = json.loads(stamp.read_text())
            if record["key"] == self.key:
                return {**record, "reused": True}
        stamp.unlink(missing_ok=True)
        for path in stage.clears:
            path = self.cwd / path
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        started = time.monotonic()
        with Peak(self.folder) as peak:
            for index, command in enumerate(stage.commands):
                self._call(stage, command, first=index == 0)
        missing = [str(path) for path in stage.makes if not (self.cwd / path).exists()]
        if missing:
            raise StageFailed(f"stage {stage.name} ended well but did not write {', '.join(missing)}; its log: {self._log(stage)}")
        record = {
            "name": stage.name,
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak.memory_bytes,
            "peak_disk_bytes": peak.disk_bytes,
            "commands": [str(command) for command in stage.commands],
            "key": self.key,
        }
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(record, indent=2) + "\n")
        return {**record, "reused": False}

    def _log(self, stage: Stage) -> Path:
        return self.folder / "logs" / f"{stage.name}.log"

    def _call(self, stage: Stage, command: Command, first: bool) -> None:
        log = self._log(stage)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w" if first else "a") as stream:
            stream.write(f"$ {command}\n")
            stream.flush()
            if command.stdout is None:
                done = subprocess.run(command.argv, cwd=self.cwd, env=self.env, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=False)
            else:
                target = self.cwd / command.stdout
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("w") as output:
                    done = subprocess.run(command.argv, cwd=self.cwd, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=stream, check=False)
        if done.returncode not in command.allowed:
            tail = "\n".join(f"    {line}" for line in last_words(log.read_text(errors="replace")))
            raise StageFailed(f"stage {stage.name} failed with exit code {done.returncode}: {command}\nthe end of {log}:\n{tail}")


def last_words(text: str) -> list[str]:
    """The end of a log, without what torchrun says about itself after a rank has failed."""
    lines = text.splitlines()
    own = next((i for i, line in enumerate(lines) if AGENT_REPORT in line), len(lines))
    return lines[:own][-TAIL_LINES:]


def environment(num_processes: int) -> dict[str, str]:
    """This process's environment, with this Python's own commands (torchrun) first and the cores shared among the ranks."""
    env = dict(os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["OMP_NUM_THREADS"] = str(max(1, len(psutil.Process().cpu_affinity()) // num_processes)) if hasattr(psutil.Process, "cpu_affinity") else "1"
    env["PYTHONUNBUFFERED"] = "1"
    env["TOKENIZERS_PARALLELISM"] = "true"
    return env
