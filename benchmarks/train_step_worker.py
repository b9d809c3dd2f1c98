"""The process of one contender of benchmarks/train_step.py: builds it, then does what it is told, one line of JSON in, one out.

A process each keeps peak memory apart, and libraries that change each other (the redirections for megatron-core on CPU) too. Between commands it sleeps.
Standard output carries the answers; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from train_step_contenders import CONTENDERS, Contender, require_installed  # noqa: E402
from train_step_parts import measure_parts  # noqa: E402
from train_step_workload import Workload  # noqa: E402

from megatron_skywork import device  # noqa: E402
from megatron_skywork.errors import UserError  # noqa: E402

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "triton")
_MATMULS = 10


def import_libraries(name: str) -> None:
    """What the contender will need, so that its memory can be told from its libraries'."""
    if name.startswith("hf"):
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    else:
        device.prepare()
        import megatron_skywork.train.step  # noqa: F401


def build(name: str, work: Workload) -> tuple[Contender, dict[str, Any]]:
    """The contender, and what there is to say of it."""
    require_installed(name)
    import_libraries(name)
    before, started = device.peak_memory_bytes(), time.perf_counter()
    contender = CONTENDERS[name](work)
    return contender, {
        "start_bytes": before,
        "build_seconds": time.perf_counter() - started,
        "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
    }


def about() -> dict[str, Any]:
    """This machine, as a worker sees it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": device.name(), "threads": torch.get_num_threads(), "python": sys.version.split()[0], "versions": versions}


def take_steps(contender: Contender, count: int, balanced: bool) -> dict[str, Any]:
    """Time every step: by the clock, and in processor time of this process, which other programs on the machine touch less."""
    wall, cpu, loss = [], [], []
    with contender.balanced(balanced):
        for _ in range(count):
            device.synchronize()
            started, started_cpu = time.perf_counter(), time.process_time()
            loss.append(contender.step())
            device.synchronize()
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - started_cpu)
    return {"wall": wall, "cpu": cpu, "loss": loss}


def measure_matmul(precision: str, size: int, clock: str) -> dict[str, Any]:
    """TFLOP/s of the best of several square products."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device.current(), dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(_MATMULS + 1):
        device.synchronize()
        started = now()
        a @ b
        device.synchronize()
        seconds.append(now() - started)
    return {"size": size, "seconds": seconds[1:], "tflops": 2 * size**3 / min(seconds[1:]) / 1e12}


def answer(contender: Contender, command: dict[str, Any]) -> dict[str, Any]:
    """Do one command."""
    if command["do"] == "steps":
        return take_steps(contender, command["count"], command["balanced"])
    if command["do"] == "parts":
        with contender.balanced(command["balanced"]):
            return measure_parts(contender.step, contender.model, contender.calls, command["count"], command["clock"])
    return {"peak_bytes": device.peak_memory_bytes()}


def main() -> int:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")

    def reply(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=replies, flush=True)

    task = json.loads(sys.argv[1])
    work = Workload.from_dict(task["workload"])
    try:
        if task["contender"] == "matmul":
            reply({**about(), **measure_matmul(work.precision, task["size"], task["clock"])})
            return 0
        contender, facts = build(task["contender"], work)
        reply({**about(), **facts})
        for line in sys.stdin:
            reply(answer(contender, json.loads(line)))
        return 0
    except UserError as error:
        reply({"failed": str(error)})
    except Exception as error:  # out of memory, a missing package: a row of its own, the others go on
        traceback.print_exc()
        reply({"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
    return 1


if __name__ == "__main__":
    # Without Python's way out: megatron-core's groups and a GPU's context take seconds to dismantle, and the process ends anyway.
    code = main()
    sys.stderr.flush()
    os._exit(code)
