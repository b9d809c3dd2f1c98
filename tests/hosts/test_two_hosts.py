"""torchrun over two hosts that see each other through one cable only, which is pulled in the middle of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import Host, missing, two_hosts
from training_bodies import records

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from compare_runs import FIELDS, compare_steps, steps_of  # noqa: E402

pytestmark = pytest.mark.hosts
LACKING = missing()
# A hang is noticed after this, and every rank must be gone soon after.
WATCHDOG = ["watchdog.step_seconds=10", "watchdog.save_seconds=10"]
SAFETY_SECONDS = 150
SMALL = [
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=32", "data.seq_length=16", "train.micro_batch_size=1", "parallel.ep=2",
    "train.precision=fp32", "train.steps=100000", "optim.schedule=constant", "checkpoint.every=5",
]  # fmt: skip


def start(hosts: tuple[Host, Host], run_dir: Path, stop_at_step: int, rendezvous: str = "static") -> list[subprocess.Popen]:
    """One torchrun on each host, as a user types it; they meet on the first one."""
    processes = []
    for number, host in enumerate(hosts):
        first = hosts[0].address
        meet = {
            "static": ["--rdzv-backend=static", f"--node-rank={number}", f"--master-addr={first}", "--master-port=29400"],
            "c10d": ["--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29400", f"--rdzv-conf=is_host={int(number == 0)}", f"--local-addr={host.address}"],
        }[rendezvous]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0", "--rdzv-id=two-hosts", *meet]
        run = ["launch/pretrain_moe.py", "--config", "configs/tiny.yaml", f"run_dir={run_dir}", *SMALL, *WATCHDOG, f"train.stop_at_step={stop_at_step}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.interface}
        with run_dir.with_name(f"{run_dir.name}.{host.address}.log").open("ab") as log:
            command = host.command(*launcher, *run)
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
    return processes


def cut_in_the_middle(hosts: tuple[Host, Host], processes: list[subprocess.Popen], run_dir: Path) -> None:
    """Pull the second host's cable once some steps after a save are done."""
    wait_for(lambda: last_step(run_dir) >= 7 or any(process.poll() is not None for process in processes), run_dir)
    assert all(process.poll() is None for process in processes), logs(run_dir)
    hosts[1].cut_off()


def wait_for(happened: Callable[[], bool], run_dir: Path) -> None:
    deadline = time.monotonic() + SAFETY_SECONDS
    while not happened():
        assert time.monotonic() < deadline, logs(run_dir)
        time.sleep(0.2)


def ends(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes; whoever has not ended when the safety net is reached is killed and fails the test."""
    deadline = time.monotonic() + SAFETY_SECONDS
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def inside(host: Host) -> list[str]:
    """Processes that still run on a host."""
    return subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True).stdout.split()


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir)), default=0) if (run_dir / "metrics.jsonl").is_file() else 0


def logs(run_dir: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(run_dir.parent.glob(f"{run_dir.name}.*.log")))


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if LACKING:
        pytest.skip(f"two hosts were not tested: {', '.join(LACKING)} missing")
    with two_hosts() as pair:
        yield pair


def test_a_host_that_is_cut_off_ends_the_job_on_both_and_the_same_command_goes_on(hosts: tuple[Host, Host], tmp_path: Path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    processes = start(hosts, cut, 100_000)
    cut_in_the_middle(hosts, processes, cut)
    codes = ends(processes)
    assert all(codes), f"{codes}: the run cannot have ended in order\n{logs(cut)}"
    assert (inside(hosts[0]), inside(hosts[1])) == ([], []), f"ranks outlived their torchrun\n{logs(cut)}"
    status = json.loads((cut / "run_status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 1)

    hosts[1].plug_in()
    until = last_step(cut) + 3
    assert ends(start(hosts, cut, until)) == [0, 0], logs(cut)
    assert ends(start(hosts, whole, until)) == [0, 0], logs(whole)
    assert [event["event"] for event in records(cut, "event")].count("resume") == 1
    same = compare_steps(steps_of(cut), steps_of(whole), 1, None, FIELDS, 0.0)
    assert (same["steps"], same["differing_steps"]) == (list(range(1, until + 1)), [])


def test_with_a_c10d_rendezvous_the_ranks_end_too_and_the_launcher_when_the_link_is_back(hosts: tuple[Host, Host], tmp_path: Path):
    """torchrun itself waits for its store on the other host, without a limit; its ranks, which hold the devices, must not."""
    processes = start(hosts, tmp_path / "cut", 100_000, "c10d")
    cut_in_the_middle(hosts, processes, tmp_path / "cut")
    launchers = {str(process.pid) for process in processes}
    wait_for(lambda: set(inside(hosts[0]) + inside(hosts[1])) <= launchers, tmp_path / "cut")
    hosts[1].plug_in()
    assert all(ends(processes))
