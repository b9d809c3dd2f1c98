"""The command line of `launch/pretrain_moe.py`: settings in, a run or a plan out.

Nothing here imports torch before the configuration is known to be right: a mistake, `--help` and `--dry-run` are answered at once. What reads settings is
imported late too, so that a signal is heard from the first moment on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_skywork.errors import EXIT_DONE, ConfigError, UserError
from megatron_skywork.train import status
from megatron_skywork.train.signals import hold, release

USAGE = """\
Examples:
  torchrun --nproc-per-node 8 launch/pretrain_moe.py --config configs/tiny.yaml parallel.ep=8 optim.lr=3e-4
  python launch/pretrain_moe.py --config configs/skywork_moe_146b.yaml --dry-run --world-size 1536
  python launch/pretrain_moe.py --config configs/skywork_moe_146b.yaml --dry-run --cluster configs/clusters/a800_192x8.yaml

Several --config files are merged in order, later ones win field by field. An override section.field=value sets exactly what it names; the value is
YAML, so lists and mappings work too: 'parallel.layers_per_stage=[3, 5]'. Exit codes: 0 done, 2 a setting is wrong, 3 a file was refused, 1 anything else,
75 stopped on purpose and to be started again.

Settings (name, type, default):
"""


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument as a wrong setting is answered: once, not by every rank."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (settings are written section.field=value; --help lists all)")


def build_parser() -> Parser:
    """The arguments; settings themselves are overrides, not arguments."""
    parser = Parser(
        prog="pretrain_moe.py", description="Train a dense or mixture-of-experts language model with megatron-core.", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file with settings; may be given several times")
    parser.add_argument("--dry-run", action="store_true", help="check the settings, print the plan (parameters, FLOPs, groups) and exit; needs no GPU")
    parser.add_argument("--world-size", type=int, metavar="W", help="number of ranks the dry run is for (default: the cluster's GPUs, WORLD_SIZE, or 1)")
    parser.add_argument(
        "--cluster", metavar="FILE", help="with --dry-run: the machine it is for, which gives the speed and whether it fits (configs/clusters)")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print the plan as JSON")
    parser.add_argument(
        "--check-replicas", type=int, metavar="N", help="every N steps compare the copies of parameters on several ranks (the setting train.check_replicas)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that win over the files")
    return parser


def world_size_from(given: int | None, environment: Mapping[str, str], dry_run: bool) -> int:
    """Number of ranks, from --world-size or from what torchrun says.

    Raises:
        ConfigError: for a number that makes no sense, or one that is not the number of ranks that were started.
    """
    text = environment.get("WORLD_SIZE", "1")
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text} (environment): this must be a whole number above 0; torchrun sets it")
    if given is not None and given < 1:
        raise ConfigError(f"--world-size {given}: use 1 or more ranks")
    if given is not None and not dry_run and given != int(text):
        raise ConfigError(f"--world-size {given} is not the number of ranks that were started, {text}; it is for --dry-run (torchrun starts the ranks)")
    return int(text) if given is None else given


def report_error(error: UserError, environment: Mapping[str, str]) -> None:
    """Prints a user's error to stderr. A wrong configuration is the same on every rank, so rank 0 alone says it."""
    rank = environment.get("RANK", "0")
    if isinstance(error, ConfigError):
        if rank == "0":
            count = len(error.problems)
            print(f"configuration error: {count} problem{'s' if count != 1 else ''}", file=sys.stderr)
            for problem in error.problems:
                print(f"  - {problem}", file=sys.stderr)
        return
    print(f"{f'[rank {rank}] ' if rank != '0' else ''}error: {error}", file=sys.stderr)


def show(text: str) -> None:
    """Prints a long text; a reader that closes the pipe early (`| head`) is no mistake."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains again when it closes stdout


def pretrain(arguments: Sequence[str]) -> NoReturn:
    """Runs the command line and exits.

    Args:
        arguments: without the program's name.
    """
    hold()
    try:
        sys.exit(status.exit_code(_answer(arguments)))
    except UserError as error:
        report_error(error, os.environ)
        sys.exit(error.exit_code)
    finally:
        release()


def _answer(arguments: Sequence[str]) -> int:
    from megatron_skywork.config.load import load_config, stated_run_dir
    from megatron_skywork.config.manual import manual_text
    from megatron_skywork.plan.describe import describe, plan_text
    from megatron_skywork.plan.hardware import load_cluster, node_size

    parser = build_parser()
    if "-h" in arguments or "--help" in arguments:
        show(parser.format_help() + "\n" + USAGE + manual_text())
        return EXIT_DONE
    options = parser.parse_intermixed_args(list(arguments))
    if options.json and not options.dry_run:
        parser.error("--json goes with --dry-run")
    if options.cluster is not None and not options.dry_run:
        parser.error("--cluster goes with --dry-run")
    cluster = None if options.cluster is None else load_cluster(options.cluster)
    world_size = world_size_from(cluster.world_size if cluster and options.world_size is None else options.world_size, os.environ, options.dry_run)
    overrides = [*options.overrides, *([] if options.check_replicas is None else [f"train.check_replicas={options.check_replicas}"])]
    if cluster is not None:
        overrides.append(node_size(cluster, overrides))
    try:
        config = load_config(options.config, overrides, world_size)
    except ConfigError as error:
        if not options.dry_run and os.environ.get("RANK", "0") == "0":
            status.refuse(stated_run_dir(options.config, overrides), error)
        raise
    if options.dry_run:
        show(json.dumps(describe(config, world_size, cluster), indent=1) if options.json else plan_text(config, world_size, cluster))
        return EXIT_DONE
    ended = status.ended_for_good(Path(config.run_dir))
    if ended is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"not tried again: the attempt before this one ended for good, exit code {ended[0]}: {ended[1]}", file=sys.stderr)
        return ended[0]
    from megatron_skywork.train.run import run_training  # imports torch, so only now

    return run_training(config)
