"""Faults of the kernel at one chosen call: strace makes it fail, or kills the process there. A call is named by what it is about, not by a count of all calls,
so that the same one is met again in another process: the third `write` on `checkpoints/.step_00000002.partial/__0_0.distcp`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault import CannotBeTried
from warm import WAITS, Child, Warm

HOW = {"SIGKILL": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")
_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Call:
    """The `number`-th call of `syscall` about `path`, which is relative to the folder that is looked at."""

    syscall: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.syscall} {self.number} of {self.path}"


@dataclass(frozen=True)
class Ended:
    """What became of a process.

    Attributes:
        code: exit code, negative for a signal.
        hit: whether it came to the call.
    """

    code: int
    said: str
    hit: bool


def calls_of(warm: Warm, body: str, *args: Any, root: Path, folder: Path) -> list[Call]:
    """Every file system call below `root` of a process that nothing happens to. `body` waits for the tracer itself."""
    ended, log = _traced(warm, body, args, folder, ["-y", "-e", "trace=%file,%desc"])
    if ended.code != 0:
        raise RuntimeError(f"{body} undisturbed ended with {ended.code}: {ended.said[-2000:]}")
    return parsed(log, root)


def parsed(log: str, root: Path) -> list[Call]:
    """The calls of a log of `strace -f -y`. strace counts the calls of each thread by themselves, and so does this."""
    about, counts = re.compile(rf'[<"]{re.escape(str(root))}/?([^>"]*)[>"]'), dict[tuple[str, str, str], int]()
    found: dict[Call, None] = {}
    for thread, syscall, rest in (match.groups() for line in log.splitlines() if (match := _LINE.match(line))):
        paths = list(dict.fromkeys(about.findall(rest.split(" = ")[0])))
        for path in paths:
            counts[thread, syscall, path] = counts.get((thread, syscall, path), 0) + 1
        if paths:
            found[Call(syscall, paths[0], counts[thread, syscall, paths[0]])] = None
    return list(found)


def inject(warm: Warm, body: str, *args: Any, call: Call, how: str, root: Path, folder: Path) -> Ended:
    """The same process, with one of HOW at one call."""
    options = ["-P", str(root / call.path) if call.path else str(root), "-e", f"trace={call.syscall}"]
    ended, log = _traced(warm, body, args, folder, [*options, "-e", f"inject={call.syscall}:{HOW[how]}:when={call.number}"])
    return Ended(ended.code, ended.said, "INJECTED" in log or "killed by SIGKILL" in log)


def _traced(warm: Warm, body: str, args: tuple[Any, ...], folder: Path, options: list[str]) -> tuple[Ended, str]:
    child = warm.start(body, *args, folder=folder)
    log = child.said.with_suffix(".strace")
    while not (waits := child.said.exists() and WAITS in child.said.read_text(errors="replace")) and (code := warm.ended(child, 0)) is None:
        time.sleep(0.005)
    if not waits:
        raise RuntimeError(f"{body} ended with {code} before it was traced: {child.said.read_text()[-2000:]}")
    with subprocess.Popen(["strace", "-f", "-qq", "-o", str(log), "-p", str(child.process), *options], stderr=subprocess.PIPE, text=True) as strace:
        try:
            code = _ended(warm, child, strace)
            _, complaint = strace.communicate(timeout=_TIMEOUT_SECONDS)
        finally:
            strace.kill()
    if code is None:
        raise CannotBeTried(f"strace cannot trace a process here ({complaint.strip()})")
    said = child.said.read_text(encoding="utf-8", errors="replace")
    answer = Ended(code, said if code != -signal.SIGALRM else f"hung; {said}", True), log.read_text(encoding="utf-8", errors="replace")
    for path in child.said.parent.glob(f"{child.said.stem}.*"):
        path.unlink()
    return answer


def _ended(warm: Warm, child: Child, strace: subprocess.Popen[str]) -> int | None:
    """Exit code of a traced process; that of SIGALRM for one that hung; None for one that waits for a tracer that has gone."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while (code := warm.ended(child, 1)) is None:
        has_gone = strace.poll() is not None
        if (has_gone and (code := warm.ended(child, 1)) is None) or time.monotonic() > deadline:
            child.kill()
            warm.ended(child)
            return None if has_gone else -signal.SIGALRM
        if code is not None:
            break
    return code


def sample(items: list[Any], count: int) -> list[Any]:
    """So many of them, spread evenly, the first and the last among them; all when there are no more."""
    if len(items) <= count:
        return items
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]
