#!/usr/bin/env python3
"""What a training step keeps in a GPU's memory, case by case (memory_cases.py), as the allocator counts it: weights, gradients and optimizer; the peak of a
step above them, which is activations and temporary buffers; and what the allocator took from the device to serve that.

One process does all cases, each from an empty allocator; a step is done before the measured ones, for compilers and lazily made buffers. On a CPU the
process's resident set stands in, whose peak cannot be begun anew: there it only shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memory_cases import CASES, settings  # noqa: E402

from megatron_skywork import device  # noqa: E402

GIB = 2**30


def measure(name: str, steps: int) -> dict[str, Any]:
    """Build a case's model, train, and count."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator

    from megatron_skywork.config.schema import Config
    from megatron_skywork.data.loader import build_train_loader
    from megatron_skywork.metrics.throughput import PhaseTimer
    from megatron_skywork.model.build import build_chunks, wrap_for_training
    from megatron_skywork.optim.build import build_optimizer
    from megatron_skywork.plan.parameters import count_parameters
    from megatron_skywork.train.step import TrainStep

    config = Config(**settings(name))
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, config.train.global_batch_size, config.train.micro_batch_size, 1)
    release()
    before = device.allocated_bytes()
    chunks = wrap_for_training(config, build_chunks(config))
    optimizer = build_optimizer(config, chunks)
    step = TrainStep(config, chunks, optimizer, config.train.global_batch_size // config.train.micro_batch_size, PhaseTimer())
    built = device.allocated_bytes() - before
    batches = build_train_loader(config, dp_rank=0, dp_size=1, consumed_samples=0, pin_memory=device.has_gpu())
    step(1, batches)
    release()
    held = device.allocated_bytes() - before
    for number in range(2, 2 + steps):
        step(number, batches)
    device.synchronize()
    peak, reserved = device.peak_memory_bytes() - before, device.reserved_peak_bytes()
    count = count_parameters(config)
    for owner in [*getattr(optimizer, "chained_optimizers", []), optimizer, step, *(module for chunk in chunks for module in chunk.modules())]:
        vars(owner).clear()  # hooks of gradients form a cycle that Python's collector cannot see
    return {
        "case": name, "settings": CASES[name], "parameters": count.padded_total, "built_bytes": built, "held_bytes": held, "peak_bytes": peak,
        "step_bytes": peak - held, "reserved_bytes": reserved,
    }  # fmt: skip


def release() -> None:
    """Leave nothing of what is not held, and begin the peak anew."""
    gc.collect()
    device.forget_peak_memory()


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"{result['device']}, {result['versions']}"
    yield "| case | parameters | held, bytes a parameter | held | step | peak | taken from the device |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in result["cases"]:
        if "failed" in row:
            yield f"| {row['case']} | failed: {row['failed']} | | | | | |"
            continue
        figures = " | ".join(f"{row[key] / GIB:.3f} GiB" for key in ("held_bytes", "step_bytes", "peak_bytes", "reserved_bytes"))
        yield f"| {row['case']} | {row['parameters']:,} | {row['held_bytes'] / row['parameters']:.2f} | {figures} |"


def run(names: list[str], steps: int) -> dict[str, Any]:
    """All cases, one after the other."""
    device.prepare()
    import megatron.core
    import torch

    from megatron_skywork import parallel
    from megatron_skywork.config.schema import Config

    parallel.start(Config(**settings(names[0])))
    rows = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        try:
            rows.append(measure(name, steps))
        except (RuntimeError, ValueError, AssertionError) as failure:
            rows.append({"case": name, "failed": str(failure).splitlines()[0][:200]})
    versions = {"python": platform.python_version(), "torch": torch.__version__, "megatron-core": megatron.core.__version__}
    return {"benchmark": "memory", "command": shlex.join(["python", *sys.argv]), "device": device.name(), "versions": versions, "cases": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cases", metavar="A,B", help=f"out of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="measured, after one that is not (default 2)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    names = list(CASES) if arguments.cases is None else arguments.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases {', '.join(unknown)}: there is {', '.join(CASES)}")
    if arguments.steps < 1:
        parser.error("--steps must be 1 or more")
    result = run(names, arguments.steps)
    for line in [json.dumps(result, indent=1)] if arguments.json else table(result):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
