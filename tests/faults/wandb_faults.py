"""Weights & Biases that refuses, does not answer, raises, hangs or dies: the run must neither stop nor wait for it, and its own record must be whole.

What a run does with its writers is done here in a process of its own, as the unit tests do it; the package `wandb` is either the real one, against addresses of
this machine, or a fake that misbehaves at one place. Nothing is sent anywhere else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fault import Fault, Outcome

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
PATIENCE_SECONDS = 60.0
# Long before the fake's calls return, and before the follower's own limits: a run that waits for W&B cannot be through with its steps by then.
HANG_SECONDS = 3600

RUN = """
import os, sys
from pathlib import Path
from megatron_skywork.metrics import wandb_follower
from megatron_skywork.metrics.writers import open_writers
from megatron_skywork.config.schema import Config
folder = Path(sys.argv[2])
wandb_follower.INIT_SECONDS, wandb_follower.CLOSE_SECONDS = 2.0, float(sys.argv[3])
config = Config.model_validate_json(sys.argv[1])
writers = open_writers(config, folder, resume_step=None)
writers.header({"config": config.model_dump(), "world_size": 1})
for step in range(1, int(sys.argv[4]) + 1):
    writers.step({"step": step, "loss": 1.0 / step})
    if step == 2 and (folder.parent / "reach").exists():
        import time
        deadline = time.monotonic() + 60  # the fault is to meet a run, not the end of one
        while not (folder.parent / "reached").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
(folder / "steps_done").touch()
writers.close()
assert "wandb" not in sys.modules
(folder / "closed").touch()
"""

# What a worker finds as `wandb`; FAULT is where it misbehaves and ACT how.
FAKE = """
import os, signal, sys, time
from pathlib import Path
_where, _how, _hang = {where!r}, {how!r}, {hang!r}

def _at(place):
    if place != _where:
        return
    Path({reached!r}).touch()
    if _how == "raise":
        raise RuntimeError("wandb: 500\\nInternal Server Error")
    if _how == "raise what is no Exception":
        raise BaseException("an end")
    if _how == "exit":
        sys.exit(7)
    if _how == "die":
        os._exit(9)
    if _how == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if _how == "hang":
        time.sleep(_hang)
    if _how == "kill the group":
        os.killpg(0, signal.SIGTERM)
        time.sleep(_hang)
    if _how == "flood":
        for _ in range(100_000):
            os.write(1, b"x" * 1000)
        raise RuntimeError("x" * 1_000_000)

_at("import")

class Settings:
    def __init__(self, **values):
        _at("Settings")

class _Config:
    def update(self, *values, **more):
        _at("config")

class _Run:
    config = _Config()
    def define_metric(self, *values, **more):
        _at("define_metric")
    def log(self, values):
        _at("log")
    def finish(self):
        _at("finish")

def init(**values):
    _at("init")
    return _Run()
