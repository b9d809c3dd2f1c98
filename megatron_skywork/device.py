"""The one place that knows whether there is a GPU.

Everything else asks this module for the device, the communication backend, seeds, synchronization and memory, so that the same code runs
on a laptop's CPU (gloo) and on a GPU cluster (NCCL).

megatron-core names CUDA in many places. `prepare()` redirects those names on a machine without a GPU, before megatron-core is imported; with a GPU
it only fills gaps that megatron-core has without Transformer Engine. Every redirection stands beside the megatron-core line that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import torch.utils._device

from megatron_skywork import gloo

_prepared = False
_compiles = True


# ---------------------------------------------------------------------------------------------------------------- what the rest asks


def has_gpu() -> bool:
    """Whether computation runs on a CUDA device."""
    return torch.cuda.is_available()


def current() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def has_flash_attention() -> bool:
    """Whether torch's flash attention kernels run here: on Ampere and newer."""
    return has_gpu() and torch.cuda.get_device_capability() >= (8, 0)


def has_grouped_product(dtype: torch.dtype) -> bool:
    """Whether `torch.nn.functional.grouped_mm` is one kernel here: on CPU, and in bf16 on Hopper and Blackwell."""
    return not has_gpu() or (dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10))


def leaves_empty_groups_unwritten() -> bool:
    """Whether that kernel leaves the products of groups without rows as they were in memory: on Blackwell (pytorch/pytorch#172439)."""
    return has_gpu() and torch.cuda.get_device_capability()[0] == 10


def has_compiler() -> bool:
    """Whether torch can compile kernels for this device: a GPU, and Triton for it."""
    return has_gpu() and _installed("triton")


def select(local_rank: int) -> None:
    """Bind this process to the GPU with its local rank; nothing to do on CPU."""
    if has_gpu():
        torch.cuda.set_device(local_rank)


def name() -> str:
    """What the device calls itself, e.g. `NVIDIA H100 80GB HBM3`, or `cpu`."""
    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def count() -> int:
    """GPUs visible to this process; 0 without one."""
    return torch.cuda.device_count() if has_gpu() else 0


def backend() -> str:
    """torch.distributed's backend for this device."""
    return "nccl" if has_gpu() else "gloo"


def synchronize() -> None:
    """Wait for queued GPU work, so that a clock reading means something."""
    if has_gpu():
        torch.cuda.synchronize()


@contextlib.contextmanager
def waits_forbidden() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU is an error; nothing to see on a CPU."""
    if not has_gpu():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def moment() -> Any:
    """This point in the order of the device's work, for `seconds_between`. A GPU notes the time when it gets there; nobody waits."""
    if not has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one `moment` to a later one, once the device has come that far."""
    if not has_gpu():
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def wait_for(moment: Any) -> None:
    """Until the device has come to this `moment`; what was queued after it goes on meanwhile."""
    if has_gpu():
        moment.synchronize()


def peak_memory_bytes() -> int:
    """Most memory this process has held: allocator peak on a GPU, resident set on CPU."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory_bytes() -> int:
    """Memory of this process's GPU, or of the machine."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if has_gpu() else psutil.virtual_memory().total


def allocated_bytes() -> int:
    """Memory that tensors hold now: the allocator's count on a GPU, resident set on CPU."""
    if has_gpu():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def forget_peak_memory() -> None:
    """Begin `peak_memory_bytes` anew and hand unused memory back, so that what follows is measured by itself. A CPU's peak cannot be forgotten."""
    if has_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reserved_peak_bytes() -> int:
    """Most memory the allocator has taken from the device, used or not; on CPU the same as `peak_memory_bytes`."""
    return torch.cuda.max_memory_reserved() if has_gpu() else peak_memory_bytes()


def rng_state() -> dict[str, torch.Tensor]:
    """Random state of this process's torch generators."""
    state = {"cpu": torch.get_rng_state()}
    if has_gpu():
        state["gpu"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Inverse of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if has_gpu() and "gpu" in state:
        torch.cuda.set_rng_state(state["gpu"])


# ------------------------------------------------------------------------------------------------------------------------------ fusing


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a pure function of tensors: one compiled kernel on a GPU, the function itself elsewhere.

    Compiled at its first call. A CPU would pay a C++ build per function and win nothing at these sizes; without Triton or with `compile_fused(False)` the
    function runs as written, and gives the same numbers up to the rounding of intermediate values that a kernel keeps in fp32.
    """
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not (_compiles and has_gpu()):
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(_compiled(function) if _installed("triton") else function)
        return compiled[0](*args, **kwargs)

    return call


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo compiles a function anew for other types, strides and gradients of its arguments, and after eight times gives up silently."""
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(64, getattr(config, limit)))
    return torch.compile(function)


def compile_fused(wanted: bool) -> None:
    """Whether functions marked `fused` are compiled on a GPU (`model.compile`)."""
    global _compiles
    _compiles = wanted


# ------------------------------------------------------------------------------------------------------------------------- preparation


