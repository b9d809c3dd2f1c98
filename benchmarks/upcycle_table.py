"""The result of benchmarks/upcycle.py as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result as a person reads it."""
    shape = result["model"]
    yield f"{shape['layers']} layers of {shape['hidden']} x {shape['ffn']}, {result['num_experts']} experts, dense source {result['source_bytes'] / 1e9:.2f} GB"
    yield f"{result['repetitions']} rounds after one that is not counted; {result['cores']} cores, {result['filesystem']}"
    yield f"start of the tool without work (--dry-run): {result['start_seconds']:.1f} s, part of every time below"
    yield ""
    yield (f"{'format':6}{'workers':>8}{'GB':>7}{'tool s':>8}{'GB/s':>6}{'plain s':>9}{'GB/s':>6}{'tool/plain: median, min .. max':>32}{'tool/O_DIRECT':>15}"
           f"{'largest GiB':>13}{'all GiB':>9}{'private GiB':>13}")  # fmt: skip
    for case in result["pairs"]:
        size = case["bytes"] / 1e9
        ratio = "{median:.2f}, {min:.2f} .. {max:.2f}".format(**case["ratio"])
        direct = f"{case['ratio_direct']['median']:.2f}" if "ratio_direct" in case else "-"
        yield (f"{case['format']:6}{case['workers']:8}{size:7.2f}{case['tool_seconds']:8.1f}{size / case['tool_seconds']:6.2f}{case['plain_seconds']:9.1f}"
               f"{size / case['plain_seconds']:6.2f}{ratio:>32}{direct:>15}{gib(case['largest_bytes']):>13}{gib(case['tree_bytes']):>9}"
               f"{gib(case['anonymous_bytes']):>13}")  # fmt: skip
    yield from (f"experts of {case['format']}: {checked(case['check'])}" for case in result["pairs"] if case.get("check"))
    if result["memory"]:
        yield ""
        yield f"{'format':6}{'workers':>8}{'layers':>8}{'GB':>7}{'largest GiB':>13}{'all GiB':>9}   peak memory against depth"
        for run in result["memory"]:
            yield f"{run['format']:6}{run['workers']:8}{run['layers']:8}{run['bytes'] / 1e9:7.2f}{gib(run['largest_bytes']):>13}{gib(run['tree_bytes']):>9}"
    yield ""
    other = result["mergekit"]
    if "skipped" in other:
        yield other["skipped"]
        return
    yield f"{other['version'] or 'mergekit'}; start of it without work (--help): {other['start_seconds']:.1f} s"
    for variant in other["variants"]:
        runs = variant["runs"]
        highest = {key: gib(max(run[key] or 0 for run in runs)) for key in ("tree_bytes", "anonymous_bytes")}
        yield (f"mergekit {variant['options']}: {variant['seconds']:.1f} s, {highest['tree_bytes']} GiB, {highest['anonymous_bytes']} GiB of it private, "
               f"{runs[0]['bytes'] / 1e9:.2f} GB")  # fmt: skip
        for name, times in variant["times_ours"].items():
            time = "{median:.2f} ({min:.2f} .. {max:.2f})".format(**times["time"])
            yield f"  against {name}: {time} times the time, {times['memory']:.1f} times the memory, {times['private_memory']:.1f} times the private memory"
        if variant["check"]:
            yield f"  experts: {checked(variant['check'])}"


def checked(check: dict[str, Any]) -> str:
    """What `check_mixture` found, in a line."""
    routers = ", ".join(sorted({f"{router['dtype']} std {router['std']:.3f}" for router in check["routers"]})) or "none"
    others = "are too" if check["others_equal"] else "ARE NOT"
    unknown = f"; unknown: {', '.join(check['unknown'])}" if check["unknown"] else ""
    return (f"{check['experts_equal']} of {check['experts']} matrices are the dense ones bit for bit ({check['expert_names']}), the other tensors {others}; "
            f"routers: {routers}{unknown}")  # fmt: skip


def gib(num_bytes: int) -> str:
    """Bytes as GiB, without the unit."""
    return f"{num_bytes / 2**30:.2f}"
