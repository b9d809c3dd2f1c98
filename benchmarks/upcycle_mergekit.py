"""mergekit's MoE merge beside the tool's Hugging Face output: the same dense model, in turns."""

from __future__ import annotations

import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costs import Cost, delete, file_sizes, run_command, spread
from dense_source import check_mixture

from megatron_skywork.errors import ConfigError, UserError

if TYPE_CHECKING:
    from upcycle import Bench

# As it comes, and with what mergekit's help calls faster. --lazy-unpickle is left out: it is for .bin files, and changes nothing for safetensors.
_NEEDED = "--i-understand-this-is-not-useful-without-training"
MERGEKIT_OPTIONS = [_NEEDED, f"{_NEEDED} --out-shard-size 1B --async-write --write-threads 2"]


def find_mergekit(given: str | None) -> str | None:
    """mergekit-moe, or None if none was asked for and none is on the path.

    Raises:
        ConfigError: the one that was asked for cannot be run.
    """
    found = shutil.which(given or "mergekit-moe")
    if given and found is None:
        raise ConfigError(f"--mergekit {given} is not a program that can be run")
    return found


def measure_mergekit(bench: Bench, command: str | None) -> dict[str, Any]:
    """mergekit and the tool in turns, and how many times the tool's time and memory it takes; a failure costs no other result."""
    if command is None:
        return {"skipped": "mergekit was not run: --mergekit was not given and mergekit-moe is not on the path"}
    arguments = bench.arguments
    arguments.mergekit = command
    variants: list[dict[str, Any]] = [{"options": options, "check": None, "runs": []} for options in arguments.mergekit_options or MERGEKIT_OPTIONS]
    ours: list[dict[str, Any]] = [{"workers": count, "runs": []} for count in arguments.workers]
    try:
        for turn in range(arguments.mergekit_repetitions + 1):
            steps = [*variants, *ours]
            for step in steps if turn % 2 == 0 else reversed(steps):
                _measure(bench, step, turn)
    except UserError as error:
        return {"skipped": f"mergekit was not measured to the end: {error}"}
    for variant in variants:
        variant["seconds"] = statistics.median(run["seconds"] for run in variant["runs"])
        variant["times_ours"] = {f"hf, {case['workers']} workers": _ratios(variant["runs"], case["runs"]) for case in ours}
    config = {**bench.mergekit_config(), "base_model": "DENSE", "experts": f"{arguments.num_experts} times {{source_model: DENSE}}"}
    start = statistics.median(run_command([command, "--help"]).seconds for _ in range(3))
    return {"version": mergekit_version(command), "start_seconds": start, "config": config, "variants": variants, "ours": ours}


def _measure(bench: Bench, step: dict[str, Any], turn: int) -> None:
    name = f"mergekit {step['options']}" if "options" in step else f"tool, hf with {step['workers']} workers"
    cost = bench.mergekit(step["options"]) if "options" in step else bench.tool("hf", step["workers"])
    print(f"{name}, round {turn}{'' if turn else ' (not counted)'}: {cost.seconds:.1f} s and {cost.sync_seconds:.1f} s of sync, "
          f"{cost.cpu_seconds:.1f} s of processor, {cost.largest_bytes / 2**30:.2f} GiB", file=sys.stderr, flush=True)  # fmt: skip
    if turn == 0 and "options" in step and bench.arguments.check:
        step["check"] = check_mixture(bench.source, bench.out, bench.shape, bench.arguments.num_experts)
    run = _numbers(cost, sum(file_sizes(bench.out)))
    delete(bench.out)
    if turn:
        step["runs"].append(run)


def _numbers(cost: Cost, num_bytes: int) -> dict[str, Any]:
    found = {key: value for key, value in asdict(cost).items() if key not in ("exit_code", "output", "errors")}
    return {**found, "seconds": cost.seconds + cost.sync_seconds, "bytes": num_bytes}


def _ratios(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Time by runs of one round; memory by the highest of all rounds, with mapped files and without."""

    def highest(key: str) -> float:
        return max(run[key] or 0 for run in theirs) / max(1, *(run[key] or 0 for run in ours))

    return {
        "time": spread([one["seconds"] / other["seconds"] for one, other in zip(theirs, ours, strict=True)]),
        "processor": spread([one["cpu_seconds"] / other["cpu_seconds"] for one, other in zip(theirs, ours, strict=True)]),
        **{name: round(highest(key), 2) for name, key in (("memory", "tree_bytes"), ("private_memory", "anonymous_bytes"))},
    }


def mergekit_version(command: str) -> str | None:
    """Asked of the Python beside the command."""
    python = Path(command).parent / "python"
    if not python.exists():
        return None
    names = ("mergekit", "torch", "transformers", "safetensors")
    cost = run_command([str(python), "-c", f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {names}))"])
    return cost.output.strip() or None
