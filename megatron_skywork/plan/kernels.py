"""Seconds of the kernels of a training step on one GPU, from what the GPU reaches of its peaks.

Each kernel has one free number, the share e of the peak P (or x of the memory bandwidth W) that it reaches; everything else is counted:

    product           t = l + b (m k + k n + m n) / (x W) + 2 m k n / (e P)
    grouped product   t = l + b (r k + E k n + r n) / (x W) + 2 r k n / (e P)
    attention         t = l + f (1 + s / length) / (e P)         f causal: 2 S^2 H D a sequence forward (two products, half of each), 2.5 times that backward
    memory            t = l + bytes / (x W)

with l the launch of a kernel and b the bytes of a number. Traffic and products are added, though hardware overlaps a part of them: over the 15 products
measured on an H100 (docs/measurements/h100_rates.yaml) that is off by 5.5 % in the mean and 14.5 % at most, and by 5.9 % and 14.8 % for a point that was
left out of the fit. A free launch time or a free size at which products saturate fit those points better and the left-out ones worse (21 to 59 % at most), as
does interpolation between points (8 %, 40 %). Grouped products: 6.9 % and 17 %, left out 8.3 % and 22 %. tests/unit/test_kernel_times.py holds these figures.

Short sequences keep attention from its rate. s is fitted beside e where three points or more tell them apart (FlashAttention-2 on an A100: 259 forward, 558
backward, within 4 %); else it is 380 tokens, from cuDNN's curves on an H100, 512 to 16384 tokens at head width 128 (FlashAttention-3, arXiv 2407.08608,
figures 5 and 6: causal forward gives 387, backward without a mask 376, both within 3 %; FlashAttention-2 402 and 274, FlashAttention-3 602 and 427).

Points of that file were timed one call after another, so those of attention also hold the time in which the host prepares the call and the device waits
(about 0.1 ms forward, 0.2 ms backward). It is fitted in place of s and left out of what `Kernels` answers: in training the host is ahead. Today
`tools/calibrate.py` times calls in a row on a GPU and says so (`in_a_row`); those points, and published ones, hold nothing of the kind.

Where a GPU has no points of a kernel, the reference's share of the peak holds (REFERENCE, fitted to the same file, an H100); that is a guess for other GPUs.
The best product of a search over shapes (`best_matmul_tflops`) is not a product like others: it hides its traffic and meets no tail. A GPU with such a figure
gets the reference's share times the ratio of its best to the reference's best, each of its own peak; grouped products likewise. A share found in one precision
is used for all. fp8 holds for products; attention is computed in bf16 then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.hardware import Gpu
from megatron_skywork.plan.rates import AttentionPoint, GroupedPoint, MatmulPoint, Rates, least_squares

NUMBER_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
SHORT_SEQUENCE = 380.0
# Peaks are sometimes stated too low (a device that clocks higher), never by more than this.
MOST_OF_PEAK = 1.25
BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class Shares:
    """What a GPU reaches of its peaks.

    Args:
        matmul, grouped_matmul, attention_forward, attention_backward: of the FLOP/s.
        memory: of the bytes per second.
        launch_seconds: of a kernel.
        forward_short, backward_short: tokens at which attention reaches half of its rate.
        matmul_traffic, grouped_traffic: 1 if the bytes of a product cost time beside its FLOPs, 0 where caches hold its operands (CPUs).
        forward_call_seconds, backward_call_seconds: what the host takes to start attention; in the measured points, not in training.
    """

    matmul: float
    grouped_matmul: float
    attention_forward: float
    attention_backward: float
    memory: float
    launch_seconds: float
    forward_short: float = SHORT_SEQUENCE
    backward_short: float = SHORT_SEQUENCE
    matmul_traffic: float = 1.0
    grouped_traffic: float = 1.0
    forward_call_seconds: float = 0.0
    backward_call_seconds: float = 0.0


REFERENCE = Shares(matmul=0.8274, grouped_matmul=0.7861, attention_forward=0.6306, attention_backward=0.5748, memory=0.8893, launch_seconds=7.355e-6)
# Best product of a search over shapes on an H100 (ML Engineering, Maximum Achievable Matmul FLOPS, August 2026), of its peak.
REFERENCE_BEST = 794.5 / 989.4


class Kernels:
    """Times of one GPU's kernels in one precision.

    Args:
        gpu, rates: as a cluster has them.
        precision: bf16, fp16, fp32 or fp8.
        sustained: share of all rates that training keeps.

    Raises:
        ConfigError: for a precision that the GPU has no figure for.
    """

    def __init__(self, gpu: Gpu, rates: Rates, precision: str, sustained: float = 1.0):
        if precision not in gpu.peak_flops:
            has = ", ".join(gpu.peak_flops)
            raise ConfigError(f"precision={precision}: there is no figure of {gpu.name} for it; it has {has}. Set train.precision, or measure it there: "
                              f"python tools/calibrate.py --precision {precision}")  # fmt: skip
        self.shares = shares(gpu, rates)
        for name in ("matmul", "grouped_matmul", "attention_forward", "attention_backward", "memory"):
            share = getattr(self.shares, name)
            if not 0 < share <= MOST_OF_PEAK:
                raise ConfigError(f"rates of {gpu.name}: {name} comes to {share:.3g} of its peak, which no device reaches; look at the units of its points "
                                  "(tflops, bytes, bytes_per_second) and at the peaks")  # fmt: skip
        self.launch_seconds = self.shares.launch_seconds
        self._number = NUMBER_BYTES[precision]
        self._flops = gpu.peak_flops[precision] * sustained
        self._attention_flops = gpu.peak_flops["bf16" if precision == "fp8" else precision] * sustained
        self._bandwidth = gpu.memory_bytes_per_second * self.shares.memory * sustained

    def matmul(self, rows: float, inner: int, columns: int) -> float:
        """[rows, inner] x [inner, columns], seconds."""
        traffic = self._number * (rows * inner + inner * columns + rows * columns)
        return self.launch_seconds + self.shares.matmul_traffic * traffic / self._bandwidth + 2 * rows * inner * columns / (self.shares.matmul * self._flops)

    def grouped_matmul(self, experts: int, rows: float, inner: int, columns: int) -> float:
        """A product of every expert's rows with its own [inner, columns], in one launch; seconds.

        Args:
            experts: on this GPU.
            rows: of all of them together.
        """
        traffic = self._number * (rows * inner + experts * inner * columns + rows * columns)
        work = 2 * rows * inner * columns / (self.shares.grouped_matmul * self._flops)
        return self.launch_seconds + self.shares.grouped_traffic * traffic / self._bandwidth + work

    def attention(self, sequences: float, length: int, heads: int, groups: int, width: int, *, backward: bool) -> float:
        """Causal attention, seconds. `groups` of keys and values are read once for all their heads and change nothing that is counted here."""
        flops = (BACKWARD_FLOPS if backward else 1) * _attention_flops(sequences, length, heads, width)
        share = self.shares.attention_backward if backward else self.shares.attention_forward
        short = self.shares.backward_short if backward else self.shares.forward_short
        return self.launch_seconds + flops * (1 + short / length) / (share * self._attention_flops)

    def memory(self, num_bytes: float) -> float:
        """A kernel that only reads and writes, both counted; seconds."""
        return self.launch_seconds + num_bytes / self._bandwidth


def shares(gpu: Gpu, rates: Rates) -> Shares:
    """The shares that measured or published points mean, and the reference's where there are none."""
    found = REFERENCE
    if rates.launch:
        found = replace(found, launch_seconds=sum(point.seconds for point in rates.launch) / len(rates.launch))
    if rates.copy_:
        # Bytes of all over seconds of all: large buffers decide, as they do in a step.
        seconds = sum(2 * point.bytes / point.bytes_per_second for point in rates.copy_) - len(rates.copy_) * found.launch_seconds
        found = replace(found, memory=sum(2 * point.bytes for point in rates.copy_) / seconds / gpu.memory_bytes_per_second)
    if rates.best_matmul_tflops is not None:
        ratio = rates.best_matmul_tflops * 1e12 / gpu.peak_flops[rates.precision] / REFERENCE_BEST
        found = replace(found, matmul=ratio * REFERENCE.matmul, grouped_matmul=ratio * REFERENCE.grouped_matmul)
    bandwidth, points = gpu.memory_bytes_per_second * found.memory, _points(rates)
    flops = gpu.peak_flops.get(rates.precision, 0.0)
    has_call = bool(rates.measured) and not rates.measured.get("in_a_row")
    products = {kernel: _fit_product(points[kernel], flops, bandwidth, found.launch_seconds) for kernel in ("matmul", "grouped_matmul") if points[kernel]}
    if "matmul" in products:
        share, traffic = products["matmul"]
        grouped = share * REFERENCE.grouped_matmul / REFERENCE.matmul
        found = replace(found, matmul=share, grouped_matmul=grouped, matmul_traffic=traffic, grouped_traffic=traffic)
    if "grouped_matmul" in products:
        found = replace(found, grouped_matmul=products["grouped_matmul"][0], grouped_traffic=products["grouped_matmul"][1])
    if points["attention_forward"]:
        share, short, call = _fit_attention(points["attention_forward"], flops, found.launch_seconds, has_call)
        backward = share * REFERENCE.attention_backward / REFERENCE.attention_forward
        found = replace(found, attention_forward=share, forward_short=short, forward_call_seconds=call, attention_backward=backward)
    if points["attention_backward"]:
        share, short, call = _fit_attention(points["attention_backward"], flops, found.launch_seconds, has_call)
        found = replace(found, attention_backward=share, backward_short=short, backward_call_seconds=call)
    return found


