"""A cluster for these tests where SLURM is installed, and a skip that nobody overlooks where it is not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_cluster import PrivateCluster, missing

NUM_NODES = 5


@pytest.fixture(scope="session")
def cluster() -> Iterator[PrivateCluster]:
    """A SLURM of five nodes on this machine."""
    if lacking := missing():
        pytest.skip(f"SLURM was not tested: {', '.join(lacking)} missing; `make slurm-packages` installs it (Debian's slurmctld, slurmd, slurm-client, munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    private = PrivateCluster(folder / "c", NUM_NODES)
    yield private
    private.close()
    shutil.rmtree(folder)
