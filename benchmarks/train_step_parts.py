"""Where a training step's time goes: attention, router, dispatch, experts, output and loss, optimizer, communication, and the rest.

A step is cut into pieces by marks in time, and each piece belongs to the part that was begun last. In the forward pass a part begins and ends with the
call of its module or method. In the backward pass it begins when the gradient of its output is ready to go on and ends when that of its input is: autograd
goes back through a graph in the reverse order of its making, weight gradients included, so what lies between is the part's own. Marks are readings of the
clock (--clock) on CPU and events in the stream on a GPU. Pieces add up to the step; a mark costs microseconds, and these steps are not the ones that are timed.

Modules are found by the attributes of megatron-core's and transformers' layers, not by class, so whatever stands in their place is measured too.
A norm fused into a linear layer (Transformer Engine) counts with it. transformers' experts do their own dispatch. Idle is shown beside, since it lies
inside of parts: on a GPU the share of the step in which no kernel ran, on CPU the share of the threads' time that this process did not compute.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from megatron_skywork import device

PARTS = ("attention", "router", "dispatch", "experts", "output and loss", "optimizer", "communication", "other")
_TAIL = "output and loss"
_DISPATCH = ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess", "combine_preprocess", "token_combine", "combine_postprocess")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of nested arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


class PartsClock:
    """Marks of one or more steps.

    Args:
        now: what a mark is made of; `clock_of` gives it.

    Attributes:
        routed: per router call, the assignments that each expert got, on the device.
    """

    def __init__(self, now: Callable[[], Any]):
        self._now, self._marks = now, list[tuple[str, Any]]()
        self._label, self._outer = "other", list[str]()
        self._undo: list[Callable[[], None]] = []
        self.routed: list[Tensor] = []

    # ---------------------------------------------------------------------------------------------------------------- marks

    def start(self) -> None:
        """Begin a step."""
        self._marks, self._outer = [], []
        self._switch("other")

    def stop(self) -> dict[str, float]:
        """Seconds of every part since `start`."""
        self._switch("other")
        device.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (label, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[label] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
        return seconds

    def _switch(self, label: str) -> None:
        self._label = label
        self._marks.append((label, self._now()))

    def _enter(self, part: str, inputs: Any) -> None:
        self._outer.append(self._label)
        self._switch(part)
        for tensor in tensors_in(inputs):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._backward_leaves(part))

    def _leave(self, part: str, inputs: Any, outputs: Any) -> None:
        passed_on = {id(tensor) for tensor in tensors_in(inputs)}
        for tensor in tensors_in(outputs):
            # What is handed on untouched (an all-to-all of one rank) belongs to the part that made it.
            if tensor.requires_grad and id(tensor) not in passed_on:
                tensor.register_hook(lambda _: self._switch(part))
        self._switch(self._outer.pop())

    def _backward_leaves(self, part: str) -> None:
        # A tensor between two parts is the output of one and the input of the other: the first has begun already.
        if self._label == part:
            self._switch("other")

    # ---------------------------------------------------------------------------------------------------------------- what is watched

    @contextmanager
    def watching(self, model: torch.nn.Module, calls: dict[str, Sequence[tuple[Any, str]]]) -> Iterator[None]:
        """Inside, the parts of `model` are marked, and the methods in `calls` by part."""
        for layer in model.modules():
            for name in ("self_attention", "self_attn"):
                self._watch_module(getattr(layer, name, None), "attention")
            router = getattr(layer, "router", None) or getattr(layer, "gate", None)
            if isinstance(router, torch.nn.Module) and hasattr(layer, "experts"):
                self._watch_module(router, "router")
                self._watch_routing(router, _number_of_experts(router))
                self._watch_module(layer.experts, "experts")
                self._watch_module(getattr(layer, "shared_experts", None), "experts")
                dispatcher = getattr(layer, "token_dispatcher", None)
                for name in _DISPATCH:
                    if hasattr(dispatcher, name):
                        self._watch_call(dispatcher, name, "dispatch")
        self._watch_tail(_body(model))
        for part, places in calls.items():
            for owner, name in places:
                self._watch_call(owner, name, part)
        try:
            yield
        finally:
            for undo in reversed(self._undo):
                undo()
            self._undo.clear()

    def _watch_module(self, module: Any, part: str) -> None:
        if not isinstance(module, torch.nn.Module):
            return
        before = module.register_forward_pre_hook(lambda _, args, kwargs: self._enter(part, (args, kwargs)), with_kwargs=True)
        after = module.register_forward_hook(lambda _, args, kwargs, output: self._leave(part, (args, kwargs), output), with_kwargs=True)
        self._undo += [before.remove, after.remove]

    def _watch_call(self, owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._enter(part, (args, kwargs))
            result = original(*args, **kwargs)
            self._leave(part, (args, kwargs), result)
            return result

        self._undo.append(replace_call(owner, name, call))

    def _watch_routing(self, router: torch.nn.Module, experts: int) -> None:
        def count(_: Any, args: Any, output: Any) -> None:
            found = list(tensors_in(output))
            maps = [tensor for tensor in found if tensor.dtype is torch.bool]
            chosen = [tensor for tensor in found if tensor.dtype in (torch.int64, torch.int32)]
            if maps:
                self.routed.append(maps[-1].reshape(-1, experts).sum(dim=0))
            elif chosen:
                self.routed.append(torch.bincount(chosen[-1].flatten(), minlength=experts))

        self._undo.append(router.register_forward_hook(count).remove)

    def _watch_tail(self, body: torch.nn.Module) -> None:
        def begins(_: Any, args: Any, output: Any) -> None:
            next(tensors_in(output)).register_hook(lambda _: self._backward_leaves(_TAIL))
            self._switch(_TAIL)

        self._undo.append(body.register_forward_hook(begins).remove)


def clock_of(name: str) -> Callable[[], Any]:
    """Reads wall time or this process's processor time; on a GPU an event in the stream."""
    if not device.has_gpu():
        return {"wall": time.perf_counter, "cpu": time.process_time}[name]

    def event() -> torch.Event:
        mark = torch.Event(device.current(), enable_timing=True)
        mark.record()
        return mark

    return event


