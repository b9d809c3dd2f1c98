"""One preparation for every test process: megatron-core's redirections before anything imports it, one thread, and a shared pool of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from megatron_skywork import device

device.prepare()

from ranks import RankPool, shared_pool  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four processes that run a function as ranks of a job; they are started once for all tests."""
    pool = shared_pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def remote_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this run's own for the code in Skywork-MoE folders, which must not meet other runs' copies.

    One for all tests: transformers imports the copies as modules of the package `transformers_modules`, and Python binds a package to the place where it was
    first found. From a second cache in the same process nothing below that package can be imported.
    """
    import transformers.dynamic_module_utils as modules

    before, modules.HF_MODULES_CACHE = modules.HF_MODULES_CACHE, str(tmp_path_factory.mktemp("remote_code"))
    yield
    modules.HF_MODULES_CACHE = before


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as a job of one rank, for modules of megatron-core that ask for groups."""
    import torch
    from megatron.core import parallel_state

    store = tmp_path_factory.mktemp("rendezvous") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def on_the_device() -> Iterator[None]:
    """Tensors are made on this machine's device, so that a test of a kernel tests the GPU's where there is one."""
    import torch

    with torch.device(device.current()):
        yield


@pytest.fixture
def plain_loss_scale() -> Iterator[None]:
    """Auxiliary losses enter the gradient as they are, as without accumulation and fp16."""
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
