"""What a SLURM job decides in Python: which settings it runs with, whether it may start once more, and what comes after a start that ended.

`launch/slurm_job.sh` asks; this answers in words a shell reads. torchrun does not say how a run ended, so the run itself is asked: `run_status.json` says
how, and the newest complete checkpoint how far it came. A job may start as often as it likes as long as that checkpoint moves; starts that leave it where it
was are counted, and too many of them end the job.

    settings   checks the settings for the job's nodes and prints them as shell assignments; a wrong one is answered as the trainer does, with exit code 2
    begin      notes a start in RUN_DIR/slurm/JOB/starts.jsonl; exit code 1 when launch.max_stalled_starts starts have led nowhere
    next       prints what follows: `end CODE`, `again` (here and now) or `requeue`
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.cli import report_error  # noqa: E402
from megatron_skywork.config.load import load_config  # noqa: E402
from megatron_skywork.config.schema import Config  # noqa: E402
from megatron_skywork.convert.files.marker import is_complete  # noqa: E402
from megatron_skywork.errors import EXIT_CONFIG, EXIT_DONE, EXIT_OTHER, EXIT_REFUSED, EXIT_REQUEUE, ConfigError, UserError  # noqa: E402
from megatron_skywork.train import run_lock  # noqa: E402


def shell_settings(config: Config, num_nodes: int) -> dict[str, Any]:
    """What the scripts need to know, by the names of their variables."""
    launch = config.launch
    return {
        "run_dir": config.run_dir,
        "num_nodes": num_nodes - launch.spare_nodes,
        "ranks_per_node": config.parallel.gpus_per_node,
        "grace_seconds": launch.grace_seconds,
        "preflight": launch.preflight.enabled,
        "preflight_seconds": launch.preflight.timeout_seconds,
    }


def checked_config(paths: list[str], overrides: list[str], num_nodes: int) -> Config:
    """The configuration for a job of so many nodes, spares among them.

    Raises:
        ConfigError: as the trainer raises it, or for too few nodes.
    """
    config = load_config(paths, overrides)
    training = num_nodes - config.launch.spare_nodes
    if training < 1:
        raise ConfigError(f"launch.spare_nodes={config.launch.spare_nodes}: the job has {num_nodes} nodes, so none is left to train; ask for more nodes")
    return load_config(paths, overrides, training * config.parallel.gpus_per_node)


# ----------------------------------------------------------------------------------------------------------------------- how far, and how


def saved_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    folders = [folder for folder in (run_dir / "checkpoints").glob("step_*") if folder.name[5:].isdigit() and is_complete(folder)]
    return max((int(folder.name[5:]) for folder in folders), default=0)


def status_text(run_dir: Path) -> str:
    """`run_status.json` as it is, or ''."""
    try:
        return (run_dir / "run_status.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """The starts of a job so far, oldest first; a line that was cut off by a crash is left out."""
    path = folder / "starts.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def stalled_starts(starts: list[dict[str, Any]], step: int) -> int:
    """How many of the last starts began at this step, so that they led nowhere."""
    count = 0
    for start in reversed(starts):
        if start["step"] != step:
            break
        count += 1
    return count


def other_holder(run_dir: Path, job: str) -> str | None:
    """Who holds the run's folder, if it is a live run of another job (train/run_lock.py). That run's status must not be taken for ours."""
    path = run_dir / run_lock.FILE_NAME
    try:
        owner, age_seconds = json.loads(path.read_text(encoding="utf-8")), time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    return None if owner.get("job") == job or age_seconds > run_lock.STALE_SECONDS else f"process {owner.get('process')} on host {owner.get('host')}"


@dataclass(frozen=True)
class Answer:
    """What follows, and why in a sentence."""

    word: str
    why: str
    code: int = EXIT_DONE

    def __str__(self) -> str:
        return f"end {self.code}" if self.word == "end" else self.word


def what_follows(status: dict[str, Any], job_state: str, told_to_stop: bool, stalled: int, limit: int, step: int) -> Answer:
    """What a job does after its ranks have ended.

    Args:
        status: what run_status.json says since the start began; empty if it says nothing new.
        job_state: SLURM's; only a job that counts as running may go on.
        told_to_stop: the batch script was signalled: this allocation is about to end.
        stalled: starts in a row, this one among them, that left the last saved step where it was.
        limit: so many are too many.
        step: the run's last saved step.
    """
    state, code = status.get("status"), status.get("exit_code")
    said = f"the run's status is {state or 'not written'}{'' if code is None else f', exit code {code}'}"
    if status.get("reason"):
        said += f" ({status['reason']})"
    if state == "done" or (state == "stopped" and code == EXIT_DONE):
        return Answer("end", f"{said}: nothing is left to do")
    if code in (EXIT_CONFIG, EXIT_REFUSED):
        return Answer("end", f"{said}: another start would be refused as well", code)
    if job_state != "RUNNING":
        return Answer("end", f"{said}; the job is {job_state}, so it does not go on by itself", EXIT_DONE if code == EXIT_REQUEUE else EXIT_OTHER)
    if stalled >= limit:
        return Answer("end", stalled_sentence(stalled, step) + f" At last {said}.", EXIT_OTHER)
    if code == EXIT_REQUEUE or told_to_stop:
        return Answer("requeue", f"{said}; last saved step {step}")
    return Answer("again", f"{said}; last saved step {step}")


def stalled_sentence(stalled: int, step: int) -> str:
    """Why a job that leads nowhere ends, and what to do."""
    return (
        f"{stalled} start{'' if stalled == 1 else 's'} in a row left the run's last saved step at {step}; the job ends (launch.max_stalled_starts). "
        "Look at the nodes' logs; save more often (checkpoint.every) if the time was too short."
    )


# ------------------------------------------------------------------------------------------------------------------------------- commands


def settings(args: argparse.Namespace) -> int:
    config = checked_config(args.config, args.overrides, args.num_nodes)
    for name, value in shell_settings(config, args.num_nodes).items():
        print(f"{name}={shlex.quote(str(value))}")
    for name, value in config.launch.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    return EXIT_DONE


def begin(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    run_dir = Path(config.run_dir)
    step, starts = saved_step(run_dir), starts_of(args.logs)
    stalled = stalled_starts(starts, step)
    if stalled >= config.launch.max_stalled_starts:
        print(f"error: {stalled_sentence(stalled, step)}", file=sys.stderr)
        return EXIT_OTHER
    path = args.logs / "starts.jsonl"
    is_torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a crash; the next start must not be lost with it
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_torn + json.dumps({"start": len(starts) + 1, "step": step, "time": time.time(), "status_before": status_text(run_dir)}) + "\n")
    print(len(starts) + 1)
    return EXIT_DONE


def follow(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    run_dir = Path(config.run_dir)
    starts, text, step = starts_of(args.logs), status_text(run_dir), saved_step(run_dir)
    # What was said before this start does not count: ranks that fail at once must not send the job round in circles.
    status = json.loads(text) if text and text != starts[-1]["status_before"] else {}
    stalled, limit = stalled_starts(starts, step), config.launch.max_stalled_starts
    answer = what_follows(status, args.job_state, args.told_to_stop, stalled, limit, step)
    if holder := other_holder(run_dir, args.logs.name):
        answer = Answer("end", f"{run_dir} is in use by {holder}: another start would be refused as well", EXIT_REFUSED)
    print(f"{'error: ' if answer.code else ''}{answer.why}", file=sys.stderr)
    print(answer)
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, sentence in (("settings", settings, "check and print the settings"), ("begin", begin, "note a start"), ("next", follow, "say what follows")):
        command = commands.add_parser(name, help=sentence)
        command.set_defaults(run=run)
        command.add_argument("--config", action="append", required=True, metavar="FILE", help="as for launch/pretrain_moe.py")
        command.add_argument("overrides", nargs="*", metavar="section.field=value")
        if name == "settings":
            command.add_argument("--num-nodes", type=int, required=True, metavar="N", help="nodes of the job, spares among them")
        else:
            command.add_argument("--logs", type=Path, required=True, metavar="DIR", help="the job's folder, RUN_DIR/slurm/JOB")
        if name == "next":
            command.add_argument("--job-state", required=True, help="JobState of scontrol show job")
            command.add_argument("--told-to-stop", action="store_true", help="the batch script got a signal")
    args = parse(parser, argv)
    try:
        return args.run(args)
    except UserError as error:
        report_error(error, {})
        return error.exit_code


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Overrides may stand between options, as in the trainer's command line; subcommands take that apart by themselves."""
    args, rest = parser.parse_known_args(argv)
    if wrong := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    args.overrides = [*args.overrides, *rest]
    return args


if __name__ == "__main__":
    sys.exit(main())