def relative_errors(gpu: Gpu, rates: Rates, of: Shares | None = None) -> dict[str, list[float]]:
    """By how much the model's time of each point is above the measured one, as a share of it.

    Args:
        of: other shares than those fitted to these points.
    """
    model, points = of or shares(gpu, rates), _points(rates)
    flops, bandwidth = gpu.peak_flops.get(rates.precision, 0.0), gpu.memory_bytes_per_second * model.memory
    errors: dict[str, list[float]] = {"copy": [(model.launch_seconds + 2 * p.bytes / bandwidth) / (2 * p.bytes / p.bytes_per_second) - 1 for p in rates.copy_]}
    for kernel, share, traffic, short, call in (
        ("matmul", model.matmul, model.matmul_traffic, 0.0, 0.0),
        ("grouped_matmul", model.grouped_matmul, model.grouped_traffic, 0.0, 0.0),
        ("attention_forward", model.attention_forward, 0.0, model.forward_short, model.forward_call_seconds),
        ("attention_backward", model.attention_backward, 0.0, model.backward_short, model.backward_call_seconds),
    ):
        errors[kernel] = []
        for point in points[kernel]:
            seconds = point.launches * model.launch_seconds + call + traffic * point.bytes / bandwidth
            errors[kernel].append((seconds + (point.flops + short * point.flops_by_length) / flops / share) / point.seconds - 1)
    return errors


