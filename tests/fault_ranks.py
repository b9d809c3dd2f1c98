"""Ranks with a fault in them, started by the dozen: one process imports everything once, and each rank is a fork of it that goes through the command line.

As a script it takes one JSON object a line, {arguments, run_dir, world, port, environment, fault}, forks the ranks, answers {"processes": [...]}, and later,
one line for each that ended, {"process", "code"}. A fault is [point, rank, action, seconds]: before `rank` (-1: each) does what the point names, it leaves the
file `reached` in the run's folder and acts: sleep, gil (sleep without giving up the interpreter's lock), stop, kill, raise, refuse.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 120
# What a run of these tests is: as small as it gets, and with every phase in it.
SMALL = [
    "--config", str(ROOT / "configs" / "tiny.yaml"), "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "data.seq_length=16",
    "train.micro_batch_size=1", "train.global_batch_size=2", "train.eval_samples=2", "optim.warmup_steps=0", "metrics.router=false",
]  # fmt: skip


class Job:
    """Some ranks of one run, as the test sees them."""

    def __init__(self, launcher: Launcher, run_dir: Path, processes: list[int]):
        self.launcher, self.run_dir, self.processes = launcher, run_dir, processes

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Wait until `what` is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not what():
            assert time.monotonic() < deadline, f"nothing came of it in {PATIENCE_SECONDS} s; {self.log()}"
            assert any(map(alive, self.processes)), f"all ranks have ended; {self.log()}"
            time.sleep(0.02)

    def reach(self) -> None:
        """Wait until the fault's rank is at its point."""
        self.wait_for((self.run_dir / "reached").exists)

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process, number)

    def ends(self) -> list[int]:
        """Wait for all ranks; their exit codes, negative for a signal."""
        return [self.launcher.code_of(process, self) for process in self.processes]

    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "run_status.json").read_text())

    def log(self) -> str:
        return (self.run_dir / "log.txt").read_text()[-4000:]


class Launcher:
    """The process that forks ranks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        command = [sys.executable, "-u", str(Path(__file__))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, start_new_session=True)
        self._codes: dict[int, int] = {}
        self._rest = b""

    def start(self, run_dir: Path, *overrides: str, world: int = 2, fault: tuple = (), **environment: str) -> Job:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "reached").unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [*SMALL, f"run_dir={run_dir}", *([f"parallel.ep={world}"] if world > 1 else []), *overrides]
        order = {"arguments": arguments, "run_dir": str(run_dir), "world": world, "port": port, "environment": environment, "fault": fault}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        while True:
            answer = self._answer(None)
            if "processes" in answer:
                return Job(self, run_dir, answer["processes"])
            self._codes[answer["process"]] = answer["code"]

    def code_of(self, process: int, job: Job) -> int:
        while process not in self._codes:
            answer = self._answer(job)
            self._codes[answer["process"]] = answer["code"]
        return self._codes[process]

    def _answer(self, job: Job | None) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no rank has ended in {PATIENCE_SECONDS} s; {job.log() if job else ''}"
            piece = os.read(self.process.stdout.fileno(), 65536)
            assert piece, "the launcher has died"
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(process: int) -> list[int]:
    """Processes a process has started and that live."""
    return [int(child) for path in Path(f"/proc/{process}/task").glob("*/children") for child in path.read_text().split() if alive(int(child))]


# ------------------------------------------------------------------------------------------------------------------------ in the launcher


def act(action: str, seconds: float) -> None:
    from megatron_skywork.errors import CheckpointError

    if action in ("gil", "stop", "kill"):
        time.sleep(1.2)  # the others are to know where this rank was; a beat comes each second
    if action == "sleep":
        time.sleep(seconds)
    elif action == "gil":
        ctypes.PyDLL(None).sleep(int(seconds))
    elif action in ("stop", "kill"):
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
    elif action == "raise":
        raise RuntimeError("a fault of the test")
    elif action == "refuse":
        raise CheckpointError("a checkpoint is refused by the test")


def put(fault: list, run_dir: Path, rank: int) -> None:
    """Have this rank meet the fault, once."""
    from megatron_skywork import parallel
    from megatron_skywork.checkpoint.save import Saver
    from megatron_skywork.train import training
    from megatron_skywork.train.step import TrainStep

    point, faulty, action, seconds = fault
    owner, name = {
        "groups": (parallel, "start"), "model": (training, "build_chunks"), "data": (training, "build_train_loader"),
        "first step": (TrainStep, "__call__"), "step": (TrainStep, "__call__"),
        "evaluation": (training, "evaluate"), "save": (Saver, "begin"), "end": (parallel, "stop"),
    }[point]  # fmt: skip
    original, calls = getattr(owner, name), []

    def met(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if faulty in (rank, -1) and len(calls) == (3 if point == "step" else 1):
            (run_dir / "reached").touch()
            act(action, seconds)
        return original(*args, **keywords)

    setattr(owner, name, met)


def be_rank(order: dict[str, Any], rank: int) -> None:
    """The life of a fork: the command line, as rank `rank`."""
    log = os.open(Path(order["run_dir"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    world = order["world"]
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"]), **order["environment"]})
    if order["fault"]:
        put(order["fault"], Path(order["run_dir"]), rank)
    from megatron_skywork.cli import pretrain

    try:
        pretrain(order["arguments"])
    except SystemExit as end:
        # What an interpreter does at its end, without taking apart what the fork has inherited: that takes a second.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(int(end.code or 0))


def serve() -> None:
    """Fork on demand, and tell of the ends."""
    import torch

    from megatron_skywork import device

    torch.set_num_threads(1)
    device.prepare()
    import megatron_skywork.train.run
    import megatron_skywork.train.training  # noqa: F401

    said, ours, rest = os.dup(1), set(), b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.05)
        if ready:
            piece = os.read(0, 65536)
            if not piece:
                return
            rest += piece
        while b"\n" in rest:
            line, rest = rest.split(b"\n", 1)
            order = json.loads(line)
            started = []
            for rank in range(order["world"]):
                process = os.fork()
                if process == 0:
                    os.close(said)
                    os.close(0)
                    os.open(os.devnull, os.O_RDONLY)
                    return be_rank(order, rank)
                started.append(process)
            ours.update(started)
            os.write(said, json.dumps({"processes": started}).encode() + b"\n")
        while ours:
            process, code = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            if process in ours:
                ours.discard(process)
                os.write(said, json.dumps({"process": process, "code": os.waitstatus_to_exitcode(code)}).encode() + b"\n")


if __name__ == "__main__":
    serve()
