"""Submits a run to SLURM after checking it, so that a wrong setting is answered here and not by a job that waited a day in the queue.

    python tools/submit.py --config configs/X.yaml --config configs/clusters/mine.yaml --nodes 16 [section.field=value ...]

What SLURM is asked for stands in the section `launch` (launch/pretrain_moe.py --help): options of sbatch, spare nodes, the grace ahead of the time limit, a
container. --dry-run prints the plan's key figures and the command, and submits nothing. All nodes must see the project's folder.
Exit codes: 0 done, 2 a setting is wrong (in the trainer's own words), 1 sbatch refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from megatron_skywork.cli import report_error  # noqa: E402
from megatron_skywork.config.load import load_config  # noqa: E402
from megatron_skywork.config.schema import Config  # noqa: E402
from megatron_skywork.errors import EXIT_DONE, ConfigError, TrainingError, UserError  # noqa: E402
from megatron_skywork.plan.describe import billions, describe  # noqa: E402
from slurm_job import checked_config  # noqa: E402


def sbatch_command(config: Config, num_nodes: int, paths: list[str], overrides: list[str]) -> list[str]:
    """The command for a job with `num_nodes` nodes that train, and the spare ones."""
    launch = config.launch
    command = ["sbatch", "--parsable", f"--nodes={num_nodes + launch.spare_nodes}", f"--signal=USR2@{launch.grace_seconds}"]
    if "job-name" not in launch.sbatch:
        command.append(f"--job-name={Path(config.run_dir).name}")
    if launch.request_gpus:
        command.append(f"--gpus-per-node={config.parallel.gpus_per_node}")
    for name, value in launch.sbatch.items():
        if value is not False:
            command.append(f"--{name}" if value is True else f"--{name}={value}")
    script = "launch/pretrain_moe.sbatch" if launch.container.image is None else "launch/pretrain_moe_container.sbatch"
    return [*command, script, *paths, *overrides]


def container_environment(config: Config) -> dict[str, str]:
    """What launch/pretrain_moe_container.sbatch must know before anything can read YAML."""
    container = config.launch.container
    if container.image is None:
        return {}
    return {"CONTAINER_IMAGE": container.image, "CONTAINER_MOUNTS": ",".join(container.mounts), "CONTAINER_RUNTIME": container.runtime}


def plan(config: Config, num_nodes: int, paths: list[str], overrides: list[str]) -> dict[str, Any]:
    """What will be submitted, and how large it is."""
    world_size = num_nodes * config.parallel.gpus_per_node
    whole = describe(config, world_size)
    return {
        "run_dir": config.run_dir,
        "nodes": num_nodes,
        "spare_nodes": config.launch.spare_nodes,
        "world_size": world_size,
        "layout": whole["layout"],
        "parameters": whole["parameters"]["total"],
        "most_parameters_of_a_rank": max(stage["parameters_per_rank"] for stage in whole["stages"]),
        "tokens_per_step": whole["batch"]["tokens_per_step"],
        "notes": whole["notes"],
        "environment": container_environment(config),
        "command": sbatch_command(config, num_nodes, paths, overrides),
    }


def shown(planned: dict[str, Any]) -> str:
    """The plan as text; the last line can be typed."""
    layout = ", ".join(f"{name} {value}" for name, value in planned["layout"].items())
    spare = f" and {planned['spare_nodes']} spare" if planned["spare_nodes"] else ""
    lines = [
        f"run      {planned['run_dir']}: {planned['world_size']} ranks on {planned['nodes']} nodes{spare}",
        f"layout   {layout}",
        f"model    {billions(planned['parameters'])} parameters, at most {billions(planned['most_parameters_of_a_rank'])} on a rank; "
        f"{planned['tokens_per_step']:,} tokens per step",
        *(f"note     {note}" for note in planned["notes"]),
    ]
    return "\n".join([*lines, shlex.join([*(f"{name}={value}" for name, value in planned["environment"].items()), *planned["command"]])])


def submit(planned: dict[str, Any]) -> str:
    """Hand it to sbatch; returns the job's number.

    Raises:
        TrainingError: there is no sbatch, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise TrainingError("there is no sbatch on this machine; submit on a login node, or look at the command with --dry-run")
    answer = subprocess.run(planned["command"], cwd=ROOT, env={**os.environ, **planned["environment"]}, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise TrainingError(f"sbatch refused: {answer.stderr.strip() or answer.stdout.strip()}; the command was {shlex.join(planned['command'])}")
    return answer.stdout.strip().split(";")[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file with settings; may be given several times")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes that train (default: launch.nodes); launch.spare_nodes come on top")
    parser.add_argument("--dry-run", action="store_true", help="check and print, submit nothing")
    parser.add_argument("--json", action="store_true", help="print the plan, and the job's number, as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that win over the files")
    args = parser.parse_intermixed_args(argv)
    try:
        num_nodes = args.nodes or load_config(args.config, args.overrides).launch.nodes
        if num_nodes is None or num_nodes < 1:
            raise ConfigError("launch.nodes is not set; say how many nodes train: --nodes N, 1 or more")
        spare = load_config(args.config, args.overrides).launch.spare_nodes
        config = checked_config(args.config, args.overrides, num_nodes + spare)
        # The job starts in the project's folder, wherever this was typed.
        paths = [os.path.relpath(path, ROOT) if Path(path).resolve().is_relative_to(ROOT) else str(Path(path).resolve()) for path in args.config]
        planned = plan(config, num_nodes, paths, args.overrides)
        if not args.dry_run:
            planned["job"] = submit(planned)
    except UserError as error:
        report_error(error, {})
        return error.exit_code
    if args.json:
        print(json.dumps(planned))
    else:
        print(shown(planned) + (f"\njob {planned['job']}" if "job" in planned else ""))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
