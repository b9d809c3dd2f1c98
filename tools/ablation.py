"""The routing ablation: one small mixture of experts from scratch on real text, without gate-logit normalization and with lambda 0.5, 1 and 2, and with
fixed and adaptive auxiliary-loss coefficients; several seeds. `make ablation` calls this.

It trains two runs at a time on two cores (about an hour), one per GPU where there are any. A second call goes on where the first one was stopped.

  python tools/ablation.py --dry-run                          what would be trained, and for how long
  python tools/ablation.py                                    everything, into runs/ablation
  python tools/ablation.py --only lambda_1 no_norm --seeds 1  two runs
  python tools/ablation.py --plots docs                       draw the results beside the report's curves, and train nothing
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

import megatron_skywork  # noqa: E402
from ablation_plan import CONFIGS, DEFAULT_OUT, ROOT, VARIANTS, Choice, Plan, make_plan  # noqa: E402
from ablation_plots import write_plots  # noqa: E402
from ablation_results import collect, markdown  # noqa: E402
from ablation_runner import Interrupted, Outcome, Scheduler, cpu_environment, describe_runs, gpu_environment, write_json  # noqa: E402
from demo import count_gpus  # noqa: E402
from megatron_skywork.cli import show  # noqa: E402
from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, EXIT_REQUEUE, DataError, UserError  # noqa: E402
from megatron_skywork.metrics import wording  # noqa: E402
from stage_runner import Command, Runner, Stage, environment  # noqa: E402

# Measured with base.yaml on two cores of an AMD EPYC with nothing else to do: a step, and what a run needs besides (imports, evaluations, saves).
SECONDS_PER_STEP, SECONDS_PER_RUN = 0.32, 35.0
BYTES_PER_JOB = 3 << 29  # 1.5 GiB, measured 0.9
EXIT_CODES = "Exit codes: 0 done, 1 a run failed, 2 a setting is wrong, 3 data was refused, 75 stopped (the same command goes on)."


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their settings, estimate the time, train nothing")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", default=list(VARIANTS), help=f"these variants: {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=seeds, default=(1, 2, 3), metavar="1,2,3", help="seeds of weights and data order, for all variants (default 1,2,3)")
    parser.add_argument("--steps", type=positive, metavar="N", help=f"optimizer steps of every run (default: {CONFIGS}/base.yaml)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs at a time (default: one per GPU, or per core)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="settings", help="a setting of all runs; may be repeated")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"folder of data, runs and results (default {DEFAULT_OUT})")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="train nothing: draw results.json of --out beside the report's curves, as ablation_*.png")
    parser.add_argument("--json", action="store_true", help="print the results (with --dry-run: the plan) as JSON on stdout; progress goes to stderr anyway")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0")
    return int(text)


def seeds(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text}: whole numbers with commas between them, each once")
    return tuple(map(int, words))


def default_jobs(gpus: int, runs: int) -> int:
    """Runs at a time: one per GPU; on CPU one per core, as long as memory lasts."""
    return max(1, min(runs, gpus or min(cores(), psutil.virtual_memory().available // BYTES_PER_JOB)))


def cores() -> int:
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


def estimate_seconds(plan: Plan, jobs: int) -> float:
    """Time for what is not done, from the figures measured on two cores."""
    seconds = sorted((run.config.train.steps * SECONDS_PER_STEP + SECONDS_PER_RUN for run in plan.runs if run.status() != "done"), reverse=True)
    lanes = [0.0] * jobs
    for one in seconds:
        lanes[lanes.index(min(lanes))] += one
    return max(lanes)


def show_plan(plan: Plan, jobs: int, gpus: int, as_json: bool) -> None:
    """Print the runs and what they will take."""
    runs = describe_runs(plan.runs)
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"{cores()} CPU core{'s' if cores() > 1 else ''}"
    estimate = None if gpus else estimate_seconds(plan, jobs)
    if as_json:
        show(json.dumps({"device": where, "jobs": jobs, "estimated_seconds": estimate, "trained_as": plan.trained_as, "runs": runs}, indent=1))
        return
    lines = [f"{len(runs)} runs, {jobs} at a time on {where}; folder {plan.out}"]
    for run in runs:
        lines.append(f"  {run['variant']:11} seed {run['seed']:<5} {run['steps']:>6,} steps  {run['tokens'] / 1e6:6.2f} M tokens  {run['status']}")
    for variant, trained in plan.trained_as.items():
        if variant != trained:
            lines.append(f"  {variant} has the settings of {trained}, and is the same run")
    total = f"in all {sum(run['tokens'] for run in runs) / 1e6:.1f} M tokens"
    if estimate is not None:
        total += f"; about {wording.duration(estimate)}, if a step takes {SECONDS_PER_STEP} s, as it did on two cores of an AMD EPYC"
    show("\n".join([*lines, total, "the first one's command:", f"  {runs[0]['command']}"]))


def preparation(out: Path, vocab_size: int) -> list[Stage]:
    """Documents, a tokenizer trained on them, and the datasets."""
    documents, tokenizer = out / "documents", out / "tokenizer"
    train, valid = documents / "train.jsonl", documents / "valid.jsonl"
    words = ["python", "tools/train_tokenizer.py", "--input", str(train), "--vocab-size", str(vocab_size), "--out", str(tokenizer)]
    tokenize = ["python", "tools/preprocess_data.py", "--tokenizer", str(tokenizer), "--overwrite"]
    tokenizing = [Command([*tokenize, "--input", str(path), "--output", str(out / "data" / path.stem)]) for path in (train, valid)]
    made = [out / f"data/{side}.{kind}" for side in ("train", "valid") for kind in ("bin", "idx", "json")]
    write = Command(["python", "tools/demo_text.py", "--out", str(documents)])
    return [
        Stage("documents", "write documents from the standard library", [write], reads=[Path("tools/demo_text.py")], makes=[train, valid]),
        Stage("tokenizer", f"train a tokenizer of {vocab_size:,} entries", [Command(words)], reads=[Path(words[1])], makes=[tokenizer / "tokenizer.json"]),
        Stage("tokenize", "turn them into indexed datasets", tokenizing, makes=made, finding=lambda: tokens_found(out)),
    ]


def tokens_found(out: Path) -> str:
    counts = {side: json.loads((ROOT / out / f"data/{side}.json").read_text(encoding="utf-8"))["num_tokens"] for side in ("train", "valid")}
    return f"{counts['train']:,} tokens, {counts['valid']:,} held out"


def prepare(plan: Plan) -> None:
    """Make the data, once. Its lines go to stderr, where all progress goes."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        runner = Runner(ROOT / plan.out, ROOT, environment(1), seed=f"{megatron_skywork.__version__} {sys.version.split()[0]}")
        runner.run_all(preparation(plan.out, plan.runs[0].config.model.vocab_size))
    finally:
        sys.stdout = stdout


