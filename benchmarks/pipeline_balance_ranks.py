"""What each rank of benchmarks/pipeline_balance.py does: train with equal stages and take the time of every piece of work, propose a split, train with both.

Work is measured in CPU seconds of the rank's thread, which neither waiting for a neighbour nor for a core adds to; steps are measured by the clock on the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_layer import TransformerLayer
from pipeline_balance_cores import replayed, step_seconds

from megatron_skywork import parallel
from megatron_skywork.config.schema import Config
from megatron_skywork.plan.simulation import PieceCost, simulate
from megatron_skywork.train import step as train_step
from megatron_skywork.train.training import Training

WARM_UP = 2


@dataclass(frozen=True)
class Costs:
    """CPU seconds for one micro-batch: of a layer, and of what the first, a middle and the last stage do besides their layers; `send` is by the wall."""

    layer: tuple[float, float]
    first: tuple[float, float]
    middle: tuple[float, float]
    last: tuple[float, float]
    send: float

    def pieces(self, split: list[int]) -> list[PieceCost]:
        """The stages of a split, as the planner takes them."""
        result = []
        for stage, layers in enumerate(split):
            besides = self.first if stage == 0 else self.last if stage == len(split) - 1 else self.middle
            forward, backward = (layers * one + more for one, more in zip(self.layer, besides, strict=True))
            result.append(PieceCost(forward, backward, send_seconds=self.send))
        return result


class _Marker(torch.autograd.Function):
    """Passes a tensor on, and calls back when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, callback: Callable[[], None]) -> torch.Tensor:
        ctx.callback = callback
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.callback()
        return gradients[0], None


class Stopwatch:
    """CPU seconds of passes through this stage and through its layers.

    Attributes:
        passes, layers: by kind, "F" or "B".
    """

    def __init__(self) -> None:
        self.passes: dict[str, list[float]] = {"F": [], "B": []}
        self.layers: dict[str, list[float]] = {"F": [], "B": []}

    @contextmanager
    def on_passes(self) -> Iterator[None]:
        """Times every forward and backward that megatron-core's schedule runs."""

        def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                started = time.thread_time()
                result = function(*args, **kwargs)
                self.passes[kind].append(time.thread_time() - started)
                return result

            return run

        with (
            mock.patch.object(schedules, "forward_step", timed("F", schedules.forward_step)),
            mock.patch.object(schedules, "backward_step", timed("B", schedules.backward_step)),
        ):
            yield

    @contextmanager
    def on_layers(self, chunk: torch.nn.Module) -> Iterator[None]:
        """Times every layer of a chunk, forward and backward."""
        hooks = []
        for layer in (module for module in chunk.modules() if isinstance(module, TransformerLayer)):
            marks = dict[str, float]()

            def before(module: Any, args: Any, kwargs: Any, marks: dict[str, float] = marks) -> tuple[Any, Any]:
                marks["F"] = time.thread_time()
                marked = _Marker.apply(kwargs["hidden_states"], lambda: self.layers["B"].append(time.thread_time() - marks["B"]))
                return args, {**kwargs, "hidden_states": marked}

            def after(module: Any, args: Any, output: Any, marks: dict[str, float] = marks) -> tuple[Any, Any]:
                self.layers["F"].append(time.thread_time() - marks["F"])
                return _Marker.apply(output[0], lambda: marks.__setitem__("B", time.thread_time())), output[1]

            hooks += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
        yield
        for hook in hooks:
            hook.remove()


def timed_step(training: Training) -> tuple[float, float]:
    """One training step; when this rank entered the pipeline and when it left it, by the machine's one clock."""
    times = []
    run_schedule = train_step.run_schedule

    def timed(*args: Any, **kwargs: Any) -> Any:
        torch.distributed.barrier()
        times.append(time.perf_counter())
        result = run_schedule(*args, **kwargs)
        times.append(time.perf_counter())
        return result

    with mock.patch.object(train_step, "run_schedule", timed):
        training.train_one_step()
    return times[0], times[1]


