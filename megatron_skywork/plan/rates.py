"""What a device reaches of its peaks, as measured: the points that `tools/calibrate.py` writes, and the few numbers that `plan.kernels` derives from them.

A point is one operation, its sizes and what it reached. Published figures have the same form, so that one way of reading serves both.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from megatron_skywork.config.section import Positive, Section

Collective = Literal["all_reduce", "all_gather", "all_to_all"]


class MatmulPoint(Section):
    """[rows, inner] x [inner, columns]."""

    rows: Positive = Field(description="Rows of the left matrix.")
    inner: Positive = Field(description="Columns of the left and rows of the right matrix.")
    columns: Positive = Field(description="Columns of the right matrix.")
    tflops: float = Field(gt=0, description="1e12 FLOP/s reached.")


class GroupedPoint(Section):
    """Forward and backward of a layer's experts with SwiGLU: six grouped products and the activation between them."""

    experts: Positive = Field(description="Experts on the device.")
    rows: Positive = Field(description="Rows of all experts together.")
    hidden: Positive = Field(description="Width of a row.")
    width: Positive = Field(description="Inner width of an expert.")
    tflops: float = Field(gt=0, description="1e12 FLOP/s reached, of the products' FLOPs alone.")


class AttentionPoint(Section):
    """Causal attention; FLOPs count half of the scores, backward 2.5 times forward."""

    sequences: Positive = Field(1, description="Sequences at once.")
    sequence: Positive = Field(description="Tokens of a sequence.")
    heads: Positive = Field(description="Query heads.")
    groups: Positive = Field(description="Heads of keys and values.")
    width: Positive = Field(description="Width of a head.")
    forward_tflops: float = Field(gt=0, description="1e12 FLOP/s reached in forward.")
    backward_tflops: float | None = Field(None, gt=0, description="1e12 FLOP/s reached in backward; unset where nobody published it.")


class CopyPoint(Section):
    """Device memory to device memory."""

    bytes: Positive = Field(description="Bytes of the source.")
    bytes_per_second: float = Field(gt=0, description="Bytes read and bytes written, both counted.")


class HostCopyPoint(Section):
    """Device memory to page-locked host memory and back."""

    bytes: Positive = Field(description="Bytes copied.")
    to_host_bytes_per_second: float = Field(gt=0, description="Device to host.")
    to_device_bytes_per_second: float = Field(gt=0, description="Host to device.")


class LaunchPoint(Section):
    """The smallest operation, many queued one after another."""

    seconds: float = Field(gt=0, description="Of one.")


class LinkPoint(Section):
    """One collective over all ranks."""

    collective: Collective = Field(description="Which.")
    ranks: Positive = Field(description="How many took part.")
    bytes: Positive = Field(description="Whole buffer: input of an all-reduce and all-to-all, output of an all-gather.")
    seconds: float = Field(gt=0, description="Median time.")


class Rates(Section):
    """What a device reaches. Lists that are empty are answered by the reference GPU's fractions of the peaks (`plan.kernels`)."""

    model_config = ConfigDict(populate_by_name=True)

    source: str = Field("", description="Where the points come from.")
    device: str = Field("", description="The device's own name, where it was measured.")
    memory_bytes: Positive | None = Field(None, description="What torch can allocate there.")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Precision of the products and of attention.")
    measured: dict[str, Any] = Field(default_factory=dict, description="Command and versions.")
    best_matmul_tflops: float | None = Field(None, gt=0, description="The best product of a search over shapes, where only that is published.")
    matmul: list[MatmulPoint] = Field(default_factory=list, description="Matrix products.")
    grouped_matmul: list[GroupedPoint] = Field(default_factory=list, description="Products of experts.")
    attention: list[AttentionPoint] = Field(default_factory=list, description="Causal attention.")
    copy_: list[CopyPoint] = Field(default_factory=list, alias="copy", description="Memory traffic.")
    host_copy: list[HostCopyPoint] = Field(default_factory=list, description="To and from the host.")
    launch: list[LaunchPoint] = Field(default_factory=list, description="Smallest operation.")
    links: list[LinkPoint] = Field(default_factory=list, description="Collectives.")


def alpha_beta(points: list[LinkPoint], ranks_per_node: int = 1) -> tuple[float, float]:
    """Seconds of a step and bytes per second of a rank's way out, from measured collectives.

    A ring of n ranks takes n - 1 steps for an all-gather of s bytes and sends (n - 1) / n s from each; an all-reduce takes and sends twice as much. In an
    all-to-all a rank sends 1 / n s to each of the others. With k ranks on a node the way out is a rank's share of the network: a ring sends over all k of
    them, an all-to-all what goes to other nodes. Least squares of the relative errors, neither number below zero; where the bytes seem to cost nothing, the
    best rate seen.

    Args:
        points: of more than one rank, and of more than one node if ranks_per_node is above 1.
        ranks_per_node: 1 for ranks that are all on one node.
    """
    rows = []
    for point in points:
        steps, sent = point.ranks - 1, (point.ranks - 1) / point.ranks * point.bytes / ranks_per_node
        if point.collective == "all_reduce":
            steps, sent = 2 * steps, 2 * sent
        elif point.collective == "all_to_all":
            sent = (point.ranks - ranks_per_node) / point.ranks * point.bytes
        rows.append((steps / point.seconds, sent / point.seconds))
    latency, seconds_per_byte = least_squares(rows, [1.0] * len(rows))
    return latency, 1 / seconds_per_byte if seconds_per_byte > 0 else max(sent for _, sent in rows)


def least_squares(rows: list[tuple[float, float]], wanted: list[float]) -> tuple[float, float]:
    """The x, y >= 0 with the smallest sum of (a x + b y - w)^2, rows (a, b)."""
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    aw, bw = (sum(row[i] * w for row, w in zip(rows, wanted, strict=True)) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        x, y = (aw * bb - bw * ab) / determinant, (bw * aa - aw * ab) / determinant
        if x >= 0 and y >= 0:
            return x, y
    alone = [(aw / aa if aa else 0.0, 0.0), (0.0, bw / bb if bb else 0.0)]
    return min(alone, key=lambda pair: sum((row[0] * pair[0] + row[1] * pair[1] - w) ** 2 for row, w in zip(rows, wanted, strict=True)))
