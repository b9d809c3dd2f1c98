"""A process that has imported torch and megatron-core once, and forks a child for each thing that is tried: an injection costs a fraction of a second instead
of the ten that Python needs to start. A child is a process as any other: it may be killed, traced, or end itself, and nothing of it is left.

The server has no thread and no process group, so that what it forks is sound; a child builds its own group of one rank.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 300
IMPORTED = (
    "convert_checkpoint", "training_bodies", "megatron_skywork.cli", "megatron_skywork.convert.check.verify_manifest", "megatron_skywork.convert.import_hf",
    "megatron_skywork.train.run", "megatron_skywork.train.training",
)  # fmt: skip
WAITS = "waits for its tracer"
_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER = 0x59616D61
_ANY = ctypes.c_ulong(-1)


@dataclass(frozen=True)
class Child:
    """A process that does one thing.

    Attributes:
        said: file with what it printed; what its function returned lies beside it.
    """

    process: int
    said: Path

    @property
    def result(self) -> Any:
        """What the function returned."""
        return json.loads(self.said.with_suffix(".json").read_text(encoding="utf-8"))

    def kill(self) -> None:
        """SIGKILL, now."""
        os.kill(self.process, signal.SIGKILL)


class Warm:
    """The client's end. Several threads may use it."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
        )
        self._lock = threading.Lock()
        self._number = 0
        atexit.register(self.close)

    def start(self, body: str, *args: Any, folder: Path) -> Child:
        """Fork a child that calls `module:function` with plain arguments; what it says goes into `folder`."""
        with self._lock:
            self._number += 1
            said = folder / f"child-{self._number}.txt"
        return Child(self._ask({"body": body, "args": args, "said": str(said)}), said)

    def ended(self, child: Child, seconds: float = TIMEOUT_SECONDS) -> int | None:
        """Its exit code, negative for a signal, once it has ended; None when it has not after so long."""
        deadline, pause = time.monotonic() + seconds, 0.002
        while (status := self._ask({"ended": child.process})) is None and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return None if status is None else os.waitstatus_to_exitcode(status)

    def run(self, body: str, *args: Any, folder: Path) -> Any:
        """What a function returns that must not fail."""
        child = self.start(body, *args, folder=folder)
        code = self.ended(child)
        if code != 0:
            raise RuntimeError(f"{body} ended with {code}: {child.said.read_text(encoding='utf-8')[-2000:]}")
        return child.result

    def _ask(self, request: dict[str, Any]) -> Any:
        with self._lock:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the server, and with it its children."""
        self._server.kill()
        self._server.wait()


@functools.cache
def warm() -> Warm:
    """The one of this process; started when it is first asked for."""
    return Warm()


# ------------------------------------------------------------------------------------------------------------------------- the server's end


def _serve() -> None:
    _dies_with_its_parent()
    for folder in (HERE.parents[1], HERE.parent, HERE, HERE.parents[1] / "tools", HERE.parent / "unit"):
        sys.path.insert(0, str(folder))
    import torch

    from megatron_skywork import device

    torch.set_num_threads(1)
    device.prepare()
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # megatron-core collects garbage in each save; what was imported here need not be looked at each time
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        if "ended" in request:
            process, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = status if process else None
        else:
            answer = os.fork()
            if answer == 0:
                requests.close()
                answers.close()
                _live(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _live(body: str, args: list[Any], said: str) -> None:
    """A child's life."""
    _dies_with_its_parent()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from megatron_skywork.errors import UserError

    module, _, name = body.partition(":")
    code = 1
    try:
        result = getattr(importlib.import_module(module), name)(*args)
        Path(said).with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")
        code = 0
    except UserError as refusal:  # as the commands end
        print(f"error: {refusal}", file=sys.stderr)
        code = refusal.exit_code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_tracer() -> None:
    """Say so in what is printed, and wait until every thread of this process is traced."""
    print(WAITS, flush=True)
    while any("TracerPid:\t0\n" in Path(f"/proc/self/task/{thread}/status").read_text() for thread in os.listdir("/proc/self/task")):
        time.sleep(0.002)


def _dies_with_its_parent() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)


if __name__ == "__main__":
    _serve()
