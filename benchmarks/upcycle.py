#!/usr/bin/env python3
"""How fast tools/upcycle_dense.py writes, against plain sequential writing on the same disk; its peak memory; and mergekit's MoE merge on the same model.

A dense Llama-type model of real widths (4608 x 12288, few layers, random bf16) is made on the spot and upcycled by the command a user types, in a process of
its own. In turns with it, files of the same sizes are written plainly: 16 MiB blocks of random bytes, one file after another, fsync at the end of each.
The ratio is tool speed over plain speed of each such pair, start of Python and imports included: 1 is as fast as writing alone.

What was done for fairness. The first round is not counted: a disk's first use of its blocks is slower. The order within a pair is turned round every round.
Before every run the disk is synced and the dense model put out of the page cache, so that every run reads it from the disk. Outputs are synced, put out of the
page cache and deleted outside of the timing. Plain writing goes through the page cache, as a program's writes do; writing past it (O_DIRECT) is shown beside.
mergekit does not fsync; what fsync of its files takes after it is added to its time, as it is to the tool's. It is run in turns with the tool as well, with a
round that is not counted, and the ratios are those of runs of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from costs import Cost, PlainWriter, delete, file_sizes, forget, knows_direct, run_command, spread  # noqa: E402
from dense_source import Shape, check_mixture, described, write_dense  # noqa: E402
from upcycle_mergekit import MERGEKIT_OPTIONS, find_mergekit, measure_mergekit  # noqa: E402
from upcycle_table import table  # noqa: E402

from megatron_skywork.errors import ConfigError, UserError  # noqa: E402

MARGIN_BYTES = 2 << 30


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Bench:
    """The commands under test, and the folder they work in."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self.folder, self.plain = arguments, folder, PlainWriter(folder)
        self.out, self.source = folder / "out", folder / "dense"
        self.shape = Shape(arguments.hidden, arguments.ffn, arguments.heads, arguments.vocab, arguments.layers)

    def make_source(self, layers: int) -> int:
        """Replace the dense model by one of so many layers; its bytes."""
        delete(self.source)
        shape = replace(self.shape, layers=layers)
        say(f"writing a dense model of {layers} layers, {shape.num_bytes() / 1e9:.1f} GB")
        return write_dense(self.source, shape)

    def tool(self, form: str, workers: int, *more: str) -> Cost:
        """One upcycling, as a user runs it, of a model that is not in the page cache."""
        words = [sys.executable, str(self.arguments.tool), "--dense", str(self.source), "--out", str(self.out), "--format", form]
        words += ["--num-experts", str(self.arguments.num_experts), "--workers", str(workers), "--json", *shlex.split(self.arguments.tool_options), *more]
        return self._run(words, "upcycling")

    def mergekit(self, options: str) -> Cost:
        """One MoE merge of as many copies of the dense model."""
        config = self.folder / "mergekit.yml"
        config.write_text(json.dumps(self.mergekit_config()), encoding="utf-8")  # JSON is YAML
        words = [str(self.arguments.mergekit), str(config), str(self.out), *shlex.split(options)]
        return self._run(words, "mergekit", {**os.environ, "HF_HUB_OFFLINE": "1"})

    def mergekit_config(self) -> dict[str, Any]:
        """The sparse upcycling of mergekit's own documentation."""
        experts = [{"source_model": str(self.source)}] * self.arguments.num_experts
        return {"base_model": str(self.source), "gate_mode": "random", "dtype": "bfloat16", "experts_per_token": 2, "experts": experts}

    def _run(self, words: list[str], name: str, environment: dict[str, str] | None = None) -> Cost:
        forget(self.source)
        cost = run_command(words, self.out, environment)
        if cost.exit_code:
            raise UserError(f"{name} ended with exit code {cost.exit_code}: {shlex.join(words)}\n{cost.errors[-2000:]}")
        return cost


def measure_pairs(bench: Bench, formats: Sequence[str], workers: Sequence[int]) -> list[dict[str, Any]]:
    """The tool and plain writing in turns, for every format and number of workers; and, once for Hugging Face output, whether the experts are right."""
    cases: list[dict[str, Any]] = [{"format": form, "workers": count, "runs": []} for form in formats for count in workers]
    for turn in range(bench.arguments.repetitions + 1):
        for case in cases[turn % len(cases) :] + cases[: turn % len(cases)]:  # no case always has the same neighbours
            run = measure_pair(bench, case, turn)
            name = f"{case['format']} with {case['workers']} workers, round {turn}{'' if turn else ' (not counted)'}"
            say(f"{name}: tool {run['tool_seconds']:.1f} s, plain {run['plain_seconds']:.1f} s, direct {run['direct_seconds'] or 0:.1f} s")
            if turn:
                case["runs"].append(run)
    for case in cases:
        del case["sizes"]
        case.update(summary(case["runs"]))
    return cases


