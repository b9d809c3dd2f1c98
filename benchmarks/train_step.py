#!/usr/bin/env python3
"""How fast a training step is, and how much memory it takes: this framework with all features of the Skywork-MoE report and without, plain megatron-core,
megatron-core with Transformer Engine, and transformers' Mixtral, of the same shape, on the same tokens, in the same precision, in one run on any device.

Everyone has a process of its own and takes turns: a repetition is a few steps of every contender, in an order that turns round with every repetition, and
gives one ratio for every pair; median and quartiles of these ratios are shown. The first steps of a process are not counted. On a GPU, where several models
may not fit side by side, a contender's process ends before the next one starts (--one-at-a-time); on CPU all stay, and only one computes.

A real router decides by its logits; a force-balanced one computes them too and then gives every expert the same (for the contenders on megatron-core). What
the features cost is read from the second: there capacity drops nothing, so both do the same products. With a real router dropping saves work, and the share
of assignments that were kept is shown.

Peak memory is the process's own: the allocator's peak on a GPU; on CPU the resident set's, with what the libraries took before the model was built beside.
MFU is TFLOP/s over the data sheet's peak, where it is known; next to it stands the share of what a large square product of torch reaches in the same run.
train_step_contenders.py says who is who, train_step_parts.py how a step's time is divided.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_step_process import Process, ProcessFailure, run_once  # noqa: E402
from train_step_summary import summarize  # noqa: E402
from train_step_table import plan_text, table  # noqa: E402
from train_step_workload import DIMENSIONS, NAMES, NOT_BALANCED, ONLY_BF16, SHAPES, Workload, expected_bytes, make_config  # noqa: E402

from megatron_skywork import device  # noqa: E402
from megatron_skywork.errors import ConfigError, UserError  # noqa: E402
from megatron_skywork.metrics.throughput import peak_tflops  # noqa: E402
from megatron_skywork.plan.flops import formula_text, report_flops_per_token, train_flops_per_token  # noqa: E402
from megatron_skywork.plan.parameters import count_parameters  # noqa: E402

ROUTERS = {"real": [False], "balanced": [True], "both": [False, True]}
MATMUL_SIZE = {"gpu": 8192, "cpu": 2048}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Bench:
    """The contenders of a run, and what each has done so far."""

    def __init__(self, arguments: argparse.Namespace, work: Workload):
        self.arguments, self.work = arguments, work
        self._alive: dict[str, Process] = {}
        self.cases: list[dict[str, Any]] = [
            {"contender": name, "router": "balanced" if balanced else "real", "repetitions": []}
            for balanced in ROUTERS[arguments.router]
            for name in arguments.contenders
            if not (balanced and name in NOT_BALANCED)
        ]
        self.facts: dict[str, dict[str, Any]] = {name: {} for name in arguments.contenders}

    def run(self) -> None:
        """All repetitions of everyone, then the parts."""
        names = list(self.arguments.contenders)
        with contextlib.ExitStack() as stack:
            for turn in range(self.arguments.repetitions):
                for name in names if turn % 2 == 0 else names[::-1]:
                    self._turn(stack, name, turn)
            for name in [name for name in names if name in self._alive]:
                with self._guarded(name):
                    self._finish(name)

    def _turn(self, stack: contextlib.ExitStack, name: str, turn: int) -> None:
        """One repetition of a contender, with every kind of router it has."""
        if "failed" in self.facts[name]:
            return
        repetitions, alone = self.arguments.repetitions, self.arguments.one_at_a_time
        with self._guarded(name):
            if name not in self._alive:
                self._start(stack, name)
            cases = self._cases_of(name)
            for case in cases if turn % 2 == 0 else cases[::-1]:
                block = self._steps(name, case, self.arguments.steps)
                case["repetitions"].append(block)
                say(f"repetition {turn + 1}/{repetitions}, {name}, {case['router']} router: {min(block['wall']):.3f} s a step")
            if alone and turn == repetitions - 1:
                self._finish(name)
            elif alone:
                self._memory(name)
            if alone:
                self._alive.pop(name).stop()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """A contender that fails says why in its row; the others go on."""
        try:
            yield
        except ProcessFailure as failure:
            say(f"{name}: {failure}")
            self.facts[name]["failed"] = str(failure)
            if name in self._alive:
                self._alive.pop(name).stop()

    def _start(self, stack: contextlib.ExitStack, name: str) -> None:
        say(f"{name}: starting")
        process = stack.enter_context(Process({"contender": name, "workload": self.work.as_dict()}, self.arguments.timeout))
        facts = process.read()
        self._alive[name] = process
        self.facts[name] = {**facts, "peak_bytes": self.facts[name].get("peak_bytes", 0)}
        for case in self._cases_of(name):
            case.setdefault("warmup", []).append(self._steps(name, case, self.arguments.warmup))

    def _finish(self, name: str) -> None:
        """What is measured once: memory, before the marks and the profiler add theirs, then the parts."""
        self._memory(name)
        for case in self._cases_of(name) if self.arguments.parts else []:
            say(f"{name}, {case['router']} router: parts of a step")
            command = {"do": "parts", "count": self.arguments.parts, "clock": self.arguments.clock, "balanced": case["router"] == "balanced"}
            case["parts"] = self._alive[name].ask(command)

    def _memory(self, name: str) -> None:
        facts = self.facts[name]
        facts["peak_bytes"] = max(facts["peak_bytes"], self._alive[name].ask({"do": "memory"})["peak_bytes"])

    def _steps(self, name: str, case: dict[str, Any], count: int) -> dict[str, Any]:
        return self._alive[name].ask({"do": "steps", "count": count, "balanced": case["router"] == "balanced"})

    def _cases_of(self, name: str) -> list[dict[str, Any]]:
        return [case for case in self.cases if case["contender"] == name]


def plan(arguments: argparse.Namespace, work: Workload) -> dict[str, Any]:
    """What will be run and what it amounts to."""
    config = make_config(work, features=True)
    count = count_parameters(config)
    return {
        "workload": work.as_dict(), "tokens_per_step": work.shape.tokens, "parameters": count.padded_total, "active_parameters": count.active,
        "flops_per_token": train_flops_per_token(config), "flops_formula": formula_text(config), "report_flops_per_token": report_flops_per_token(config),
        "contenders": arguments.contenders, "router": arguments.router, "warmup": arguments.warmup, "steps": arguments.steps,
        "repetitions": arguments.repetitions, "one_at_a_time": arguments.one_at_a_time, "clock": arguments.clock,
        "expected_bytes": {name: expected_bytes(work, name) for name in arguments.contenders},
    }  # fmt: skip


def check_memory(planned: dict[str, Any]) -> None:
    """Refuse what cannot fit on CPU: running out of memory there ends other programs too. A GPU answers by itself.

    Raises:
        ConfigError: it does not fit.
    """
    expected = [size for name, size in planned["expected_bytes"].items() if not name.endswith("-te")]  # those need a GPU
    needed, free = max(expected, default=0) if planned["one_at_a_time"] else sum(expected), free_bytes()
    if not device.has_gpu() and free is not None and needed > free:
        raise ConfigError(f"about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} are free; "
                          "choose a smaller --shape, fewer --contenders, or --one-at-a-time")  # fmt: skip


def free_bytes() -> int | None:
    """Memory the kernel could give now; None where it does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def measure(arguments: argparse.Namespace, work: Workload, planned: dict[str, Any]) -> dict[str, Any]:
    """The whole run."""
    matmul = {"contender": "matmul", "workload": work.as_dict(), "size": arguments.matmul_size, "clock": arguments.clock}
    say("measuring the peak of a matrix product")
    before = run_once(matmul, arguments.timeout)
    bench = Bench(arguments, work)
    bench.run()
    after = run_once(matmul, arguments.timeout)
    machine = {name: before[name] for name in ("device", "threads", "python", "versions")}
    peak = peak_tflops(machine["device"]) if work.precision == "bf16" else None
    found = {"tflops_before": before["tflops"], "tflops_after": after["tflops"]}
    result = {
        "benchmark": "train_step", "command": shlex.join(["python", *sys.argv]), **machine, "cores": os.cpu_count(), "cpu": processor(),
        "load": os.getloadavg(), **planned, "peak_tflops": peak, "matmul": {"size": before["size"], "tflops": max(found.values()), **found},
        "cases": bench.cases, "facts": bench.facts,
    }  # fmt: skip
    return result | summarize(result)


