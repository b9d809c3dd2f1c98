"""Checks nodes before a job starts on them: GPUs, free memory and disk, versions, clocks, and an all-reduce that must be right and is timed.

    python tools/preflight.py here --config configs/X.yaml        this machine alone, with the ranks it would train with

Under SLURM `launch/slurm_job.sh` runs the other commands: `node` and `reduce` on every node, and `next` in between, which reads what they have reported, names
bad nodes and says what to do: `run NAME NODES` (an all-reduce over these nodes; several lines run at the same time), `use NODES`, or nothing with exit code 1.
Limits are the settings of launch.preflight. Exit codes: 0 fine, 1 a node is at fault, 2 a setting is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.cli import report_error  # noqa: E402
from megatron_skywork.config.load import load_config  # noqa: E402
from megatron_skywork.config.schema import Config  # noqa: E402
from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, UserError  # noqa: E402
from preflight_node import check_node, reduce_with  # noqa: E402
from preflight_verdict import Round, next_step  # noqa: E402


def node_name(given: str | None) -> str:
    """This node's name in SLURM, or the machine's."""
    return given or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def leave(out: Path, name: str, report: dict[str, Any]) -> None:
    """Write a report so that a reader sees all of it or nothing."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{name}.json.tmp"
    temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.replace(temporary, out / f"{name}.json")


def reports_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Node -> its report."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")}


def rounds_in(out: Path) -> list[Round]:
    """The all-reduces that were announced, in order; a node that left no report gave no answer."""
    found = []
    for plan in sorted(out.glob("*.plan"), key=lambda path: int(path.stem.split("-")[1])):
        found.append(Round(plan.stem.split("-")[0], tuple(plan.read_text(encoding="utf-8").split()), reports_in(out / plan.stem)))
    return found


def here(config: Config, args: argparse.Namespace) -> int:
    name = node_name(args.name)
    report = check_node(config, name)
    ranks = reduce_with(config, name, [name], f"127.0.0.1:{args.port}")
    problems = report["problems"] + ranks["problems"] + ranks["link_problems"]
    if args.json:
        print(json.dumps({**report, **ranks, "problems": problems}))
    else:
        print("\n".join([summary(report, ranks), *(f"  {name}: {one}" for one in problems)]))
    return EXIT_OTHER if problems else EXIT_DONE


def node(config: Config, args: argparse.Namespace) -> int:
    name = node_name(args.name)
    leave(args.out / "node", name, check_node(config, name))
    return EXIT_DONE


def reduce(config: Config, args: argparse.Namespace) -> int:
    name = node_name(args.name)
    leave(args.out / args.round, name, reduce_with(config, name, args.nodes.split(","), args.meet))
    return EXIT_DONE


def decide(config: Config, args: argparse.Namespace) -> int:
    checks, rounds = reports_in(args.out / "node"), rounds_in(args.out)
    step = next_step(args.nodes.split(","), args.want, checks, rounds)
    if step.word == "run":
        for number, group in enumerate(step.groups, start=len(rounds)):
            name = f"{step.kind}-{number}"
            (args.out / f"{name}.plan").write_text(" ".join(group), encoding="utf-8")
            print("run", name, ",".join(group))
        return EXIT_DONE
    for name, problems in step.bad.items():
        print(f"preflight: node {name} is left out: {'; '.join(problems)}", file=sys.stderr)
    if step.word == "use":
        for name in step.groups[0]:
            print(f"preflight: {summary(checks[name], rounds[-1].reports[name])}", file=sys.stderr)
        print("use", ",".join(step.groups[0]))
        return EXIT_DONE
    advice = f"Ask for other nodes: launch.sbatch.exclude={','.join(step.bad)}, or for spare ones: launch.spare_nodes" if step.bad else "Look at the reports"
    print(f"error: preflight: {step.why}. {advice}; the reports are in {args.out}", file=sys.stderr)
    return EXIT_OTHER


def summary(report: dict[str, Any], ranks: dict[str, Any]) -> str:
    """One line of a node that is fine."""
    gpus = f"{len(report['gpus'])} x {report['gpus'][0]}, {report['free_gpu_memory_gib']:.0f} GiB free" if report["gpus"] else "no GPU"
    parts = [f"{report['node']}: {gpus}", f"{report['free_memory_gib']:.1f} GiB of memory and {report['free_disk_gib']:.1f} GiB of disk free"]
    if ranks["gb_per_second"] is not None:
        inside = f" ({ranks['node_gb_per_second']:.2f} inside the node)" if ranks["node_gb_per_second"] is not None else ""
        parts.append(f"all-reduce right, {ranks['gb_per_second']:.2f} GB/s{inside}")
    if ranks["clock_offset_seconds"] is not None:
        parts.append(f"clock {ranks['clock_offset_seconds'] * 1000:+.0f} ms")
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_all: tuple[tuple[str, Any, str], ...] = (
        ("here", here, "check this machine alone"), ("node", node, "check this node and leave a report"),
        ("reduce", reduce, "run this node's ranks of an all-reduce and leave a report"), ("next", decide, "say what to do next"))
    for name, run, sentence in of_all:
        command = commands.add_parser(name, help=sentence)
        command.set_defaults(run=run)
        command.add_argument("--config", action="append", required=True, metavar="FILE", help="as for launch/pretrain_moe.py")
        command.add_argument("overrides", nargs="*", metavar="section.field=value")
        if name != "next":
            command.add_argument("--name", help="this node's name (default: as SLURM or the machine says)")
        if name == "here":
            command.add_argument("--port", type=int, default=29511, help="port its ranks meet at (default 29511)")
            command.add_argument("--json", action="store_true", help="print the report as JSON")
        else:
            command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the reports, seen by all nodes")
        if name in ("reduce", "next"):
            command.add_argument("--nodes", required=True, metavar="N1,N2", help="the nodes of the all-reduce, or of the job")
        if name == "reduce":
            command.add_argument("--round", required=True, metavar="NAME", help="the name `next` gave it")
            command.add_argument("--meet", required=True, metavar="HOST:PORT", help="where its ranks meet, on the first node")
        if name == "next":
            command.add_argument("--want", type=int, required=True, metavar="N", help="nodes that are needed")
    args, rest = parser.parse_known_args(argv)
    if wrong := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    try:
        return args.run(load_config(args.config, [*args.overrides, *rest]), args)
    except UserError as error:
        report_error(error, {})
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