def seconds_of_sends(config: Config, rank: int, repetitions: int = 20) -> float:
    """Of one micro-batch's activations from the first rank to the second, half of a round trip; the same number on every rank."""
    tensor = torch.zeros(config.data.seq_length, config.train.micro_batch_size, config.model.hidden_size)
    found = []
    for _ in range(repetitions):
        torch.distributed.barrier()
        started = time.perf_counter()
        if rank == 0:
            torch.distributed.send(tensor, 1)
            torch.distributed.recv(tensor, 1)
        elif rank == 1:
            torch.distributed.recv(tensor, 0)
            torch.distributed.send(tensor, 0)
        found.append((time.perf_counter() - started) / 2)
    return from_all(statistics.median(found))[0]


def from_all(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def measured_costs(config: Config, training: Training, steps: int) -> Costs:
    """What a layer and each stage's other work cost, from some steps with equal stages."""
    watch, layers = Stopwatch(), config.model.num_layers // config.parallel.pp
    with watch.on_passes(), watch.on_layers(training.chunks[0]):
        for _ in range(steps):
            training.train_one_step()
    of_ranks = from_all((watch.passes, watch.layers))
    layer = tuple(statistics.median([value for _, found in of_ranks for value in found[kind]]) for kind in "FB")
    besides = [tuple(max(0.0, statistics.median(passes[kind]) - layers * one) for kind, one in zip("FB", layer, strict=True)) for passes, _ in of_ranks]
    middle = tuple(statistics.mean(values) for values in zip(*besides[1:-1], strict=True)) if len(besides) > 2 else (0.0, 0.0)
    return Costs(layer, besides[0], middle, besides[-1], seconds_of_sends(config, training.place.rank))  # type: ignore[arg-type]


def proposed(costs: Costs, layers: int, stages: int, micro_batches: int) -> list[int]:
    """Of all splits with a layer or more on every stage the one that the planner's simulator finds fastest."""
    splits = [[end - start for start, end in zip((0, *cuts), (*cuts, layers), strict=True)] for cuts in combinations(range(1, layers), stages - 1)]
    return min(splits, key=lambda split: simulate(costs.pieces(split), stages=stages, micro_batches=micro_batches).seconds)


def compare(config: Config, cores: int, steps: int) -> dict[str, Any]:
    """Equal stages against the proposed ones, step by step in turn, in one process group; rank 0's answer is the whole one."""
    place = parallel.start(config)
    p, micro_batches = config.parallel, config.train.global_batch_size // config.train.micro_batch_size
    uniform = [config.model.num_layers // p.pp] * p.pp
    runs = [(uniform, Training(config, place))]
    for _ in range(WARM_UP):
        runs[0][1].train_one_step()
    costs = measured_costs(config, runs[0][1], steps)
    planned = proposed(costs, config.model.num_layers, p.pp, micro_batches)
    other = config.model_copy(update={"parallel": p.model_copy(update={"layers_per_stage": planned}), "run_dir": f"{config.run_dir}-planned"})
    runs.append((planned, Training(other, place)))
    for _ in range(WARM_UP):
        runs[1][1].train_one_step()
    times: list[list[tuple[float, float]]] = [[], []]
    watches = [Stopwatch(), Stopwatch()]
    for _ in range(steps):
        for (_, training), found, watch in zip(runs, times, watches, strict=True):
            with watch.on_passes():
                found.append(timed_step(training))
    results = []
    for (split, training), found, watch in zip(runs, times, watches, strict=True):
        # A step begins when the last rank is there, and ends when the last one leaves.
        seconds = [max(end for _, end in of_ranks) - max(start for start, _ in of_ranks) for of_ranks in zip(*from_all(found), strict=True)]
        everyone = from_all(watch.passes)
        own = [replayed([{kind: rank[kind][number * micro_batches :][:micro_batches] for kind in "FB"} for rank in everyone], [costs.send] * p.pp, p.pp)
               for number in range(steps)]  # fmt: skip
        results.append({"split": split, "seconds": seconds, "own_core_seconds": own,
                        "cpu_seconds": [sum(sum(values) for values in rank.values()) / steps for rank in everyone],
                        "predicted": step_seconds(costs.pieces(split), micro_batches, cores),
                        "predicted_own_core": step_seconds(costs.pieces(split), micro_batches, p.pp)})  # fmt: skip
        training.close()
    return {"stages": p.pp, "cores": cores, "micro_batches": micro_batches, "costs": asdict(costs), "uniform": results[0], "planned": results[1]}
