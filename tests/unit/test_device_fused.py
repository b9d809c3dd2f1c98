"""`device.fused`: compiled once where there is a GPU and a compiler, and as written everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_skywork import device


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine that says it has a GPU and Triton, whose compiler writes down what it was given."""
    names: list[str] = []

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        names.append(function.__name__)
        return lambda *args: ("compiled", function(*args))

    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "_installed", lambda package: True)
    monkeypatch.setattr(torch, "compile", compile)
    yield names
    device.compile_fused(True)


def double(x: int) -> int:
    return 2 * x


def test_compiles_at_the_first_call_and_once(compiled: list[str]) -> None:
    function = device.fused(double)
    assert compiled == []
    assert [function(1), function(2)] == [("compiled", 2), ("compiled", 4)]
    assert compiled == ["double"]


def test_runs_as_written_when_asked_to(compiled: list[str]) -> None:
    device.compile_fused(False)
    assert device.fused(double)(1) == 2
    assert compiled == []


def test_runs_as_written_without_triton(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_installed", lambda package: False)
    assert device.fused(double)(1) == 2
    assert compiled == []


def test_runs_as_written_without_a_gpu() -> None:
    assert device.fused(double)(1) == 2
