"""A sample of every fault, in each run of the tests; `make faults` does them all."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fault import CannotBeTried, Fault, passed  # noqa: E402
from suite import all_faults  # noqa: E402


@pytest.mark.parametrize("fault", [fault for fault in all_faults() if fault.in_short], ids=lambda fault: fault.name)
def test_fault(fault: Fault, tmp_path: Path) -> None:
    if fault.needs is not None and shutil.which(fault.needs) is None:
        pytest.skip(f"NOT TESTED: {fault.needs} is not installed")
    try:
        outcome = fault.inject(tmp_path, True)
    except CannotBeTried as reason:
        pytest.skip(f"NOT TESTED: {reason}")
    assert passed(fault, outcome), outcome.lost[:5] or "a control must lose something, and something must be tried"
