#!/usr/bin/env python3
"""Measure what this machine's device really does, for the planner: matrix products, grouped products, attention, and memory, at sizes of real models.

A data sheet's peak is never reached; how far below it a product stays depends on its size. So every rate is a point: the operation's sizes, and what it
reached. Repetitions are timed with the device's own clock, several in a row so that a GPU does not wait for the host, inputs are random (products of zeros run
faster), and buffers are larger than caches. The median is written.

What is written is a cluster: the planner takes the file as --cluster, and other cluster files can name it under `rates`. Links between devices are measured
where the tool is started by torchrun on several ranks; all ranks then measure at the same time, as they would work in training. Ranks on one node give the
link inside a node, on several the network.

    python tools/calibrate.py --write machine.yaml
    torchrun --nproc-per-node 8 tools/calibrate.py --write machine.yaml
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_skywork import device  # noqa: E402
from megatron_skywork.errors import ConfigError  # noqa: E402
from megatron_skywork.plan.hardware import MEASURED, packaged_gpu  # noqa: E402
from tool_main import finish  # noqa: E402

# (rows, inner, columns) of a layer's products: tokens of a micro-batch by hidden sizes and FFN widths of 1B, 7B, 13B and Skywork-MoE models, and their parts
# under tensor parallelism; then squares.
PRODUCTS = [
    (8192, 2048, 6144), (8192, 4096, 12288), (8192, 4608, 13824), (8192, 4608, 24576), (8192, 12288, 4608), (4096, 4608, 12288),
    (8192, 4608, 3456), (8192, 1152, 4608), (8192, 4608, 6144), (8192, 3072, 4608), (1024, 4608, 24576), (2048, 4608, 24576),
    (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192),
]  # fmt: skip
# (experts of a rank, rows of all, hidden, expert FFN width)
GROUPED = [(16, 16384, 4608, 12288), (8, 16384, 4608, 12288), (4, 16384, 4608, 12288), (2, 16384, 4608, 12288), (8, 16384, 2048, 1408), (64, 49152, 2048, 1408)]
# (sequence, heads, key and value groups, width)
ATTENTION = [(2048, 32, 32, 128), (4096, 36, 36, 128), (8192, 36, 36, 128), (8192, 32, 8, 128), (32768, 8, 8, 128)]
COPIES = [2**22, 2**25, 2**28, 2**30]
SMALL = 32  # on a CPU every size is divided by this


IN_A_ROW_SECONDS = 0.005  # of calls timed together on a GPU; the host's part of the first is then a few percent at most


def seconds_of(work: Callable[[], Any], at_least: int, budget_seconds: float, in_a_row: int | None = None) -> float:
    """Median time of one call, by the device's clock.

    Args:
        in_a_row: calls timed together; unset: as many as fill IN_A_ROW_SECONDS on a GPU, 1 on a CPU, which waits for nobody.
    """
    for _ in range(2):
        work()
    calls = in_a_row or 1
    if in_a_row is None and device.has_gpu():
        calls = math.ceil(IN_A_ROW_SECONDS / max(_timed(work, 1), IN_A_ROW_SECONDS / 1000))
    times: list[float] = []
    while len(times) < at_least or (sum(times) * calls < budget_seconds and len(times) < 50):
        times.append(_timed(work, calls))
    return statistics.median(times)


def _timed(work: Callable[[], Any], calls: int) -> float:
    device.synchronize()
    start = device.moment()
    for _ in range(calls):
        work()
    return device.seconds_between(start, device.moment()) / calls


class Calibration:
    """The measurements, each a list of points.

    Args:
        dtype_name: bf16 or fp32.
        budget_seconds: for the repetitions of one point.
    """

    def __init__(self, dtype_name: str, budget_seconds: float):
        import torch

        self._torch, self._dtype = torch, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
        self._shrink = 1 if device.has_gpu() else SMALL
        self._budget = budget_seconds

    def matmul(self) -> list[dict[str, Any]]:
        """[rows, inner] x [inner, columns]."""
        points = []
        for rows, inner, columns in self._sizes(PRODUCTS):
            left, right = self._random(rows, inner), self._random(columns, inner)
            seconds = self._time(partial(self._torch.mm, left, right.t()))
            points.append({"rows": rows, "inner": inner, "columns": columns, "tflops": 2e-12 * rows * inner * columns / seconds})
        return points

    def grouped_matmul(self) -> list[dict[str, Any]]:
        """A forward and backward pass of the experts of a layer, rows spread evenly: six products."""
        from megatron_skywork.moe.grouped_mlp import grouped_mlp

        points = []
        for experts, rows, hidden, width in GROUPED:
            rows, hidden, width = (max(64, size // self._shrink) for size in (rows, hidden, width))
            probs = self._torch.rand(rows, device=device.current())
            inputs = [self._random(rows, hidden), probs, self._random(experts, 2 * width, hidden), self._random(experts, hidden, width)]
            ends = (self._torch.arange(1, experts + 1, device=device.current()) * (rows // experts)).int()
            seconds = self._time(partial(self._both_ways, partial(grouped_mlp, ends_E=ends), inputs, self._random(rows, hidden)))
            points.append({"experts": experts, "rows": rows, "hidden": hidden, "width": width, "tflops": 18e-12 * rows * hidden * width / seconds})
        return points

    def attention(self) -> list[dict[str, Any]]:
        """Causal attention of one sequence; FLOPs count the half of the scores that is looked at."""
        from megatron_skywork.model.attention import causal_attention

        points = []
        for sequence, heads, groups, width in ATTENTION:
            sequence = max(64, sequence // self._shrink)
            inputs = [self._random(sequence, 1, count, width).requires_grad_() for count in (heads, groups, groups)]
            attend = partial(causal_attention, dropout=0.0, scale=None)
            forward = self._time(partial(attend, *inputs))
            both = self._time(partial(self._both_ways, attend, inputs, self._random(sequence, 1, heads * width)))
            flops = 2e-12 * sequence**2 * heads * width  # two products of S x S x D, half of each
            points.append({"sequence": sequence, "heads": heads, "groups": groups, "width": width, "forward_tflops": flops / forward,
                           "backward_tflops": 2.5 * flops / max(both - forward, 1e-9)})  # fmt: skip
        return points

    def copy(self) -> list[dict[str, Any]]:
        """Memory to memory on the device, bytes read and bytes written both counted."""
        points = []
        for size in COPIES:
            source = self._torch.randint(0, 255, (size // self._shrink,), dtype=self._torch.uint8, device=device.current())
            target = self._torch.empty_like(source)
            seconds = self._time(partial(target.copy_, source))
            points.append({"bytes": size // self._shrink, "bytes_per_second": 2 * size // self._shrink / seconds})
        return points

    def host_copy(self) -> list[dict[str, Any]]:
        """Device to page-locked host memory and back: what staging a checkpoint and offloading cost. Nothing on a CPU."""
        if not device.has_gpu():
            return []
        there = self._torch.randint(0, 255, (2**28,), dtype=self._torch.uint8, device=device.current())
        here = self._torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        to_host, to_device = (self._time(partial(to.copy_, source, non_blocking=True)) for to, source in ((here, there), (there, here)))
        return [{"bytes": 2**28, "to_host_bytes_per_second": 2**28 / to_host, "to_device_bytes_per_second": 2**28 / to_device}]

    def launch(self) -> list[dict[str, Any]]:
        """The smallest operation there is: what a step pays for each of its kernels when nothing hides it."""
        one = self._torch.zeros(1, device=device.current())
        count = 200

        def many() -> None:
            for _ in range(count):
                one.add_(1)

        return [{"seconds": self._time(many) / count}]

    def links(self) -> list[dict[str, Any]]:
        """All-reduce, all-gather and all-to-all over all ranks; nothing on one."""
        distributed = self._torch.distributed
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return []
        points, world = [], distributed.get_world_size()
        for size in [size // self._shrink for size in COPIES[:-1]]:
            source = self._random(size // 2 // world * world)
            target = self._torch.empty_like(source)
            calls = {
                "all_reduce": partial(distributed.all_reduce, source),
                "all_gather": partial(distributed.all_gather_into_tensor, target, source[: len(source) // world]),
                "all_to_all": partial(distributed.all_to_all_single, target, source),
            }
            for name, call in calls.items():
                seconds = seconds_of(call, 7, 0.0, in_a_row=1)  # every rank must repeat it as often
                points.append({"collective": name, "ranks": world, "bytes": source.nbytes, "seconds": seconds})
        return points

    def _sizes(self, shapes: list[tuple[int, int, int]]) -> Iterator[tuple[int, ...]]:
        for shape in shapes:
            yield tuple(max(64, size // self._shrink) for size in shape)

    def _random(self, *shape: int) -> Any:
        return self._torch.randn(*shape, device=device.current(), dtype=self._dtype)

    def _both_ways(self, function: Callable[..., Any], inputs: list[Any], grad: Any) -> Any:
        return self._torch.autograd.grad(function(*(tensor.requires_grad_() for tensor in inputs)), inputs, grad)

    def _time(self, work: Callable[[], Any]) -> float:
        return seconds_of(work, 5, self._budget)


MEASUREMENTS = ("matmul", "grouped_matmul", "attention", "copy", "host_copy", "launch", "links")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as a cluster that the planner reads."""
    device.prepare()
    import torch

    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "RANK" in os.environ:
        device.select(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group(device.backend())
    calibration = Calibration(arguments.precision, arguments.seconds)
    points: dict[str, Any] = {}
    for name in arguments.only or MEASUREMENTS:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        found = getattr(calibration, name)()
        points[name] = [{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in point.items()} for point in found]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    start = ["python"] if world == 1 else ["torchrun", "--nnodes", str(world // local), "--nproc-per-node", str(local)]
    memory = device.total_memory_bytes() // (1 if device.has_gpu() else local)  # ranks on CPUs share one memory
    rates = {
        "device": device.name(), "memory_bytes": memory, "precision": arguments.precision,
        "measured": {"command": shlex.join([*start, *sys.argv]), "torch": torch.__version__, "in_a_row": True}, **points,
    }  # fmt: skip
    # Without torchrun the machine's other GPUs count if their link is a published one; ranks on CPUs are what torchrun started.
    in_node = local if world > 1 else device.count() if packaged_gpu(device.name()) is not None else 1
    cluster: dict[str, Any] = {"gpu": device.name(), "nodes": world // local, "gpus_per_node": in_node}
    if points.get("links"):
        cluster["inside" if world == local else "between"] = MEASURED
    return {"cluster": {**cluster, "rates": rates}}


def yaml_text(result: dict[str, Any]) -> str:
    """A line for every point."""
    cluster = result["cluster"]
    lines = ["cluster:", *(f"  {key}: {json.dumps(value)}" for key, value in cluster.items() if key != "rates"), "  rates:"]
    for name, value in cluster["rates"].items():
        if isinstance(value, list) and value:
            lines += [f"    {name}:", *(f"      - {json.dumps(point)}" for point in value)]
        else:
            lines.append(f"    {name}: {json.dumps(value)}")
    return "\n".join(lines)


def calibrate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, and write or return the result; on several ranks the first one's."""
    if unknown := [name for name in arguments.only or [] if name not in MEASUREMENTS]:
        raise ConfigError(f"--only {','.join(unknown)}: there is {', '.join(MEASUREMENTS)}")
    if not 0 < arguments.seconds < math.inf:
        raise ConfigError(f"--seconds {arguments.seconds}: must be a number above 0")
    if arguments.write is not None and (arguments.write.is_dir() or not arguments.write.parent.is_dir()):
        raise ConfigError(f"--write {arguments.write}: is no name of a file in a folder that is there")
    result = measure(arguments)
    if os.environ.get("RANK", "0") != "0":
        return None
    if arguments.write is None:
        return result
    arguments.write.write_text((json.dumps(result) if arguments.json else yaml_text(result)) + "\n", encoding="utf-8")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write there instead of to the terminal")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="A,B", help=f"out of {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default bf16")
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="of repetitions for each point (default 0.2)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of YAML")
    return finish(parser.parse_args(), calibrate, yaml_text)


if __name__ == "__main__":
    sys.exit(main())