def train(plan: Plan, jobs: int, gpus: int) -> Outcome:
    threads = max(1, cores() // jobs)
    of_slot: Callable[[int], dict[str, str]] = gpu_environment if gpus else lambda slot: cpu_environment(threads)
    return Scheduler(jobs, of_slot, ROOT / plan.out / "logs").train(plan.runs)


def write_results(plan: Plan) -> dict[str, Any]:
    """results.json, results.md, and a page per comparison; the report draws a variant's seeds as one line with a band.

    Raises:
        DataError: no run is finished.
    """
    results = collect(plan)
    if not results["runs"]:
        raise DataError(f"{plan.out}: no run is finished, so there are no results")
    write_json(ROOT / plan.out / "results.json", results)
    (ROOT / plan.out / "results.md").write_text(markdown(results), encoding="utf-8")
    from megatron_skywork.report.build import build_report

    for group in plan.groups():
        trained = [plan.trained_as[variant] for variant in group.variants]
        finished = [run.folder for variant in trained for run in plan.runs if run.variant == variant and run.status() == "done"]
        if len(finished) > 1:
            build_report(finished, ROOT / plan.out / f"{group.key}.html")
    return results


def read_results(out: Path) -> dict[str, Any]:
    """What an earlier call wrote.

    Raises:
        DataError: nothing did.
    """
    path = ROOT / out / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no results of an ablation; run it first, or name its folder with --out") from error


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    started = time.monotonic()
    try:
        if args.plots is not None:
            for path in write_plots(read_results(args.out), args.plots):
                print(path)
            return EXIT_DONE
        gpus = count_gpus()
        plan = make_plan(Choice(args.out, tuple(dict.fromkeys(args.only)), args.seeds, args.steps, tuple(args.settings), on_gpu=gpus > 0))
        jobs = args.jobs or default_jobs(gpus, len(plan.runs))
        if args.dry_run:
            show_plan(plan, jobs, gpus, args.json)
            return EXIT_DONE
        prepare(plan)
        outcome = train(plan, jobs, gpus)
        for name, reason in outcome.failed.items():
            print(f"FAILED: {name}: {reason}", file=sys.stderr)
        if outcome.failed and not outcome.done:
            return EXIT_OTHER
        results = write_results(plan)
    except Interrupted:
        print(f"stopped; the same command goes on: {shlex.join(['python', *sys.argv])}", file=sys.stderr)
        return EXIT_REQUEUE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(json.dumps(results, indent=1) if args.json else markdown(results))
    written = ["results.md", "results.json", *(f"{group.key}.html" for group in plan.groups())]
    print(f"{', '.join(str(plan.out / name) for name in written)}   ({wording.duration(time.monotonic() - started)})", file=sys.stderr)
    return EXIT_OTHER if outcome.failed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
