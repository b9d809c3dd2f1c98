"""Speed of a run, and the peak it is measured against.

    tokens/s            tokens / seconds
    TFLOP/s per device  FLOPs per token * tokens/s / devices / 1e12
    MFU                 TFLOP/s per device / peak of one device

FLOPs per token are what the model needs (forward and backward, no recomputation), so recomputing lowers MFU, as it should. They are given as a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_skywork import device

# Dense bf16 TFLOP/s of one device, from the makers' data sheets (where a sheet prints the figure "with sparsity", half of it). A key matches a device
# whose name has all its words; the key with the most words wins, so a PCIe or NVL card does not get the SXM figure.
PEAK_BF16_TFLOPS: dict[str, float] = {
    "A10": 125.0,  # NVIDIA A10 data sheet
    "A30": 165.0,  # NVIDIA A30 data sheet
    "A40": 149.7,  # NVIDIA A40 data sheet
    "A100": 312.0,  # NVIDIA A100 data sheet, SXM and PCIe alike
    "A800": 312.0,  # A100 with slower links; the figure the Skywork-MoE report's 38 % refers to
    "L4": 121.0,  # NVIDIA L4 data sheet, 242 with sparsity
    "L40": 181.0,  # NVIDIA L40 data sheet, 362 with sparsity
    "L40S": 362.0,  # NVIDIA L40S data sheet, 733 with sparsity
    "H20": 148.0,  # NVIDIA H20 data sheet
    "H100": 989.4,  # NVIDIA H100 data sheet, SXM5, 1979 with sparsity
    "H100 PCIe": 756.0,  # the same, PCIe, 1513 with sparsity
    "H100 NVL": 835.0,  # the same, NVL, 1671 with sparsity
    "H800": 989.4,  # H100 with slower links
    "H800 PCIe": 756.0,
    "H200": 989.4,  # NVIDIA H200 data sheet, SXM, 1979 with sparsity
    "H200 NVL": 835.0,  # the same, NVL, 1671 with sparsity
    "GH200": 989.4,  # NVIDIA GH200 data sheet, 1979 with sparsity
    "B200": 2250.0,  # NVIDIA HGX B200 data sheet, 4.5 PFLOP/s with sparsity
    "GB200": 2500.0,  # NVIDIA GB200 NVL72 data sheet, 5 PFLOP/s with sparsity
    "MI250X": 383.0,  # AMD Instinct MI250X data sheet, both dies
    "MI300X": 1307.4,  # AMD Instinct MI300X data sheet
}


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name (`NVIDIA H100 80GB HBM3`); None where it is not known, e.g. for a CPU."""
    words = _words(device_name)
    matches = [key for key in PEAK_BF16_TFLOPS if _words(key) <= words]
    return PEAK_BF16_TFLOPS[max(matches, key=lambda key: len(_words(key)))] if matches else None


@dataclass(frozen=True)
class Throughput:
    """Speed over some steps; the field names are those of a step record."""

    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None


def throughput(*, tokens: float, seconds: float, flops_per_token: float, num_devices: int, peak: float | None) -> Throughput:
    """Speed of `tokens` (all devices together) in `seconds`.

    Args:
        flops_per_token: FLOPs the model needs for one token, forward and backward.
        peak: TFLOP/s of one device, or None where it is not known, and then MFU is None.

    Raises:
        ValueError: seconds or num_devices is not positive.
    """
    if seconds <= 0 or num_devices <= 0:
        raise ValueError(f"seconds={seconds} and num_devices={num_devices} must be positive")
    tokens_per_second = tokens / seconds
    tflops = flops_per_token * tokens_per_second / num_devices / 1e12
    return Throughput(tokens_per_second, tflops, None if peak is None else tflops / peak)


def formulas(*, flops_per_token: float, flops_formula: str, num_devices: int, device_name: str, peak: float | None) -> dict[str, str]:
    """What the speed figures of a run mean, with its numbers, for the run's header.

    Args:
        flops_formula: how `flops_per_token` was counted, in words or symbols.
    """
    known = f"{peak:g} TFLOP/s of {device_name} (dense bf16)" if peak is not None else f"not known for {device_name}; set metrics.peak_tflops"
    return {
        "flops_per_token": f"{flops_per_token:.6g} = {flops_formula}",
        "tokens_per_second": "tokens of a step, over all devices / seconds of a step, mean of the steps since the last record",
        "data_wait_share": "seconds the device had nothing to do because the next micro-batches were not there / seconds of a step",
        "tflops_per_device": f"{flops_per_token:.6g} * tokens_per_second / {num_devices} devices / 1e12",
        "peak": known,
        "mfu": f"tflops_per_device / {peak:g}" if peak is not None else "not given: the peak is not known",
    }


class PhaseTimer:
    """Seconds spent in named phases of steps (step, data, forward_backward, optimizer), as the device sees them.

    A phase is two moments in the order of the device's work, and they are compared only when somebody asks: on a GPU nothing waits for the clock, and time in
    which the host waits while the device is busy counts where the device is busy.

    Args:
        told: hears the name of each phase as it begins.
    """

    def __init__(self, told: Callable[[str], None] = lambda name: None) -> None:
        self._told = told
        self._phases: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`; an exception inside is timed too and goes on."""
        self._told(name)
        start = device.moment()
        try:
            yield
        finally:
            self._phases.append((name, start, device.moment()))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; waits until the device has done them."""
        phases, self._phases = self._phases, []
        seconds: dict[str, float] = {}
        for name, start, end in phases:
            seconds[name] = seconds.get(name, 0.0) + device.seconds_between(start, end)
        return seconds
