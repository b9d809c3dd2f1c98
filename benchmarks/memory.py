#!/usr/bin/env python3
"""What a training step keeps in a GPU's memory, case by case (memory_cases.py), as the allocator counts it: weights, gradients and optimizer; the peak of a
step above them, which is activations and temporary buffers; what the allocator took from the device to serve that; and what the planner says of the peak.

One process does all cases, each from an empty allocator; a step is done before the measured ones, for compilers and lazily made buffers. On a CPU the
process's resident set stands in, whose peak cannot be begun anew: there it only shows that the script runs.

With --layouts small models run on CPU ranks instead, under every kind of parallelism, and each allocation is traced (memory_trace.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memory_cases import CASES, LAYOUTS, layout_settings, settings  # noqa: E402

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
    from megatron_skywork.plan.memory import stage_memory
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
        "step_bytes": peak - held, "reserved_bytes": reserved, "planned_peak_bytes": stage_memory(config, 1)[0].allocated,
    }  # fmt: skip


def release() -> None:
    """Leave nothing of what is not held, and begin the peak anew."""
    gc.collect()
    device.forget_peak_memory()


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"{result['device']}, {result['versions']}"
    yield "| case | parameters | held, bytes a parameter | held | step | peak | planned peak | taken from the device |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in result["cases"]:
        if "failed" in row:
            yield f"| {row['case']} | failed: {row['failed']} | | | | | | |"
            continue
        figures = " | ".join(f"{row[key] / GIB:.3f} GiB" for key in ("held_bytes", "step_bytes", "peak_bytes", "planned_peak_bytes", "reserved_bytes"))
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


def measure_layout(name: str, scale: int) -> list[dict[str, Any]]:
    """One layout on CPU ranks: traced and planned bytes of the first rank of each stage."""
    from memory_trace import traced_step
    from scaling_ranks import on_ranks

    from megatron_skywork.config.schema import Config
    from megatron_skywork.plan.activations import CPU
    from megatron_skywork.plan.memory import stage_memory

    world, changed = layout_settings(name, scale)
    planned = stage_memory(Config(**changed), world, device=CPU)
    with tempfile.TemporaryDirectory() as folder:
        answers = on_ranks(world, traced_step, {**changed, "run_dir": folder})
    first = {answer["stage"]: answer for answer in reversed(answers)}
    return [
        {"layout": name, "ranks": world, "stage": stage + 1, "held_bytes": first[stage]["built_bytes"], "planned_held_bytes": memory.held,
         "step_bytes": first[stage]["peak_bytes"], "planned_step_bytes": memory.step}
        for stage, memory in enumerate(planned)
    ]  # fmt: skip


def run_layouts(names: list[str], scale: int) -> dict[str, Any]:
    """All layouts, one after the other."""
    device.prepare()
    import megatron.core
    import torch

    rows = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        rows += measure_layout(name, scale)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "megatron-core": megatron.core.__version__}
    return {
        "benchmark": "memory of layouts",
        "command": shlex.join(["python", *sys.argv]),
        "device": "cpu",
        "versions": versions,
        "scale": scale,
        "layouts": rows,
    }


def layout_table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table, and the mean error."""
    yield f"{result['device']}, {result['versions']}"
    yield "| layout | ranks | stage | held, MiB | planned | step, MiB | planned | error |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    errors = []
    for row in result["layouts"]:
        errors.append(row["planned_step_bytes"] / row["step_bytes"] - 1)
        figures = " | ".join(f"{row[key] / 2**20:.2f}" for key in ("held_bytes", "planned_held_bytes", "step_bytes", "planned_step_bytes"))
        yield f"| {row['layout']} | {row['ranks']} | {row['stage']} | {figures} | {errors[-1]:+.2%} |"
    yield f"error of a step's bytes: mean {sum(map(abs, errors)) / len(errors):.2%}, largest {max(map(abs, errors)):.2%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cases", metavar="A,B", help=f"out of: {', '.join(CASES)}; with --layouts out of: {', '.join(LAYOUTS)} (default: all)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="measured, after one that is not (default 2)")
    parser.add_argument("--layouts", action="store_true", help="on CPU ranks instead, with every allocation traced")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="with --layouts: N times as wide, and as many tokens (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    known = list(LAYOUTS if arguments.layouts else CASES)
    names = known if arguments.cases is None else arguments.cases.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--cases {', '.join(unknown)}: there is {', '.join(known)}")
    if min(arguments.steps, arguments.scale) < 1:
        parser.error("--steps and --scale must be 1 or more")
    result = run_layouts(names, arguments.scale) if arguments.layouts else run(names, arguments.steps)
    write = layout_table if arguments.layouts else table
    for line in [json.dumps(result, indent=1)] if arguments.json else write(result):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