def processor() -> str:
    """The processor's own name, where the kernel tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, Workload]:
    """The command line."""
    on_gpu = device.has_gpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--shape", default="skywork_layer" if on_gpu else "cpu", choices=tuple(SHAPES), help="default: skywork_layer on a GPU, cpu without")
    for name in DIMENSIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the shape's")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default bf16")
    parser.add_argument("--contenders", type=listed, metavar="A,B", help=f"out of {', '.join(NAMES)} (default: all that know the precision)")
    parser.add_argument("--router", choices=tuple(ROUTERS), default="both", help="default both")
    parser.add_argument("--repetitions", type=int, default=3 if on_gpu else 5, metavar="N", help="default 3 on a GPU, 5 without")
    parser.add_argument("--steps", type=int, default=5 if on_gpu else 2, metavar="N", help="of everyone in a repetition (default 5 on a GPU, 2 without)")
    parser.add_argument("--warmup", type=int, default=3 if on_gpu else 1, metavar="N",
                        help="steps of a process that are not counted (default 3 on a GPU, 1 without)")  # fmt: skip
    parser.add_argument("--parts", type=int, default=2, metavar="N", help="steps whose parts are measured; 0 leaves them out (default 2)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: all figures in processor time, for a CPU that does other work; set OMP_WAIT_POLICY=passive too, or waiting threads "
                             "count as working (default wall)")  # fmt: skip
    parser.add_argument("--one-at-a-time", action=argparse.BooleanOptionalAction, default=on_gpu, help="default: on a GPU")
    parser.add_argument("--matmul-size", type=int, default=MATMUL_SIZE["gpu" if on_gpu else "cpu"], metavar="N", help="of the product that shows the peak")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="that one answer of a contender may take (default 900)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of tokens and weights (default 1234)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, its FLOPs and the memory it needs, and exit")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args(words)
    if min(arguments.repetitions, arguments.steps, arguments.warmup, arguments.matmul_size) < 1 or arguments.parts < 0:
        parser.error("--repetitions, --steps, --warmup and --matmul-size must be 1 or more, --parts 0 or more")
    if arguments.clock == "cpu" and on_gpu:
        parser.error("--clock cpu does not see what a GPU does; leave it out")
    arguments.contenders = arguments.contenders or [name for name in NAMES if arguments.precision == "bf16" or name not in ONLY_BF16]
    given = {name: getattr(arguments, name) for name in DIMENSIONS if getattr(arguments, name) is not None}
    wrong = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value < 1]
    if wrong:
        parser.error(f"{', '.join(wrong)}: must be 1 or more")
    return arguments, Workload(replace(SHAPES[arguments.shape], **given), arguments.precision, arguments.seed)


def listed(text: str) -> list[str]:
    """`a,b` as names of contenders."""
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there is {', '.join(NAMES)}")
    return list(dict.fromkeys(names))


def lines_of(arguments: argparse.Namespace, work: Workload) -> Iterator[str]:
    """What is printed."""
    planned = plan(arguments, work)
    if arguments.dry_run:
        yield from [json.dumps(planned)] if arguments.json else plan_text(planned)
        return
    check_memory(planned)
    result = measure(arguments, work, planned)
    yield from [json.dumps(result)] if arguments.json else table(result)


def main() -> int:
    arguments, work = parse()
    try:
        for line in lines_of(arguments, work):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
