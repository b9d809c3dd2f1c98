"""A SLURM of the test's own on this machine: munged, slurmctld and several slurmd, in one temporary folder, on free ports, beside any SLURM of the system.

Nodes are named n1, n2, ... and all have this machine's address. `low` is the default partition; a job in `high` preempts what runs there, with a grace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
GRACE_SECONDS = 60
PR_SET_PDEATHSIG = 1


def missing() -> list[str]:
    """What is needed and not here, in words; empty where a cluster can be started."""
    found = [f"the program {name}" for name in PROGRAMS if _program(name) is None]
    return found + ([] if os.geteuid() == 0 else ["root"])


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


def _die_with_parent() -> None:
    """Nothing of a cluster outlives its test, even if that is killed; and a Ctrl-C in the terminal does not reach the daemons before `close` does."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class PrivateCluster:
    """Starts the daemons; `close` ends them and nothing else.

    Args:
        folder: everything lies in it; short, because a socket's path holds 107 bytes.
        num_nodes: how many slurmd.
    """

    def __init__(self, folder: Path, num_nodes: int):
        self.folder, self.nodes = folder, [f"n{number}" for number in range(1, num_nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "log", *self.nodes):
            (folder / name).mkdir(parents=True)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.environment[name]
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        folder = self.folder
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "slurm.conf").write_text(self._configuration())
        # What `environment_of` says for one node, for the tasks there.
        prolog = folder / "task_prolog"
        prolog.write_text(f'#!/bin/sh\nif [ -f {folder}/$SLURMD_NODENAME/environment ]; then cat {folder}/$SLURMD_NODENAME/environment; fi\n')
        prolog.chmod(0o755)
        private = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
        self._daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", "--num-threads=2", *private)
        self.wait_for("munged's socket", (folder / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-i", "-f", str(folder / "slurm.conf"))
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", node, log=node)
        self.wait_for("idle nodes", lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * len(self.nodes), 60)

    def _configuration(self) -> str:
        host, folder = socket.gethostname(), self.folder
        control, *ports = free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        names = ",".join(self.nodes)
        return "\n".join([
            "ClusterName=private", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={control}", "SlurmUser=root", "SlurmdUser=root",
            # A requeued job waits until its old credential has expired: 120 s if nothing is said.
            "AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/%n", f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld", f"SlurmdLogFile={folder}/log/%n", "SlurmdParameters=config_overrides",
            f"TaskProlog={folder}/task_prolog", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MpiDefault=none", "SwitchType=switch/none",
            "ReturnToService=2", "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE",
            "SchedulerType=sched/backfill", "SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2", "KillWait=20", "OverTimeLimit=5",
            "JobAcctGatherType=jobacct_gather/none", "AccountingStorageType=accounting_storage/none", "JobCompType=jobcomp/none",
            *nodes,
            f"PartitionName=low Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS}",
            f"PartitionName=high Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
        ]) + "\n"

    def _daemon(self, program: str, *arguments: str, log: str | None = None) -> None:
        with (self.folder / "log" / f"{log or program}.out").open("wb") as output:
            path = _program(program)
            assert path is not None
            command = [path, *arguments]
            process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, preexec_fn=_die_with_parent)
        self._daemons[log or program] = process

    # -------------------------------------------------------------------------------------------------------------------- what a test does

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """A client command's output.

        Raises:
            AssertionError: it failed.
        """
        answer = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, f"{' '.join(words)} ended with {answer.returncode}: {answer.stdout}{answer.stderr}"
        return answer.stdout

    def kill_node(self, node: str) -> None:
        """A node that goes down: its slurmd and everything of jobs there dies at once, and SLURM notices."""
        self._daemons[node].kill()
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = place.read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in words and f"SLURM_CONF={self.folder}/slurm.conf".encode() in words:
                    os.kill(int(place.parent.name), signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")  # what slurmctld does after SlurmdTimeout

    @contextlib.contextmanager
    def environment_of(self, node: str, **variables: str) -> Iterator[None]:
        """Inside, all tasks that start on one node have these variables: a node that is not like the others."""
        path = self.folder / node / "environment"
        path.write_text("".join(f"export {name}={value}\n" for name, value in variables.items()))
        yield
        path.unlink()

    def job(self, number: int) -> dict[str, str]:
        """Fields of `scontrol show job`; the job is kept for minutes after its end."""
        words = self.run("scontrol", "show", "job", str(number), "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, number: int, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job's fields once it is in one of these states."""
        self.wait_for(f"job {number} in {'/'.join(states)}", lambda: self.job(number)["JobState"] in states, seconds)
        return self.job(number)

    def wait_for(self, what: str, happened, seconds: float) -> None:
        """Look twice a second, as long as a safety net allows.

        Raises:
            AssertionError: it did not happen, with the ends of the daemons' logs.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                if happened():
                    return
            time.sleep(0.5)
        logs = "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted((self.folder / "log").iterdir()))
        raise AssertionError(f"no {what} after {seconds} s\n{logs}")

    def close(self) -> None:
        """Cancel what runs, and end the daemons."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("scancel", "--user=root")
                self.wait_for("empty queue", lambda: not self.run("squeue", "-h").strip(), 30)
        for process in reversed(self._daemons.values()):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