def _body(model: torch.nn.Module) -> torch.nn.Module:
    """What comes before the output layer: megatron-core's decoder, or the inner model of transformers."""
    for module in model.modules():
        body = getattr(module, "decoder", None) or (getattr(module, "model", None) if hasattr(module, "lm_head") else None)
        if isinstance(body, torch.nn.Module):
            return body
    raise ValueError(f"{type(model).__name__} has neither a decoder nor a model below lm_head")


def _number_of_experts(router: Any) -> int:
    return int(router.num_experts if hasattr(router, "num_experts") else router.config.num_moe_experts)


def replace_call(owner: Any, name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Put `call` in the place of a method or of a function kept in an attribute; the way back is returned."""
    had, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, call)
    return (lambda: setattr(owner, name, original)) if had else (lambda: delattr(owner, name))


def measure_parts(step: Callable[[], Any], model: torch.nn.Module, calls: dict[str, Sequence[tuple[Any, str]]], count: int, clock_name: str) -> dict[str, Any]:
    """Shares of the parts over `count` steps, the load of the routers, idle time, and the operations that took most time."""
    clock = PartsClock(clock_of(clock_name))
    total: dict[str, float] = defaultdict(float)
    with clock.watching(model, calls):
        started, started_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            clock.start()
            step()
            for part, seconds in clock.stop().items():
                total[part] += seconds
        wall, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    whole = sum(total.values())
    profiled = profile(step)
    idle = profiled.pop("device_idle") if device.has_gpu() else max(0.0, 1 - cpu / (wall * torch.get_num_threads()))
    return {"step_seconds": wall / count, "shares": {part: total[part] / whole for part in PARTS}, "idle": idle, **load_of(clock.routed), **profiled}


def load_of(routed: Iterable[Tensor]) -> dict[str, Any]:
    """How uneven the experts' work was: largest over mean, the mean over router calls; and the assignments per call."""
    counts = [count.double() for count in routed]
    if not counts:
        return {"load_max_over_mean": None, "assignments": None}
    load = torch.stack(counts)
    return {"load_max_over_mean": float((load.amax(dim=1) / load.mean(dim=1)).mean()), "assignments": float(load.sum(dim=1).mean())}


def profile(step: Callable[[], Any], operations: int = 15) -> dict[str, Any]:
    """One step under torch's profiler: operations by their own time, and on a GPU the share of the step in which no kernel ran."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as recorded:
        started = time.perf_counter()
        step()
        device.synchronize()
        wall = time.perf_counter() - started
    on_gpu = device.has_gpu()

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    # Annotations span kernels and the gaps between them.
    averages = sorted((event for event in recorded.key_averages() if not event.is_user_annotation), key=own_time, reverse=True)
    whole = sum(own_time(event) for event in averages) or 1.0
    found: dict[str, Any] = {"operations": [{"name": event.key, "share": own_time(event) / whole, "calls": event.count} for event in averages[:operations]]}
    if on_gpu:
        kernels = [event.time_range for event in recorded.events() if event.device_type != DeviceType.CPU and not event.is_user_annotation]
        found["device_idle"] = max(0.0, 1 - union((kernel.start, kernel.end) for kernel in kernels) * 1e-6 / wall)
    return found


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length that is covered by at least one interval."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
