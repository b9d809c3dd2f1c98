"""What one node says of itself before a job starts: its GPUs, memory, disk and versions, and how its ranks did in an all-reduce.

The checks of a node import no torch, so that a node with a broken installation still answers. `problems` are the node's own for certain; `link_problems` may
be the fault of any node of the group (see preflight_verdict.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_skywork.config.schema import Config

PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
GIB = 1 << 30
PROBE_BYTES = 1 << 20
GPU_FIELDS = ("name", "memory.total", "memory.free", "driver_version", "ecc.errors.uncorrected.volatile.total")


# ------------------------------------------------------------------------------------------------------------------------- a node by itself


def check_node(config: Config, node: str) -> dict[str, Any]:
    """The report of this node: problems, versions, facts."""
    limits = config.launch.preflight
    problems: list[str] = []
    memory, gpus = available_memory_bytes(), list_gpus()
    if memory < limits.min_memory_gib * GIB:
        problems.append(f"{memory / GIB:.1f} GiB of main memory are free, and launch.preflight.min_memory_gib is {limits.min_memory_gib:g}")
    if config.launch.request_gpus:
        problems += gpu_problems(gpus, config.parallel.gpus_per_node, limits.min_gpu_memory_gib)
    disk, trouble = check_disk(Path(config.run_dir), limits.min_disk_gib, node)
    return {
        "node": node,
        "host": socket.gethostname(),
        "problems": problems + trouble,
        "versions": versions(gpus),
        "free_memory_gib": memory / GIB,
        "free_disk_gib": disk / GIB,
        "gpus": [gpu["name"] for gpu in gpus],
        "free_gpu_memory_gib": min((gpu["free_gib"] for gpu in gpus), default=None),
    }


def available_memory_bytes() -> int:
    """Main memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def list_gpus() -> list[dict[str, Any]]:
    """What nvidia-smi lists; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    gpus = []
    for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(GPU_FIELDS):
            continue
        name, total, free, driver, errors = values
        gpus.append({"name": name, "total_gib": _number(total) / 1024, "free_gib": _number(free) / 1024, "driver": driver, "errors": int(_number(errors))})
    return gpus


def _number(text: str) -> float:
    """nvidia-smi writes [N/A] for what a card does not count."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def gpu_problems(gpus: list[dict[str, Any]], wanted: int, min_free_gib: float) -> list[str]:
    """What is wrong with a node's GPUs, numbered as nvidia-smi does."""
    if len(gpus) < wanted:
        way_out = "" if gpus else "; to train on CPUs set launch.request_gpus=false"
        return [f"{len(gpus)} GPUs, and parallel.gpus_per_node is {wanted}{way_out}"]
    problems = []
    for number, gpu in enumerate(gpus):
        if gpu["free_gib"] < min_free_gib:
            least = f"launch.preflight.min_gpu_memory_gib is {min_free_gib:g}"
            problems.append(f"GPU {number} has {gpu['free_gib']:.1f} GiB free, and {least}; does a process hold it?")
        if gpu["errors"]:
            problems.append(f"GPU {number} counts {gpu['errors']} memory errors that could not be corrected; reset or replace it")
    return problems


def check_disk(run_dir: Path, min_free_gib: float, node: str) -> tuple[int, list[str]]:
    """Free bytes where the run lies, and what is wrong: a file is written through to the disk and read back."""
    probe = run_dir / f".preflight_{node}_{os.getpid()}"
    content = secrets.token_bytes(PROBE_BYTES)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        same = probe.read_bytes() == content
    except OSError as failure:
        return 0, [f"{run_dir} cannot be written ({failure.strerror})"]
    finally:
        with contextlib.suppress(OSError):  # what cannot be written cannot be removed either
            probe.unlink()
    problems = [] if same else [f"a file in {run_dir} reads back other than it was written"]
    if free < min_free_gib * GIB:
        problems.append(f"{free / GIB:.1f} GiB are free in {run_dir}, and launch.preflight.min_disk_gib is {min_free_gib:g}")
    return free, problems