def measure_pair(bench: Bench, case: dict[str, Any], turn: int) -> dict[str, Any]:
    """One run of the tool and one of plain writing, in an order that turns round with every round."""
    run: dict[str, Any] = {}
    steps = ["tool", "plain", "direct"] if turn % 2 == 0 else ["direct", "plain", "tool"]
    for step in steps:
        if step == "tool":
            cost = bench.tool(case["format"], case["workers"])
            case["sizes"] = file_sizes(bench.out)
            if turn == 0 and case["format"] == "hf" and bench.arguments.check:
                case["check"] = check_mixture(bench.source, bench.out, bench.shape, bench.arguments.num_experts)
            delete(bench.out)
            run.update(tool_seconds=cost.seconds + cost.sync_seconds, largest_bytes=cost.largest_bytes, tree_bytes=cost.tree_bytes)
            run.update(anonymous_bytes=cost.anonymous_bytes, sync_seconds=cost.sync_seconds, cpu_seconds=cost.cpu_seconds)
            run.update(engine_seconds=own_seconds(cost), bytes=sum(case["sizes"]))
        elif step == "plain":
            run["plain_seconds"] = bench.plain.write(case["sizes"])
        else:
            run["direct_seconds"] = bench.plain.write(case["sizes"], direct=True) if bench.arguments.direct else None
    return run


def own_seconds(cost: Cost) -> float | None:
    """The time the tool gives itself, without the start of Python, and what fsync took after it."""
    try:
        return float(json.loads(cost.output)["seconds"]) + cost.sync_seconds
    except (ValueError, KeyError, TypeError):
        return None


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spreads of runs; a ratio above 1 is faster than plain writing."""
    found: dict[str, Any] = {
        "bytes": runs[0]["bytes"],
        "tool_seconds": statistics.median(run["tool_seconds"] for run in runs),
        "plain_seconds": statistics.median(run["plain_seconds"] for run in runs),
        "ratio": spread([run["plain_seconds"] / run["tool_seconds"] for run in runs]),
        **{key: max(run[key] or 0 for run in runs) for key in ("largest_bytes", "tree_bytes", "anonymous_bytes")},
    }
    if runs[0]["direct_seconds"]:
        found["direct_seconds"] = statistics.median(run["direct_seconds"] for run in runs)
        found["ratio_direct"] = spread([run["direct_seconds"] / run["tool_seconds"] for run in runs])
    if all(run["engine_seconds"] for run in runs):
        found["engine_seconds"] = statistics.median(run["engine_seconds"] for run in runs)
        found["ratio_engine"] = spread([run["plain_seconds"] / run["engine_seconds"] for run in runs])
    return found


def measure_memory(bench: Bench, layers: Sequence[int], formats: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """Peak memory at several depths, one run each."""
    found = []
    for count in layers:
        source_bytes = bench.make_source(count)
        for form in formats:
            cost = bench.tool(form, workers)
            found.append({"layers": count, "format": form, "workers": workers, "source_bytes": source_bytes, "bytes": sum(file_sizes(bench.out)),
                          "largest_bytes": cost.largest_bytes, "tree_bytes": cost.tree_bytes, "anonymous_bytes": cost.anonymous_bytes})  # fmt: skip
            delete(bench.out)
            say(f"memory, {count} layers, {form}: {cost.tree_bytes / 2**30:.2f} GiB")
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to work: the disk that is measured (default: the temporary folder)")
    parser.add_argument("--tool", type=Path, default=ROOT / "tools" / "upcycle_dense.py", metavar="FILE", help="script to measure (default: this checkout's)")
    parser.add_argument("--tool-options", default="", metavar="WORDS", help="more options for it, in one string")
    parser.add_argument("--formats", default="mcore,hf", metavar="A,B", help="out of mcore, hf (default: both)")
    parser.add_argument("--workers", type=numbers, default=[1, 2], metavar="N,M", help="numbers of workers (default 1,2)")
    parser.add_argument("--repetitions", type=int, default=6, metavar="N", help="rounds that count, after one that does not (default 6: 3 in either order)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="default 2: about 12 GB a run")
    parser.add_argument("--num-experts", type=int, default=16, metavar="N", help="default 16")
    for name, value in (("hidden", 4608), ("ffn", 12288), ("heads", 36), ("vocab", 65519)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"of the dense model (default {value})")
    parser.add_argument("--memory-layers", type=numbers, default=[], metavar="N,M", help="also: peak memory at these depths, e.g. 2,4")
    parser.add_argument("--no-direct", dest="direct", action="store_false", help="leave out plain writing with O_DIRECT")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare the experts with the dense model")
    parser.add_argument("--mergekit", metavar="FILE", help="mergekit-moe of an environment that has it (default: the one on the path, or none)")
    parser.add_argument("--mergekit-options", action="append", metavar="WORDS", help=f"may be repeated; default: {MERGEKIT_OPTIONS}")
    parser.add_argument("--mergekit-repetitions", type=int, default=2, metavar="N", help="rounds that count, after one that does not (default 2)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.formats.split(",")) - {"mcore", "hf"}):
        parser.error(f"--formats {','.join(unknown)}: there is mcore, hf")
    if min(arguments.repetitions, arguments.layers, arguments.num_experts, arguments.mergekit_repetitions) < 1:
        parser.error("--repetitions, --layers, --num-experts and --mergekit-repetitions must be 1 or more")
    return arguments


def numbers(text: str) -> list[int]:
    """`1,2` as numbers above zero."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return found