# ------------------------------------------------------------------------------------------------------------------------------ points


@dataclass(frozen=True)
class _Timed:
    """A measured call in the terms of the model; flops_by_length is attention's FLOPs divided by the length."""

    launches: int
    bytes: float
    flops: float
    seconds: float
    flops_by_length: float = 0.0


def _points(rates: Rates) -> dict[str, list[_Timed]]:
    number = NUMBER_BYTES[rates.precision]
    return {
        "matmul": [_timed_matmul(point, number) for point in rates.matmul],
        "grouped_matmul": [_timed_grouped(point, number) for point in rates.grouped_matmul],
        "attention_forward": [_timed_attention(point, 1.0, point.forward_tflops) for point in rates.attention],
        "attention_backward": [_timed_attention(p, BACKWARD_FLOPS, p.backward_tflops) for p in rates.attention if p.backward_tflops is not None],
    }


def _fit_product(points: Sequence[_Timed], flops: float, bandwidth: float, launch: float) -> tuple[float, float]:
    """Share of the peak, and 1 if traffic counts, or 0 if the operands evidently stay in a cache: where that halves the squares of the relative errors."""
    at_peak = [point.flops / flops / point.seconds for point in points]
    fits = []
    for traffic in (1.0, 0.0):
        left = [1 - (point.launches * launch + traffic * point.bytes / bandwidth) / point.seconds for point in points]
        share = _share(at_peak, left)
        fits.append((share, traffic, sum((work / share - rest) ** 2 for work, rest in zip(at_peak, left, strict=True))))
    counted, cached = fits
    share, traffic, _ = cached if len(points) >= 3 and cached[2] < counted[2] / 2 else counted
    return share, traffic


