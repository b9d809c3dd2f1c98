"""`run_status.json`: how a run stands and how it ended, for whoever cannot see the process.

torchrun hides the exit codes of its ranks and starts them again when one is not 0, so the file says what the process would have said:

    status      starting, running, then one of: done, stopped (the same command goes on), failed
    exit_code   0 done, or the step asked for; 2 a setting, 3 a file was refused; 75 stopped by a signal or the time limit, to be started again; 1 anything else
    reason, step, host, process, started, updated, and what identifies them: born (lifeline.birth), torchrun (id and number of restarts)

Until a start knows its step (`step` is null) it also says what the last process that did came to, as `before`: whether there should be a checkpoint is read
from it (resume.py). A run that was killed leaves `starting` or `running` behind. Its host and process are recorded, so that a reader on that host can tell;
the next start says so.

Under torchrun a rank that stopped in order returns 0 instead of 75: torchrun knows success and failure only, and would start it again. A refusal (2, 3) has to
fail, and is tried again as often as torchrun is told to; such a rank finds here that the attempt before it ended for good, and ends within a second.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_skywork import lifeline
from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, EXIT_REQUEUE, UserError

FILE_NAME = "run_status.json"
UNFINISHED = ("starting", "running")
ONE_START_SECONDS = 900.0  # within which the processes of one start begin, on all hosts


class Status:
    """Writes the status of this start of a run. The first final status stands: what breaks on the way out does not change how the run ended.

    Args:
        run_dir: the run's folder; made if needed.
        is_writer: false on ranks that write only when the first rank cannot.
    """

    def __init__(self, run_dir: Path, is_writer: bool):
        self.path, self.is_writer, self._started = run_dir / FILE_NAME, is_writer, time.time()
        self._lock, self._is_final, self._before = threading.Lock(), False, _came_to(run_dir)
        self.is_silent = False  # set where the folder turns out to be another run's

    def write(self, status: str, *, for_all: bool = False, **fields: Any) -> None:
        """Replace the status. What cannot be written (a full disk) is said, and does not take the place of the error that is being reported.

        Args:
            for_all: write from any rank, unless the file has an end of the run already.
        """
        with self._lock:
            if self.is_silent or self._is_final or not (self.is_writer or for_all):
                return
            if for_all and not self.is_writer and not self._is_of_this_start():
                return
            self._is_final = status not in UNFINISHED
            before = {"before": self._before} if fields.get("step") is None and self._before else {}
            record = {"status": status, **fields, **before, **_identity(), "started": self._started, "updated": time.time()}
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace(self.path, json.dumps(record, indent=1))
            except OSError as failure:
                print(f"warning: {self.path} could not be written: {failure}", file=sys.stderr, flush=True)

    def _is_of_this_start(self) -> bool:
        """Whether the file is about a start that goes on, under the same torchrun, begun when this process was. Many a torchrun has no id but `none`."""
        found = read(self.path.parent) or {}
        same_torchrun = (found.get("torchrun") or {}).get("id") == os.environ.get("TORCHELASTIC_RUN_ID")
        return found.get("status") in UNFINISHED and same_torchrun and abs(found.get("started", 0.0) - self._started) < ONE_START_SECONDS


def _came_to(run_dir: Path) -> dict[str, Any] | None:
    """Status and step of the last process of a run that knew its step."""
    found = read(run_dir) or {}
    before = found.get("before") if found.get("step") is None else {name: found.get(name) for name in ("status", "step")}
    return before if isinstance(before, dict) else None


def _identity() -> dict[str, Any]:
    torchrun = {"id": os.environ["TORCHELASTIC_RUN_ID"], "restart": _restart()} if "TORCHELASTIC_RUN_ID" in os.environ else None
    return {"host": socket.gethostname(), "process": os.getpid(), "born": lifeline.birth(os.getpid()), "torchrun": torchrun}


def _restart() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def read(run_dir: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none that can be read."""
    try:
        found = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def died_silently(found: dict[str, Any] | None) -> str | None:
    """A sentence about a start that never wrote its end, or None. A process that still runs has not died; that is for the run's lock to refuse."""
    if found is None or found.get("status") not in UNFINISHED:
        return None
    host, process = found.get("host"), found.get("process")
    if host == socket.gethostname() and isinstance(process, int) and found.get("born") is not None and lifeline.birth(process) == found["born"]:
        return None
    updated = found.get("updated")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(updated)) if isinstance(updated, (int, float)) else "an unknown time"
    start = f"the last start of this run, process {process} on {host}, which was {found['status']} at {when}"
    return f"{start}, ended without a word: it was killed, or its machine went down"


def refuse(run_dir: str | None, error: UserError) -> None:
    """Say in a folder that is there that this start was refused before it was one, unless the run there may still go on."""
    if run_dir is None or not Path(run_dir).is_dir():
        return
    found = read(Path(run_dir))
    if found is None or found.get("status") not in UNFINISHED or (found.get("host") == socket.gethostname() and died_silently(found)):
        Status(Path(run_dir), is_writer=True).write("failed", step=None, reason=str(error), exit_code=error.exit_code)


def ended_for_good(run_dir: Path) -> tuple[int, str] | None:
    """Exit code and reason of an earlier attempt of this torchrun that leaves nothing to try again; None where there is work to do."""
    found = read(run_dir) or {}
    torchrun, code = found.get("torchrun") or {}, found.get("exit_code")
    if torchrun.get("id") != os.environ.get("TORCHELASTIC_RUN_ID", "") or not torchrun.get("restart", 0) < _restart():
        return None
    # A rank that is stopped before the first step may only be the one that torchrun ends because another one failed.
    if not isinstance(code, int) or code == EXIT_OTHER or (code == EXIT_REQUEUE and found.get("phase") is not None):
        return None
    return code, str(found.get("reason") or found.get("status"))


def exit_code(code: int) -> int:
    """What the process returns for an end of the run: the code itself, or success where torchrun would take 75 for a failure."""
    return EXIT_DONE if code == EXIT_REQUEUE and "TORCHELASTIC_RUN_ID" in os.environ else code


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it, and two writers do not meet in the making."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
