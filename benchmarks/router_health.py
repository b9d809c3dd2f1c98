#!/usr/bin/env python3
"""What watching the routers costs: training steps with metrics.router=true against false, on whatever device is there.

Both are run in one process, on the same model and batch, in turns (on off off on, on off off on, ...), so that neither a warming machine nor a drifting
model favours one; every such block gives one ratio, of which the median and the quartiles are printed. "On" counts everything and makes the record of
every step; "off" counts what the adaptive coefficients need, and so do both.

A machine that does other work moves a step by more than the cost looked for. `--clock process` counts the processor time of this process instead (for
CPUs; a GPU's work does not show in it). And the cost is also added up from its parts, each timed by itself many times
in turns: one router's forward and backward with and without counting, and what is done once per step; and divided by the step's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from costs import quartiles  # noqa: E402

from megatron_skywork import device  # noqa: E402

device.prepare()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402

from megatron_skywork import parallel  # noqa: E402
from megatron_skywork.config.load import check_config  # noqa: E402
from megatron_skywork.config.schema import Config  # noqa: E402
from megatron_skywork.data.loader import build_train_loader  # noqa: E402
from megatron_skywork.errors import UserError  # noqa: E402
from megatron_skywork.metrics.throughput import PhaseTimer  # noqa: E402
from megatron_skywork.model.build import build_chunks, wrap_for_training  # noqa: E402
from megatron_skywork.moe.drop_stats import count_dropped, routed_per_expert  # noqa: E402
from megatron_skywork.moe.router import SkyworkRouter  # noqa: E402
from megatron_skywork.moe.router_health import gate_entropy, gate_ratios, summarize_load  # noqa: E402
from megatron_skywork.moe.router_state import find_routers, gather_router_metrics, observe, update_coefficients  # noqa: E402
from megatron_skywork.optim.build import build_optimizer  # noqa: E402
from megatron_skywork.train.step import TrainStep  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A model and what it sees in one micro-batch."""

    hidden: int
    expert_ffn: int
    layers: int
    tokens: int


SHAPES = {
    "tiny": Shape(hidden=64, expert_ffn=128, layers=4, tokens=256),
    "small": Shape(hidden=256, expert_ffn=704, layers=4, tokens=1024),
    "medium": Shape(hidden=512, expert_ffn=1408, layers=4, tokens=1024),
    "wide": Shape(hidden=1024, expert_ffn=2816, layers=4, tokens=1024),
    "gpu": Shape(hidden=2048, expert_ffn=5632, layers=4, tokens=8192),
}


