"""The helper process that passes metrics.jsonl on to Weights & Biases; started by `wandb_follower.py`.

It ends when its standard input closes (the run is over) or its parent is gone (the run was killed), after reading the file to its end, for which a killed
run leaves it `ORPHAN_SECONDS`. Any failure is one line on stderr and exit code `TOLD`; any other code tells the run that the line is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_skywork.metrics.scalars import evaluation_scalars, scalars

TOLD = 3
FINISH_SECONDS = 60.0
ORPHAN_SECONDS = 3.0
_POLL_SECONDS = 1.0


class _Deadline:
    """Ends this process when a call into wandb does not return; a thread cannot be stopped, a process can."""

    def __init__(self, seconds: float, doing: str):
        self._timer = threading.Timer(seconds, self._expire, [seconds, doing])
        self._timer.daemon = True

    @staticmethod
    def _expire(seconds: float, doing: str) -> None:
        _warn(f"{doing} took longer than {seconds:.0f} s")
        os._exit(TOLD)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()


def _end_with(parent: int) -> None:
    """Do not outlive a killed run for long, whatever wandb is waiting for."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS / 2)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _warn(reason: str) -> None:
    line = " ".join(reason.split())[:500]
    print(f"W&B is off for this run, which goes on without it: {line}", file=sys.stderr, flush=True)


def _read_records(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from `offset` on, and where the next one starts."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read()
    end = content.rfind(b"\n") + 1
    return [json.loads(line) for line in content[:end].splitlines() if line.strip()], offset + end


def _header(path: Path) -> dict[str, Any]:
    for record in _read_records(path, 0)[0]:
        if record.get("kind") == "header":
            return record
    return {}


def _follow(run: Any, path: Path, offset: int) -> None:
    """Pass records on until the run is over."""
    parent = os.getppid()
    header_sent = False
    over = False
    while True:
        records, offset = _read_records(path, offset)
        if not header_sent and (header := _header(path)):
            run.config.update({key: value for key, value in header.items() if key != "kind"}, allow_val_change=True)
            header_sent = True
        for record in records:
            if record.get("kind") == "step":
                run.log({"step": record["step"], **dict(scalars(record))})
            elif record.get("kind") == "eval":
                run.log({"step": record["step"], **dict(evaluation_scalars(record))})
        if over:
            return
        over = bool(select.select([sys.stdin], [], [], _POLL_SECONDS)[0]) or os.getppid() != parent


def _start(arguments: argparse.Namespace) -> Any:
    import wandb

    settings = wandb.Settings(init_timeout=arguments.init_seconds, console="off", silent=True)
    run = wandb.init(
        project=arguments.project,
        id=arguments.id,
        name=arguments.name,
        mode=arguments.mode,
        resume="allow" if arguments.mode == "online" else None,
        dir=str(arguments.metrics.parent),
        settings=settings,
    )
    # Steps are a value, not W&B's own counter, which refuses to go back when a run resumes from an earlier step.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", type=Path, required=True, help="the metrics.jsonl to follow")
    parser.add_argument("--offset", type=int, required=True, help="byte to start at; what is before it has been passed on")
    parser.add_argument("--init-seconds", type=float, required=True, help="how long to wait for the server")
    parser.add_argument("--mode", choices=["online", "offline"], required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args(argv)
    _end_with(os.getppid())
    try:
        # Importing counts as starting, and wandb may try its server several times within one init.
        with _Deadline(2 * arguments.init_seconds, "starting"):
            run = _start(arguments)
        _follow(run, arguments.metrics, arguments.offset)
        with _Deadline(FINISH_SECONDS, "finishing"):
            run.finish()
    except ImportError:
        _warn("the package wandb is not installed; pip install 'megatron_skywork[wandb]'")
    except BaseException as error:  # whatever wandb raises is its own affair, be it an exit; the run must not notice
        _warn(f"{type(error).__name__}: {error}")
    else:
        return 0
    return TOLD


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # wandb's exit hooks wait for a server that is not there.
    os._exit(code)
