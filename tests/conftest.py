"""One preparation for every test process: megatron-core's redirections before anything imports it, one thread, and a shared pool of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from megatron_skywork import device

device.prepare()

from ranks import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four processes that run a function as ranks of a job; they are started once for all tests."""
    pool = RankPool(4)
    yield pool
    pool.close()