def make_config(shape: Shape, arguments: argparse.Namespace) -> Config:
    """The report's routing (normalized gate, equation 4, adaptive coefficients, capacity 1.1) in a small transformer."""
    return Config.model_validate(
        {
            "model": {
                "num_layers": shape.layers, "hidden_size": shape.hidden, "ffn_hidden_size": shape.expert_ffn, "num_attention_heads": max(1, shape.hidden // 64),
                "vocab_size": 4096, "max_position_embeddings": shape.tokens,
            },
            "moe": {"num_experts": arguments.experts, "topk": arguments.topk, "aux_loss": "report", "capacity_factor": 1.1, "adaptive": {"enabled": True}},
            "data": {"mock": True, "seq_length": shape.tokens, "num_workers": 0},
            "optim": {"lr": 1e-4, "schedule": "constant"},
            "train": {
                "steps": 1_000_000, "global_batch_size": arguments.micro_batches, "micro_batch_size": 1,
                "precision": arguments.precision or ("bf16" if device.has_gpu() else "fp32"),
            },
        }
    )  # fmt: skip


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


class Bench:
    """One model, ready to take steps."""

    def __init__(self, config: Config, clock: Callable[[], float]):
        check_config(config, 1)
        place = parallel.start(config)
        batch = config.train.global_batch_size
        destroy_num_microbatches_calculator()
        init_num_microbatches_calculator(place.rank, None, batch, config.train.micro_batch_size, place.dp_size)
        self.config, self.clock, self.timer = config, clock, PhaseTimer()
        chunks = wrap_for_training(config, build_chunks(config))
        self.routers = find_routers(chunks)
        self._step = TrainStep(config, chunks, build_optimizer(config, chunks), batch, self.timer)
        loader = build_train_loader(config, dp_rank=0, dp_size=1, consumed_samples=0)
        self._batches = repeat(next(loader))
        self._done = 0

    def step(self, *, health: bool) -> float:
        """Seconds of one step and, with `health`, of its record."""
        observe(self.routers, health=health)
        self._done += 1
        device.synchronize()
        started = self.clock()
        result = self._step(self._done, self._batches)
        if health:
            json.dumps(gather_router_metrics(result.routers, parallel_state.get_pipeline_model_parallel_group()))
        device.synchronize()
        return self.clock() - started


def measure_steps(bench: Bench, blocks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Ratios of whole steps, on over off, one per block of on off off on."""
    for health in (True, False):
        bench.step(health=health)
    bench.timer.take()
    ratios, off = [], []
    for block in range(blocks):
        times = [bench.step(health=health) for health in (True, False, False, True)]
        ratios.append((times[0] + times[3]) / (times[1] + times[2]))
        off += times[1:3]
        say(f"  block {block + 1}/{blocks}: on/off {ratios[-1]:.4f}, a step {statistics.mean(times[1:3]):.3f} s")
    phases = bench.timer.take()
    shares = {name: seconds / sum(phases.values()) for name, seconds in phases.items()}
    low, middle, high = quartiles(ratios)
    return {"ratio": middle, "ratio_p25": low, "ratio_p75": high, "blocks": blocks, "step_seconds": statistics.median(off), "phase_shares": shares}


def measure_router(bench: Bench, repetitions: int) -> dict[str, float]:
    """Microseconds of one router's forward and backward for a micro-batch: counting nothing, what coefficients need, and everything."""
    router, length = bench.routers[0], bench.config.data.seq_length
    dtype = next(parameter.dtype for name, parameter in router.named_parameters())
    hidden = torch.randn(length, 1, bench.config.model.hidden_size, device=device.current(), dtype=dtype).requires_grad_()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device.current()))
    upstream = torch.ones(length, router.num_experts, device=device.current())

    def run(observes: Any) -> Callable[[], None]:
        def once() -> None:
            router.observes = observes
            torch.autograd.backward(router(hidden)[0], upstream)

        return once

    times = in_turns({name: run(name) for name in ("nothing", "drops", "health")}, repetitions, bench.clock)
    router.window.zero_()
    return {name: 1e6 * seconds for name, seconds in times.items()}


def measure_parts(bench: Bench, repetitions: int) -> dict[str, float]:
    """Microseconds of the pieces: per layer and micro-batch, and (last two) once per step for all layers."""
    length, experts, on = bench.config.data.seq_length, bench.routers[0].num_experts, device.current()
    gate = torch.softmax(torch.randn(length, experts, device=on), dim=-1)
    routed = torch.zeros_like(gate, dtype=torch.bool).scatter(1, gate.topk(bench.routers[0].topk).indices, True)
    kept = routed & (torch.rand_like(gate) > 0.1)
    observe(bench.routers, health=True)
    for router in bench.routers:
        with torch.no_grad():
            _look(router, gate)
    summary = update_coefficients(bench.routers, None, skipped=True)

    def update() -> None:
        update_coefficients(bench.routers, None, skipped=True)

    pieces: dict[str, Callable[[], Any]] = {
        "entropy": lambda: gate_entropy(gate),
        "sharpness": lambda: gate_ratios(gate),
        "load_counts": lambda: routed_per_expert(routed),
        "drop_count": lambda: count_dropped(routed, kept),
        "load_summary": lambda: summarize_load(summary.load),
        "step_update": update,
        "step_record": lambda: json.dumps(gather_router_metrics(summary, None)),
    }
    return {name: 1e6 * seconds for name, seconds in in_turns(pieces, repetitions, bench.clock).items()}


def _look(router: SkyworkRouter, gate: torch.Tensor) -> None:
    """A window as a forward leaves it, so that the record has numbers to divide by."""
    router.window[: router.num_experts] += gate.sum(dim=0, dtype=torch.float64)