"""
PLACES = ["import", "Settings", "init", "define_metric", "config", "log", "finish"]
HOWS = ["raise", "raise what is no Exception", "exit", "die", "be killed", "hang", "kill the group", "flood"]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _workers(run_dir: Path) -> list[int]:
    """Helpers of this run that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"megatron_skywork.metrics.wandb_worker" in words and str(run_dir / "metrics.jsonl").encode() in words and _alive(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def _run(folder: Path, mode: str, close_seconds: float, **environment: str) -> str | None:
    """Do a run in `folder`/run; what was lost, or None."""
    from test_metrics_writers import make_config

    run_dir = folder / "run"
    command = [sys.executable, "-c", RUN, make_config(wandb=mode).model_dump_json(), str(run_dir), str(close_seconds), str(STEPS)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RANK"))}
    # The package reports its own errors to its makers; nothing of this may leave the machine.
    ours = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "no_proxy": "*", "WANDB_ERROR_REPORTING": "false"}
    environment = {**inherited, **ours, **environment}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    except subprocess.TimeoutExpired:
        where = "closes" if (run_dir / "steps_done").exists() else "trains"
        return f"the run waits while it {where}"
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0 or not (run_dir / "closed").exists():
        return f"the run ended with {process.returncode}: {said[-300:]}"
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if [record["step"] for record in steps if record["kind"] == "step"] != list(range(1, STEPS + 1)):
        return "the run's own record is not whole"
    if len(said.splitlines()) != 1 or "W&B" not in said or len(said) > 5000:
        return f"it should be told of once, in a line: {said[:300]!r}"
    deadline = time.monotonic() + 5
    while (left := _workers(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    return f"helpers {left} outlive the run" if left else None


# ---------------------------------------------------------------------------------------------------------------- the server is not there


@contextmanager
def refusing() -> Iterator[int]:
    """A port where nobody listens; kept, so that nobody will."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """A queue of connections that is full: the next ones are dropped without an answer, as by a network that leads nowhere."""
    with closing(socket.socket()) as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(full.getsockname())
        yield full.getsockname()[1]
        for each in waiting:
            each.close()


@contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """A server that says the same to everybody, or nothing."""
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        kept = []

        def serve() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                kept.append(connection)
                if answer is not None:
                    try:
                        connection.recv(65536)
                        connection.sendall(answer)
                        connection.close()
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for each in kept:
            each.close()


SERVERS = {
    "refused": refusing,
    "dropped, as where no route leads": silent,
    "taken and never answered": lambda: answering(None),
    "answered with 500": lambda: answering(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    "answered with 401": lambda: answering(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    "answered with nonsense": lambda: answering(b"\0" * 1000),
}


def no_server(folder: Path, short: bool) -> Outcome:
    """The real package against addresses of this machine."""
    outcome = Outcome()
    if importlib.util.find_spec("wandb") is None:
        outcome.note = "**SKIPPED: the package wandb is not installed**"
        return outcome
    for number, (name, server) in enumerate(list(SERVERS.items())[: 1 if short else None]):
        at = folder / str(number)
        at.mkdir()
        with server() as port:
            failure = _run(at, "online", 15.0, WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="0" * 40)
        outcome.add(f"{name}: {failure}" if failure else None)
    return outcome


# --------------------------------------------------------------------------------------------------------------- the package misbehaves


def _fake(folder: Path, where: str, how: str) -> Path:
    package = folder / "fake"
    package.mkdir(parents=True)
    (package / "wandb.py").write_text(FAKE.format(where=where, how=how, hang=HANG_SECONDS, reached=str(folder / "reached")))
    return package


def misbehaving(folder: Path, short: bool) -> Outcome:
    outcome = Outcome()
    cases = [(where, how) for where in PLACES for how in HOWS]
    for where, how in [("init", "hang"), ("log", "raise")] if short else cases:
        at = folder / f"{where} {how}"
        package = _fake(at, where, how)
        if where != "finish":
            (at / "reach").touch()
        failure = _run(at, "offline", 1.0, PYTHONPATH=os.pathsep.join([str(package), str(ROOT)]))
        if failure is None and not (at / "reached").exists():
            failure = "the fault was not met"
        outcome.add(f"{how} in {where}: {failure}" if failure else None)
    return outcome


NAIVE = """
import sys, wandb
from pathlib import Path
run = wandb.init(settings=wandb.Settings())
run.define_metric("step")
run.config.update({})
for step in range(20):
    run.log({"step": step})
run.finish()
Path(sys.argv[1]).touch()
"""


def naive_loop(folder: Path, short: bool) -> Outcome:
    """A loop that calls the package itself: in the same faults it stops, or is not through with its steps when the other runs long were."""
    outcome = Outcome(note="stopped or waited")
    cases = [(where, how) for where in PLACES for how in ("raise", "hang")]
    for where, how in [("init", "hang"), ("log", "raise")] if short else cases:
        at = folder / f"{where} {how}"
        environment = {**os.environ, "PYTHONPATH": str(_fake(at, where, how))}
        process = subprocess.Popen([sys.executable, "-c", NAIVE, str(at / "done")], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (at / "reached").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        outcome.add(None if (at / "done").exists() else f"{how} in {where}")
    return outcome


FAULTS = [
    Fault("W&B refused, unroutable or answering nonsense", no_server),
    Fault("W&B raising, hanging or dying in each of its calls", misbehaving),
    Fault("control: a loop that calls W&B itself", naive_loop, is_control=True),
]
