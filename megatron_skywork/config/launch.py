"""Settings of a job on a cluster: what SLURM is asked for, when a job goes on and when it stops, what is checked of every node before it starts.

Nothing here changes a number of the run. The ranks do not read this section; `tools/submit.py` and the scripts of `launch/` do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megatron_skywork.config.section import NonNegative, NonNegativeFloat, Positive, Section

# What the scripts of launch/ decide themselves; another value would break what they do.
OURS = {"nodes", "ntasks", "ntasks-per-node", "signal", "requeue", "no-requeue", "no-kill", "open-mode", "array", "wrap", "parsable", "export", "gpus-per-node"}
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Container(Section):
    """Where Python and torch come from when the nodes have no environment of their own."""

    image: str | None = Field(None, description="Image for launch/pretrain_moe_container.sbatch: a path or name its runtime takes; unset: no container.")
    mounts: list[str] = Field(default_factory=list, description="Folders of the node to show inside, HOST:INSIDE; the project's folder is always shown under its own path.")
    runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="pyxis: srun --container-image (enroot); apptainer: apptainer exec.")


class Preflight(Section):
    """What every node must show before the ranks start; a node that does not is named and, where there is a spare, replaced."""

    enabled: bool = Field(True, description="Check the nodes before each start.")
    min_memory_gib: NonNegativeFloat = Field(1.0, description="Free main memory of a node.")
    min_gpu_memory_gib: NonNegativeFloat = Field(1.0, description="Free memory of every GPU, so that a process left behind is noticed.")
    min_disk_gib: NonNegativeFloat = Field(1.0, description="Free space where run_dir lies.")
    min_bandwidth_gb_per_second: NonNegativeFloat = Field(0.0, description="Bus bandwidth of an all-reduce over the nodes, in 10^9 bytes/s; 0: it is measured and reported only.")
    max_clock_skew_seconds: float = Field(5.0, gt=0, description="Largest difference of a node's clock from the others'.")
    timeout_seconds: Positive = Field(180, description="How long a check of all nodes may take; imports from a cold shared disk count.")


class Launch(Section):
    """A job under SLURM (tools/submit.py, launch/pretrain_moe.sbatch). It has no influence on the numbers of a run."""

    nodes: Positive | None = Field(None, description="Nodes that train, each with parallel.gpus_per_node ranks; tools/submit.py --nodes wins.")
    spare_nodes: NonNegative = Field(0, description="Further nodes of the job that take the place of nodes which fail the preflight.")
    request_gpus: bool = Field(True, description="Ask SLURM for parallel.gpus_per_node GPUs on each node, and fail the preflight of a node with fewer; false on CPUs.")
    sbatch: dict[str, Any] = Field(default_factory=dict, description="Further options of sbatch by their long names, e.g. {partition: gpu, time: '24:00:00', exclusive: true}.")
    environment: dict[str, str] = Field(default_factory=dict, description="Environment variables of the ranks, e.g. {NCCL_SOCKET_IFNAME: ib0}.")
    grace_seconds: int = Field(300, ge=60, description="How long before its time limit a job is told to save and stop.")
    max_stalled_starts: Positive = Field(3, description="Starts in a row that may leave the run's last saved step where it was; after so many the job ends. With progress there is no limit.")
    container: Container = Field(default_factory=Container, description="Container.")
    preflight: Preflight = Field(default_factory=Preflight, description="Checks of the nodes.")

    def rules(self) -> Iterator[tuple[tuple[str, ...], str]]:
        for name, value in self.sbatch.items():
            if not _OPTION.fullmatch(name):
                yield ("sbatch",), f"sbatch.{name}={value}: an option of sbatch by its long name without dashes, e.g. partition, is needed here"
            elif name in OURS:
                yield ("sbatch",), f"sbatch.{name}={value}: the scripts set --{name} themselves ({_instead(name)}); leave it out"
            elif not isinstance(value, (str, int)):
                yield ("sbatch",), f"sbatch.{name}={value}: text, a whole number, or true for an option without a value is needed here"
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                yield ("environment",), f"environment.{name}: letters, digits and _ make the name of a variable"


def _instead(option: str) -> str:
    words = {"nodes": "launch.nodes, launch.spare_nodes", "signal": "launch.grace_seconds", "export": "launch.environment",
             "gpus-per-node": "parallel.gpus_per_node, launch.request_gpus"}
    return words.get(option, "one torchrun a node, requeued by what the run says")