def in_turns(functions: dict[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each function, called one after the other in both directions."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repetitions + 2):
        names = list(functions)
        for name in names if turn % 2 else names[::-1]:
            device.synchronize()
            started = clock()
            functions[name]()
            device.synchronize()
            if turn >= 2:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one shape."""
    shape = SHAPES[name]
    config = make_config(shape, arguments)
    say(f"{name}: {shape}")
    bench = Bench(config, CLOCKS[arguments.clock])
    steps = measure_steps(bench, arguments.blocks, say)
    router, parts = measure_router(bench, arguments.repetitions), measure_parts(bench, arguments.repetitions)
    counting = router["health"] - router["drops"]
    per_step = shape.layers * arguments.micro_batches * counting + parts["step_record"]
    parallel.stop()
    return {
        "shape": name, **asdict(shape), "experts": arguments.experts, "topk": arguments.topk, "micro_batches": arguments.micro_batches,
        "precision": config.train.precision, "backend": config.model.backend, **steps, "router_microseconds": router, "part_microseconds": parts,
        "counting_microseconds_per_layer": counting, "added_microseconds_per_step": per_step, "added_share": per_step * 1e-6 / steps["step_seconds"],
        "added_share_without_optimizer": per_step * 1e-6 / (steps["step_seconds"] * steps["phase_shares"]["forward_backward"]),
    }  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The results as a person reads them."""
    yield f"{'shape':8}{'hidden':>7}{'ffn':>6}{'layers':>7}{'tokens':>7}{'step s':>9}{'on/off, quartiles':>26}{'from parts':>12}{'of fwd+bwd':>12}"
    for r in results:
        spread = f"{r['ratio']:.4f}  {r['ratio_p25']:.4f} .. {r['ratio_p75']:.4f}"
        yield (f"{r['shape']:8}{r['hidden']:7}{r['expert_ffn']:6}{r['layers']:7}{r['tokens']:7}{r['step_seconds']:9.4f}{spread:>26}"
               f"{100 * r['added_share']:+11.3f}%{100 * r['added_share_without_optimizer']:+11.3f}%")  # fmt: skip
    yield ""
    yield "microseconds per layer and micro-batch (router forward and backward: all, of which counting), and per step"
    yield f"{'shape':8}{'router':>9}{'health':>9}{'drops':>8}   parts, each by itself"
    for r in results:
        router, parts = r["router_microseconds"], r["part_microseconds"]
        pieces = "  ".join(f"{name} {microseconds:.0f}" for name, microseconds in parts.items())
        yield f"{r['shape']:8}{router['health']:9.0f}{router['health'] - router['drops']:9.0f}{router['drops'] - router['nothing']:8.0f}   {pieces}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,small,medium,wide", metavar="A,B", help=f"out of {', '.join(SHAPES)} (default: tiny,small,medium,wide)")
    parser.add_argument("--blocks", type=int, default=8, metavar="N", help="blocks of four steps (default 8)")
    parser.add_argument("--repetitions", type=int, default=60, metavar="N", help="of every part that is timed by itself (default 60)")
    parser.add_argument("--experts", type=int, default=16, metavar="N", help="experts per layer (default 16)")
    parser.add_argument("--topk", type=int, default=2, metavar="N", help="experts per token (default 2)")
    parser.add_argument("--micro-batches", type=int, default=1, metavar="N", help="per step (default 1)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 without")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="wall time, or processor time of this process (default wall)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.shapes.split(",")) - set(SHAPES))
    if unknown:
        parser.error(f"--shapes {', '.join(unknown)}: there is {', '.join(SHAPES)}")
    if min(arguments.blocks, arguments.repetitions, arguments.micro_batches) < 1:
        parser.error("--blocks, --repetitions and --micro-batches must be 1 or more")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        results = [measure(name, arguments, say) for name in arguments.shapes.split(",")]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    about: dict[str, Any] = {"device": device.name(), "threads": torch.get_num_threads(), "clock": arguments.clock, "torch": torch.__version__}
    about["command"] = " ".join(["python", *sys.argv])
    if arguments.json:
        print(json.dumps({"benchmark": "router_health", **about, "results": results}))
    else:
        print("\n".join([*(f"{name}: {value}" for name, value in about.items()), "", *table(results)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