def versions(gpus: list[dict[str, Any]]) -> dict[str, str]:
    """What must be the same on every node."""
    found = {"Python": platform.python_version(), "the code of megatron_skywork": code_digest()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if gpus:
        found["the GPU"], found["the NVIDIA driver"] = gpus[0]["name"], gpus[0]["driver"]
    return found


def code_digest() -> str:
    """Twelve digits of a hash over the package's Python files: nodes without a shared disk may have another state of it."""
    digest, package = hashlib.sha256(), Path(__file__).resolve().parents[1] / "megatron_skywork"
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------------------- its ranks


def reduce_with(config: Config, node: str, group: list[str], meet: str) -> dict[str, Any]:
    """Run this node's ranks of an all-reduce over a group of nodes.

    Args:
        group: the nodes, this one among them; ranks are in their order.
        meet: HOST:PORT on the first node.

    Returns:
        the report: problems, link_problems, bandwidth, clock.
    """
    limits, ranks = config.launch.preflight, config.parallel.gpus_per_node
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        node_port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("preflight_ranks.py")), "--meet", meet, "--node-port", str(node_port)]
    command += ["--timeout", str(limits.timeout_seconds)]
    first = group.index(node) * ranks
    # Variables of an outer job would lead torch to another rendezvous.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC_", "MASTER_"))}
    processes = []
    for local_rank in range(ranks):
        place = {"RANK": first + local_rank, "WORLD_SIZE": len(group) * ranks, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": ranks}
        environment = {"OMP_NUM_THREADS": "1", **clean, **config.launch.environment, **{name: str(value) for name, value in place.items()}}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + limits.timeout_seconds
    answers = [_answer_of(process, deadline) for process in processes]
    return {"node": node, "group": group, **judge(answers, config)}


def _answer_of(process: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    """The parts a rank has done, and how it ended: `late` where the time was over."""
    late = False
    try:
        output, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        output, errors = process.communicate()
    parts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith('{"part"'):
            said = json.loads(line)
            parts[said.pop("part")] = said
    said_last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    return {"parts": parts, "late": late, "code": process.returncode, "said": said_last[:300]}


def judge(answers: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Problems of a node from what its ranks have answered."""
    limits = config.launch.preflight
    problems: list[str] = []
    links: list[str] = []
    for number, answer in enumerate(answers):
        parts = answer["parts"]
        how = f"no end within launch.preflight.timeout_seconds={limits.timeout_seconds}" if answer["late"] else f"exit code {answer['code']}: {answer['said']}"
        if "refused" in parts:
            problems.append(parts["refused"]["why"])
        elif "ready" not in parts:
            problems.append(f"rank {number} of the node does not start ({how})")
        elif len(answers) > 1 and "node" not in parts:
            problems.append(f"rank {number} of the node fails in an all-reduce inside the node ({how})")
        elif len(answers) > 1 and not parts["node"]["correct"]:
            problems.append(f"rank {number} of the node gets a wrong sum from an all-reduce inside the node")
        elif "all" not in parts:
            links.append(f"an all-reduce between the nodes fails ({how})")
        elif not parts["all"]["correct"]:
            links.append("an all-reduce between the nodes gives a wrong sum")
    whole = [answer["parts"]["all"] for answer in answers if "all" in answer["parts"]]
    speed = min((part["gb_per_second"] for part in whole), default=None)
    offset = max((part["clock_offset_seconds"] for part in whole), key=abs, default=None)
    if speed is not None and speed < limits.min_bandwidth_gb_per_second:
        links.append(f"{speed:.2f} GB/s in an all-reduce, and launch.preflight.min_bandwidth_gb_per_second is {limits.min_bandwidth_gb_per_second:g}")
    if offset is not None and abs(offset) > limits.max_clock_skew_seconds:
        problems.append(f"its clock is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the others'; launch.preflight.max_clock_skew_seconds is "
                        f"{limits.max_clock_skew_seconds:g}")
    inside = [answer["parts"]["node"]["gb_per_second"] for answer in answers if "node" in answer["parts"]]
    facts = {"gb_per_second": speed, "node_gb_per_second": min(inside, default=None), "clock_offset_seconds": offset}
    return {"problems": list(dict.fromkeys(problems)), "link_problems": list(dict.fromkeys(links)), **facts}
