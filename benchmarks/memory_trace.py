"""What a training step allocates on a CPU: torch's profiler sees every allocation and every release of a tensor's memory, so their running sum is exact.

A GPU's allocator keeps such a sum itself (`memory.py`). Here it is the means to hold the planner's memory against what real models do on any layout that a
few processes can stand for.
"""

from __future__ import annotations

import bisect
import functools
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile, record_function


class AllocationTrace:
    """Inside the `with`, every allocation is seen; afterwards the sum of bytes is known at any time. It starts from 0, and knows nothing of what was there.

    What collectives allocate for themselves is left out: gloo copies what it is given, NCCL works in place.
    """

    def __enter__(self) -> AllocationTrace:
        self._work_wait = Work.wait
        Work.wait = _wait_for_release(Work.wait)
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        Work.wait = self._work_wait
        results = self._profile.profiler.kineto_results
        changes = sorted(_changes(results.experimental_event_tree()), key=lambda change: change[0])
        self._times = [moment for moment, _ in changes]
        self._sums = list(accumulate((num_bytes for _, num_bytes in changes), initial=0))
        self._marks = {event.name(): (event.start_ns(), event.end_ns()) for event in results.events() if event.name().startswith(_MARK)}

    @property
    def peak_bytes(self) -> int:
        """The most of any time."""
        return max(self._sums)

    @property
    def end_bytes(self) -> int:
        """At the end."""
        return self._sums[-1]

    def growth(self) -> dict[str, int]:
        """Of every module call that `marked` has noted: bytes at its end less bytes at its start."""
        return {name.removeprefix(_MARK): self._at(end) - self._at(start) for name, (start, end) in self._marks.items()}

    def _at(self, moment: int) -> int:
        return self._sums[bisect.bisect_right(self._times, moment)]


_MARK = "planned memory: "
RELEASE_SECONDS = 0.002


def _wait_for_release(wait: Callable[..., Any]) -> Callable[..., Any]:
    """The profiler does not see what gloo's threads release. While the caller still holds what it gave them, they are given time to let go of it."""

    @functools.wraps(wait)
    def wait_longer(*args: Any, **kwargs: Any) -> Any:
        result = wait(*args, **kwargs)
        time.sleep(RELEASE_SECONDS)
        return result

    return wait_longer


def _changes(roots: list[Any]) -> Iterator[tuple[int, int]]:
    """Times and bytes of all allocations and, negative, releases, but for those inside of collectives."""
    found: list[tuple[int, int, int, bool]] = []
    waiting = [(root, False) for root in roots]
    while waiting:
        event, in_collective = waiting.pop()
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, in_collective))
        is_collective = in_collective or event.name.startswith(("c10d::", "gloo:"))
        waiting += [(child, is_collective) for child in event.children]
    # Known by size too: another thread may be given an address and say so before the release is noted.
    of_collectives: Counter[tuple[int, int]] = Counter()
    for moment, place, num_bytes, in_collective in sorted(found, key=lambda change: change[0]):
        block = place, abs(num_bytes)
        if num_bytes > 0 and in_collective:
            of_collectives[block] += 1
        elif num_bytes < 0 and of_collectives[block]:
            of_collectives[block] -= 1
        else:
            yield moment, num_bytes


@contextmanager
def marked(modules: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Inside, the first forward of each module is noted under its name."""
    handles = []
    for name, module in modules.items():
        open_marks: list[Any] = []

        def before(_module: Any, _inputs: Any, name: str = name, open_marks: list[Any] = open_marks) -> None:
            if not open_marks:
                open_marks.append(record_function(_MARK + name))
                open_marks[0].__enter__()

        def after(_module: Any, _inputs: Any, _output: Any, open_marks: list[Any] = open_marks) -> None:
            if len(open_marks) == 1:
                open_marks.append(None)
                open_marks[0].__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def traced_step(settings: dict[str, Any], watched: Callable[[Any], dict[str, torch.nn.Module]] | None = None) -> dict[str, Any]:
    """Build the model of `settings` on this rank, balance its routers, do one step unseen and one seen.

    Args:
        settings: of the run.
        watched: of a built chunk, the modules whose growth in their first forward is wanted.

    Returns:
        `stage`; `built_bytes`, of model and optimizer; `peak_bytes`, the most of the second step above its start; `growth` by module.
    """
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator, init_num_microbatches_calculator
    from scaling_traffic import force_balance

    from megatron_skywork import parallel
    from megatron_skywork.config.load import check_config
    from megatron_skywork.config.schema import Config
    from megatron_skywork.data.loader import build_train_loader
    from megatron_skywork.metrics.throughput import PhaseTimer
    from megatron_skywork.model.build import build_chunks, wrap_for_training
    from megatron_skywork.moe.router_state import find_routers
    from megatron_skywork.optim.build import build_optimizer
    from megatron_skywork.plan.stages import batch
    from megatron_skywork.train.step import TrainStep

    config = Config(**settings)
    world_size = torch.distributed.get_world_size()
    check_config(config, world_size)
    place = parallel.start(config)
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(place.rank, None, config.train.global_batch_size, config.train.micro_batch_size, place.dp_size)
    with AllocationTrace() as building:
        chunks = wrap_for_training(config, build_chunks(config))
        optimizer = build_optimizer(config, chunks)
    if config.moe is not None:
        force_balance(find_routers(chunks))
    step = TrainStep(config, chunks, optimizer, batch(config, world_size).micro_batches, PhaseTimer())
    batches = build_train_loader(config, dp_rank=place.dp, dp_size=place.dp_size, consumed_samples=0)
    step(1, batches)
    gc.collect()
    modules = {f"{number} {name}": module for number, chunk in enumerate(chunks) for name, module in (watched(chunk) if watched else {}).items()}
    with AllocationTrace() as training, marked(modules):
        step(2, batches)
    for owner in [*getattr(optimizer, "chained_optimizers", []), optimizer, step, *(module for chunk in chunks for module in chunk.modules())]:
        vars(owner).clear()  # hooks of gradients form a cycle that Python's collector cannot see
    return {"stage": place.pp, "built_bytes": building.end_bytes, "peak_bytes": training.peak_bytes, "growth": training.growth()}
