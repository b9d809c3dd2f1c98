"""Weights & Biases without its ways of stopping a run.

`wandb.init` waits for a server that may not be there, its exit hooks wait again, and it takes over signals and streams. So the training process does
not load it: a helper process follows metrics.jsonl, the file of record, and passes each new record on (`wandb_worker.py`). The run does not wait for it
to start; whatever goes wrong in it is one printed warning; and it ends with the run, at most `CLOSE_SECONDS` later.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import megatron_skywork
from megatron_skywork.metrics.wandb_worker import TOLD

INIT_SECONDS = 12.0
CLOSE_SECONDS = 15.0
ID_FILE = "wandb_id.txt"


def known_run_id(run_dir: Path) -> str | None:
    """The id under which W&B knows this run folder; None where it does not."""
    path = run_dir / ID_FILE
    return (path.read_text(encoding="utf-8").strip() or None) if path.exists() else None


def keep_run_id(run_dir: Path, run_id: str) -> None:
    """Go on under an id from a checkpoint, where the folder has none of its own."""
    if known_run_id(run_dir) is None:
        (run_dir / ID_FILE).write_text(run_id + "\n", encoding="utf-8")


def run_id(run_dir: Path) -> str:
    """The id of this run folder; made once, so that a resumed run continues it."""
    keep_run_id(run_dir, secrets.token_hex(4))
    known = known_run_id(run_dir)
    assert known is not None
    return known


class WandbFollower:
    """Owns the helper process. Records reach it through the JSONL file, so only its end is told to it.

    Args:
        metrics_file: the JSONL file, already repaired for a resume.
        mode: `online` or `offline`.
        project: W&B project.
    """

    def __init__(self, metrics_file: Path, *, mode: str, project: str):
        run_dir = metrics_file.parent
        package_root = str(Path(megatron_skywork.__file__).resolve().parent.parent)
        environment = dict(os.environ, WANDB_SILENT="true", PYTHONPATH=os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])))
        offset = metrics_file.stat().st_size if metrics_file.exists() else 0
        command = [sys.executable, "-m", "megatron_skywork.metrics.wandb_worker", "--metrics", str(metrics_file.resolve()), "--offset", str(offset)]
        command += ["--init-seconds", str(INIT_SECONDS), "--mode", mode, "--project", project, "--id", run_id(run_dir), "--name", run_dir.resolve().name]
        # A session of its own: Ctrl-C and a launcher's signals to the group are for the run, which then closes this one in order.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
        self._is_told = False

    def look(self) -> None:
        """Say so, once, if the helper has died without a word: killed for its memory, say."""
        self._tell(self._process.poll(), fine=TOLD)

    def _tell(self, code: int | None, fine: int) -> None:
        if code not in (None, fine, TOLD) and not self._is_told:
            self._is_told = True
            print(f"W&B's helper process has died (exit code {code}); the run goes on without it, and metrics.jsonl is complete", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Let the helper pass on what is left, and end it when that takes too long; the JSONL file has everything either way."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._tell(self._process.wait(timeout=CLOSE_SECONDS), fine=0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            print(f"W&B did not finish within {CLOSE_SECONDS:.0f} s and was ended; metrics.jsonl is complete", file=sys.stderr, flush=True)
