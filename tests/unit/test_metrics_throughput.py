"""Speed figures, the peak table, and the phase timer."""

from __future__ import annotations

import pytest

from megatron_skywork import device
from megatron_skywork.metrics import wording
from megatron_skywork.metrics.throughput import PhaseTimer, formulas, peak_tflops, throughput


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("cpu", None),
        ("NVIDIA H1000", None),
    ],
)
def test_peak_by_device_name(device: str, peak: float | None):
    assert peak_tflops(device) == peak


def test_the_published_run_by_its_own_figures():
    # 690 tokens/GPU/s with 6 * 22.69e9 parameters, over 312 TFLOP/s; attention FLOPs left out.
    speed = throughput(tokens=690 * 1536, seconds=1.0, flops_per_token=6 * 22.69e9, num_devices=1536, peak=312.0)
    assert speed.tokens_per_second == pytest.approx(1059840)
    assert speed.tflops_per_device == pytest.approx(93.94, abs=0.01)
    assert speed.mfu == pytest.approx(0.3011, abs=1e-4)


def test_no_peak_no_mfu_and_the_formula_says_so():
    assert throughput(tokens=10, seconds=2, flops_per_token=1e12, num_devices=1, peak=None).mfu is None
    text = formulas(flops_per_token=2.5e9, flops_formula="6 N_active + 12 L h s", num_devices=8, device_name="cpu", peak=None)
    assert "6 N_active + 12 L h s" in text["flops_per_token"] and "metrics.peak_tflops" in text["peak"]
    text = formulas(flops_per_token=2.5e9, flops_formula="6 N", num_devices=8, device_name="NVIDIA H200", peak=989.4)
    assert "989.4" in text["mfu"] and "NVIDIA H200" in text["peak"]
    with pytest.raises(ValueError, match="seconds=0"):
        throughput(tokens=10, seconds=0, flops_per_token=1, num_devices=1, peak=None)


def test_phases_add_up_and_survive_an_exception(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timer = PhaseTimer()
    for seconds in (1.0, 2.0):
        with timer.phase("step"), timer.phase("data"):
            now[0] += seconds
    with pytest.raises(KeyError), timer.phase("optimizer"):
        now[0] += 4.0
        raise KeyError
    assert timer.take() == {"data": 3.0, "step": 3.0, "optimizer": 4.0}
    assert timer.take() == {}


def test_on_a_gpu_phases_are_those_of_the_device_and_nothing_waits_until_they_are_read(monkeypatch: pytest.MonkeyPatch):
    """A device that works off a queue: an event's time is that at which the device gets to it."""
    done, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = done[0]

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "Event", Event)
    timer = PhaseTimer()
    with timer.phase("step"):
        with timer.phase("data"):
            done[0] += 0.5
        with timer.phase("forward_backward"):
            done[0] += 2.0
    assert waits == []
    assert timer.take() == {"data": 0.5, "forward_backward": 2.0, "step": 2.5}
    assert waits


def test_wording():
    assert [wording.duration(value) for value in (0.81, 45, 166, 1200, 3840, 266400, float("inf"))] == [
        "0.81 s",
        "45 s",
        "2m 46s",
        "20m",
        "1h 04m",
        "3d 02h",
        "?",
    ]
    assert [wording.count(value) for value in (512, 373.1e6, 146.36e9)] == ["512", "373.1 M", "146.4 B"]
    assert [wording.percent(value) for value in (0, 0.0042, 0.0123, 0.346)] == ["0 %", "0.42 %", "1.23 %", "34.6 %"]