def _fit_attention(points: Sequence[_Timed], flops: float, launch: float, has_call: bool) -> tuple[float, float, float]:
    """Share of the peak, tokens of a sequence at half the rate, and seconds of a call beyond its launch, if calls were timed one by one."""
    left = [1 - launch / point.seconds for point in points]
    full = [(point.flops + SHORT_SEQUENCE * point.flops_by_length) / flops / point.seconds for point in points]
    if len(points) >= 3 and has_call:
        call, inverse = least_squares([(1 / point.seconds, work) for point, work in zip(points, full, strict=True)], left)
        if inverse > 0:
            return 1 / inverse, SHORT_SEQUENCE, call
    elif len({point.flops / point.flops_by_length for point in points}) >= 3:
        rows = [(point.flops / flops / point.seconds, point.flops_by_length / flops / point.seconds) for point in points]
        inverse, short = least_squares(rows, left)
        if inverse > 0:
            return 1 / inverse, short / inverse, 0.0
    return _share(full, left), SHORT_SEQUENCE, 0.0


def _share(at_peak: Sequence[float], left: Sequence[float]) -> float:
    """Of the peak, by least squares; what the slowest point reaches where launches and traffic alone would take longer than all did."""
    inverse = least_squares([(0.0, work) for work in at_peak], list(left))[1]
    return 1 / inverse if inverse > 0 else min(at_peak)


def _timed_matmul(point: MatmulPoint, number: int) -> _Timed:
    flops = 2.0 * point.rows * point.inner * point.columns
    traffic = number * (point.rows * point.inner + point.inner * point.columns + point.rows * point.columns)
    return _Timed(1, traffic, flops, flops / (point.tflops * 1e12))


def _timed_grouped(point: GroupedPoint, number: int) -> _Timed:
    """Six products, three with [hidden, 2 width] and three with [width, hidden]; SwiGLU reads 2 and writes 1 width, backward reads 3 and writes 3."""
    rows, hidden, width, experts = point.rows, point.hidden, point.width, point.experts
    into = rows * hidden + experts * hidden * 2 * width + rows * 2 * width
    out = rows * width + experts * width * hidden + rows * hidden
    flops = 18.0 * rows * hidden * width
    return _Timed(8, number * (3 * into + 3 * out + 9 * rows * width), flops, flops / (point.tflops * 1e12))


def _timed_attention(point: AttentionPoint, times: float, tflops: float) -> _Timed:
    flops = times * _attention_flops(point.sequences, point.sequence, point.heads, point.width)
    return _Timed(1, 0.0, flops, flops / (tflops * 1e12), flops / point.sequence)


def _attention_flops(sequences: float, length: int, heads: int, width: int) -> float:
    """Forward: two products of [length, width, length] a head, half of each."""
    return 2.0 * sequences * length**2 * heads * width