def check_space(bench: Bench, layers: Sequence[int]) -> None:
    """Refuse before anything is written if the largest source and output do not fit."""
    deepest = replace(bench.shape, layers=max(layers))
    needed = deepest.num_bytes() + deepest.num_bytes(bench.arguments.num_experts) + MARGIN_BYTES
    free = shutil.disk_usage(bench.folder).free
    if needed > free:
        raise ConfigError(f"{bench.folder.parent}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free; give another --folder or fewer --layers")


def filesystem(folder: Path) -> str:
    """Type of the file system a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    return max(((point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)), key=lambda entry: len(entry[0]))[1]


def processor() -> str:
    """The processor's name; Linux does not tell it to `platform`."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def wrong_checks(result: dict[str, Any]) -> list[str]:
    """The outputs that do not hold the dense model's weights."""
    checks = {f"{case['format']} with {case['workers']} workers": case.get("check") for case in result["pairs"]}
    checks.update({f"mergekit {variant['options']}": variant["check"] for variant in result["mergekit"].get("variants", [])})
    return [name for name, check in checks.items() if check and not (0 < check["experts"] == check["experts_equal"] and check["others_equal"])]


def measure(bench: Bench) -> dict[str, Any]:
    """Everything."""
    arguments, formats = bench.arguments, bench.arguments.formats.split(",")
    check_space(bench, [arguments.layers, *arguments.memory_layers])
    command = find_mergekit(arguments.mergekit)
    if arguments.direct and not knows_direct(bench.folder):
        say("this file system does not take O_DIRECT; plain writing is measured through the page cache alone")
        arguments.direct = False
    source_bytes = bench.make_source(arguments.layers)
    start_seconds = statistics.median(bench.tool(formats[0], arguments.workers[0], "--dry-run").seconds for _ in range(3))
    pairs = measure_pairs(bench, formats, arguments.workers)
    mergekit = measure_mergekit(bench, command)
    memory = measure_memory(bench, arguments.memory_layers, formats, max(arguments.workers))
    return {
        "benchmark": "upcycle", "command": shlex.join(["python", *sys.argv]), "cores": os.cpu_count(), "cpu": processor(), "load": os.getloadavg(),
        "python": platform.python_version(), "filesystem": filesystem(bench.folder), "model": described(bench.shape), "num_experts": arguments.num_experts,
        "repetitions": arguments.repetitions, "source_bytes": source_bytes, "start_seconds": start_seconds, "pairs": pairs, "memory": memory,
        "mergekit": mergekit,
    }  # fmt: skip


def main() -> int:
    arguments = parse()
    try:
        if arguments.folder is not None:
            arguments.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="upcycle-benchmark-", dir=arguments.folder) as name:
            result = measure(Bench(arguments, Path(name)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or arguments.folder}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if arguments.json else "\n".join(table(result)))
    if wrong := wrong_checks(result):
        print(f"error: not the dense model's weights: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