def prepare() -> None:
    """Make megatron-core usable in this process. Call before anything imports it; calling again does nothing.

    Raises:
        RuntimeError: megatron-core was imported first on a machine without a GPU; it has bound `torch.empty` and others as defaults by then.
    """
    global _prepared
    if _prepared:
        return
    if not has_gpu():
        if "megatron.core" in sys.modules:
            raise RuntimeError("megatron.core was imported before megatron_skywork.device.prepare(); call prepare() first")
        _redirect_torch_to_cpu()
    _fill_gaps_without_transformer_engine()
    if not has_gpu():
        _redirect_megatron_to_cpu()
    _prepared = True


class _Stream:
    """Stands for a CUDA stream where everything runs in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any): ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None: ...


class _Event:
    """Stands for a CUDA event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any): ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _CpuGenerator:
    """Answers for every entry of `torch.cuda.default_generators` with the CPU generator.

    tensor_parallel/random.py forks the "CUDA" generator around everything that must differ between tensor-parallel ranks. On CPU the numbers are
    drawn from the CPU generator, so that is the one that has to be forked.
    """

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _redirect_torch_to_cpu() -> None:
    """Redirect what megatron-core binds while it is imported, or calls on torch itself."""
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    # device=torch.cuda.current_device() in tensor_parallel/layers.py, p2p_communication.py, param_and_grad_buffer.py and others.
    cuda.current_device = lambda: cpu
    cuda.set_device = lambda *args, **kwargs: None
    # parallel_state.py, pipeline_parallel/p2p_communication.py, dist_checkpointing/strategies/*: synchronize() around communication.
    cuda.synchronize = lambda *args, **kwargs: None
    # transformer/moe/{token_dispatcher,shared_experts}.py, param_and_grad_buffer.py, distributed_data_parallel.py, utils.py: side streams.
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: stream if stream is not None else _Stream()
    cuda.is_current_stream_capturing = lambda: False
    # tensor_parallel/random.py: states and seeds of the model-parallel generators.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.default_generators = _CpuGenerator()
    cuda._lazy_init = lambda: None
    cuda._lazy_call = lambda callback, **kwargs: callback()
    # optimizer/clip_grads.py builds torch.cuda.FloatTensor([...]); transformer/module.py compares classes.
    cuda.FloatTensor, cuda.IntTensor, cuda.LongTensor = torch.FloatTensor, torch.IntTensor, torch.LongTensor
    # optimizer/optimizer.py, tensor_parallel/data.py, rope_utils.py: tensor.cuda(), module.cuda().
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    # `with torch.device("meta")` recognises factories by a set it fills on first use; filled after the lines below it would know only our wrappers,
    # and transformers would then leave rotary frequencies uninitialized.
    torch.utils._device._device_constructors()
    # pipeline_parallel/schedules.py, optimizer/*.py: factories with device="cuda"; dist_checkpointing/mapping.py binds torch.empty as a default.
    for factory in ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "zeros_like", "ones_like", "empty_like", "full_like"):
        setattr(torch, factory, _on_cpu(getattr(torch, factory)))
    # tensor_parallel/random.py warns when the CPU generator moves inside a fork of the "GPU" one; here they are the same generator.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    gloo.complete()
    # jit.py turns small functions into torch.compile; on CPU that costs a C++ build per function and wins nothing at these sizes.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # oneDNN compiles a product for every number of rows it meets and keeps the last 1024 of them. An expert gets another number of tokens every time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _fill_gaps_without_transformer_engine() -> None:
    """Names that megatron-core 0.16 looks up although Transformer Engine, which would define them, is not installed."""
    import megatron.core.utils as core_utils

    if getattr(core_utils, "HAVE_TE", None) is False or not _installed("transformer_engine"):
        original = core_utils.is_te_min_version

        @functools.wraps(original)
        def is_te_min_version(version: str, check_equality: bool = True) -> bool:
            # 0.16.1 compares None with a version here; without Transformer Engine no minimum is met.
            return False

        core_utils.is_te_min_version = is_te_min_version
    import megatron.core.transformer.moe.moe_utils as moe_utils

    # RouterGatingLinearFunction tests `te_general_gemm is not None`; 0.16.1 defines the name only inside the import that failed.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _redirect_megatron_to_cpu() -> None:
    """Redirect functions of megatron-core that look at where a tensor lives."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # The all-to-all dispatcher needs split sizes as numpy; the original converts only tensors that are on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes
    # These compare tensor.type() with 'torch.cuda.FloatTensor' and its half-precision sisters.
    _wrap(DistributedOptimizer, "__init__")
    _wrap(optimizer.Float16OptimizerWithFloat16Params, "__init__")
    clip = _answering_with_cuda_types(clip_grads.clip_grad_by_total_norm_fp32)
    for module in (clip_grads, optimizer):
        if hasattr(module, "clip_grad_by_total_norm_fp32"):
            module.clip_grad_by_total_norm_fp32 = clip


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor


def _wrap(owner: type, method: str) -> None:
    setattr(owner, method, _answering_with_cuda_types(getattr(owner, method)))


def _answering_with_cuda_types(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Inside, `tensor.type()` says `torch.cuda.FloatTensor` for what lies on the CPU."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
