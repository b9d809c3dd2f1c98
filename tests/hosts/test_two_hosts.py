"""torchrun over two hosts that see each other through one cable only, which is pulled in the middle of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from namespaces import Host, missing, two_hosts
from training_bodies import records

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from compare_runs import FIELDS, compare_steps, steps_of  # noqa: E402

pytestmark = pytest.mark.hosts
LACKING = missing()
# A hang is noticed after this, and every process must be gone soon after.
WATCHDOG = ["watchdog.step_seconds=20", "watchdog.save_seconds=20"]
SAFETY_SECONDS = 150
SMALL = [
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=32", "data.seq_length=16", "train.micro_batch_size=1", "parallel.ep=2",
    "train.precision=fp32", "train.steps=100000", "optim.schedule=constant", "checkpoint.every=5",
]  # fmt: skip


def start(hosts: tuple[Host, Host], run_dir: Path, stop_at_step: int) -> list[subprocess.Popen]:
    """One torchrun on each host, as a user types it; they meet on the first one."""
    processes = []
    for host in hosts:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0", "--local-addr", host.address]
        meet = ["--rdzv-backend=c10d", "--rdzv-id=two-hosts", f"--rdzv-endpoint={hosts[0].address}:29400", f"--rdzv-conf=is_host={int(host is hosts[0])}"]
        run = ["launch/pretrain_moe.py", "--config", "configs/tiny.yaml", f"run_dir={run_dir}", *SMALL, *WATCHDOG, f"train.stop_at_step={stop_at_step}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.interface}
        with run_dir.with_name(f"{run_dir.name}.{host.address}.log").open("ab") as log:
            command = host.command(*launcher, *meet, *run)
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
    return processes


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


@pytest.mark.skipif(bool(LACKING), reason=f"two hosts were not tested: {', '.join(LACKING)} missing")
def test_a_host_that_is_cut_off_ends_the_job_on_both_and_the_same_command_goes_on(tmp_path: Path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with two_hosts() as hosts:
        processes = start(hosts, cut, 100_000)
        deadline = time.monotonic() + SAFETY_SECONDS
        while last_step(cut) < 7:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes), logs(cut)
            time.sleep(0.2)
        hosts[1].cut_off()
        codes = ends(processes)
        assert all(codes), f"{codes}: the run cannot have ended in order\n{logs(cut)}"
        assert (inside(hosts[0]), inside(hosts[1])) == ([], []), f"ranks outlived their torchrun\n{logs(cut)}"

        hosts[1].plug_in()
        until = last_step(cut) + 3
        assert ends(start(hosts, cut, until)) == [0, 0], logs(cut)
        assert ends(start(hosts, whole, until)) == [0, 0], logs(whole)
    assert [event["event"] for event in records(cut, "event")].count("resume") == 1
    same = compare_steps(steps_of(cut), steps_of(whole), 1, None, FIELDS, 0.0)
    assert (same["steps"], same["differing_steps"]) == (list(range(1, until + 1)), [])
