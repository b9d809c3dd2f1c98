"""The whole way in one command: dense model -> mixture of experts -> training -> stop -> resume -> evaluation -> export -> a sentence -> a report.

Every stage is a few of the project's ordinary commands, each of which a user can type; the logs show them. A second call reuses finished stages.
`make demo` calls this. It leaves runs/demo/summary.json and runs/demo/report.html.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import yaml

import megatron_skywork
from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, CheckpointError, UserError
from stage_runner import Command, Runner, Stage, StageFailed, environment

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/demo.yaml")
NUM_EXPERTS, TOPK = 4, 2
# Where the run stops first, and where the resumed and the uninterrupted run are compared.
STOP_STEP, COMPARE_STEP = 4, 8
LARGEST_LOGIT_DIFFERENCE = 1e-4
PROMPT = "The Python standard library is"
BYTES_PER_PARAMETER = 32  # both ranks together, measured: weight, gradient, master weight, two moments, what a save adds, activations
GIB = 1 << 30


class TooSmall(UserError):
    """This machine lacks the memory or disk space the demo needs."""

    exit_code = 3


@dataclass(frozen=True)
class Plan:
    """What this call of the demo works on.

    Attributes:
        out: folder of everything the demo writes.
        dense: Hugging Face folder of the dense model.
        own_dense: whether it is the user's.
        data: the user's documents (a pattern), or None for the standard library's.
        cache: where the downloaded package is kept.
        num_processes: ranks of the training.
    """

    out: Path
    dense: Path
    own_dense: bool
    data: str | None
    cache: Path
    num_processes: int

    def path(self, name: str) -> Path:
        return self.out / name


def python(script: str, *words: object) -> list[str]:
    return ["python", script, *map(str, words)]


def training(plan: Plan, run_dir: str, *overrides: str) -> Command:
    """The documented command line of training."""
    paths = [] if plan.out == Path("runs/demo") else [f"data.train={plan.path('data/train')}", f"data.valid.held_out={plan.path('data/valid')}"]
    if paths:
        paths.append(f"checkpoint.init_from={plan.path('upcycled')}")
    if plan.own_dense or paths:
        paths.append(f"data.tokenizer={plan.dense}")
    if plan.num_processes == 1:
        paths.append("parallel.ep=1")
    words = ["torchrun", "--standalone", "--nproc-per-node", str(plan.num_processes), "launch/pretrain_moe.py"]
    words += ["--config", str(plan.path("upcycled/model.yaml")), "--config", str(CONFIG), f"run_dir={plan.path(run_dir)}"]
    return Command([*words, *paths, *overrides])


def stages(plan: Plan) -> list[Stage]:
    """The demo's stages, in order."""
    return [*preparation(plan), *training_stages(plan), *closing_stages(plan)]


def preparation(plan: Plan) -> list[Stage]:
    """Dense model, documents, tokens, upcycling, and the proof that nothing changed."""
    found: list[Stage] = []
    if not plan.own_dense:
        fetch = Command(python("tools/fetch_smollm2.py", "--cache", plan.cache, "--out", plan.dense))
        found.append(Stage("dense", "bring the dense model (SmolLM2-135M)", [fetch], makes=[plan.dense / "config.json"], clears=[plan.dense]))
    valid = plan.path("data/valid")
    if plan.data is None:
        write = Command(python("tools/demo_text.py", "--out", plan.path("documents")), stdout=plan.path("results/documents.json"))
        makes = [plan.path("documents/train.jsonl"), plan.path("documents/valid.jsonl")]
        found.append(Stage("documents", "write documents from the standard library", [write], reads=[Path("tools/demo_text.py")], makes=makes))
        tokenizing = [tokenize(plan, str(plan.path(f"documents/{side}.jsonl")), plan.path(f"data/{side}")) for side in ("train", "valid")]
    else:
        tokenizing = [tokenize(plan, plan.data, plan.path("data/train"), "--holdout", "0.05", "--holdout-output", str(valid))]
    reads = [plan.dense / "config.json", *(map(Path, sorted(glob.glob(str(ROOT / plan.data), recursive=True))) if plan.data else [])]
    makes = [plan.path(f"data/{side}.{kind}") for side in ("train", "valid") for kind in ("bin", "idx", "json")]
    found.append(Stage("tokenize", "turn them into an indexed dataset", tokenizing, reads=reads, makes=makes, finding=lambda: tokens_found(plan)))
    upcycled = plan.path("upcycled")
    upcycle = Command(python("tools/upcycle_dense.py", "--dense", plan.dense, "--out", upcycled, "--num-experts", NUM_EXPERTS, "--topk", TOPK))
    says = f"make {NUM_EXPERTS} experts of every feed-forward layer"
    found.append(Stage("upcycle", says, [upcycle], reads=[plan.dense], makes=[upcycled / "model.yaml"], clears=[upcycled]))
    proof = plan.path("results/prove.json")
    verify = python("tools/convert_checkpoint.py", "verify-upcycle", "--dense", plan.dense, "--checkpoint", upcycled, "--json")
    says = "compare the logits of dense and upcycled"
    found.append(Stage("prove", says, [Command(verify, stdout=proof)], makes=[proof], finding=lambda: f"largest difference {logit_difference(plan):.1e}"))
    return found


def tokenize(plan: Plan, documents: str, output: Path, *more: str) -> Command:
    words = ["--input", documents, "--tokenizer", plan.dense, "--output", output, "--workers", os.cpu_count() or 1, *more, "--overwrite"]
    return Command(python("tools/preprocess_data.py", *words))


def training_stages(plan: Plan) -> list[Stage]:
    """Train, stop, resume, do the same without stopping, compare, and go on to the end."""
    run, straight = plan.path("run"), plan.path("uninterrupted")
    resume = [training(plan, "run", f"train.stop_at_step={COMPARE_STEP}")]
    straight_through = [training(plan, "uninterrupted", f"train.stop_at_step={COMPARE_STEP}")]
    result = plan.path("results/compare.json")
    words = ["--first", 1, "--last", COMPARE_STEP, "--checkpoint-step", COMPARE_STEP, "--json"]
    compare = Command(python("tools/compare_runs.py", run, straight, *words), stdout=result, allowed=(0, 1))
    begin = [training(plan, "run", f"train.stop_at_step={STOP_STEP}")]
    done = [last_checkpoint(plan) / "complete.json"]
    finish = [training(plan, "run")]
    here = f"{plan.num_processes} process{'es' if plan.num_processes > 1 else ''}"
    return [
        Stage("train", f"evaluate, train to step {STOP_STEP}, stop ({here})", begin, reads=[CONFIG], makes=[run / "metrics.jsonl"], clears=[run]),
        Stage("resume", f"go on from the checkpoint to step {COMPARE_STEP}", resume),
        Stage("uninterrupted", f"the same {COMPARE_STEP} steps without a stop", straight_through, makes=[straight / "metrics.jsonl"], clears=[straight]),
        Stage("compare", "compare both runs, every number and bit", [compare], makes=[result], finding=lambda: resume_finding(plan)),
        Stage("finish", "go on to the last step, evaluate", finish, makes=done, clears=[straight / "checkpoints"], finding=lambda: loss_finding(plan)),
    ]


def last_checkpoint(plan: Plan) -> Path:
    last = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))["train"]["steps"]
    return plan.path(f"run/checkpoints/step_{last:08d}")


def closing_stages(plan: Plan) -> list[Stage]:
    """Export, generate, report."""
    words = ["--checkpoint", last_checkpoint(plan), "--out", plan.path("export"), "--tokenizer", plan.dense]
    export = Command(python("tools/convert_checkpoint.py", "export", *words))
    words = ["--model", plan.path("export"), "--prompt", PROMPT, "--trust-remote-code", "--json"]
    sentence = Command(python("tools/generate.py", *words), stdout=plan.path("results/generate.json"))
    report = Command(python("tools/report.py", plan.path("run"), "--out", plan.path("report.html")))
    return [
        Stage("export", "write the model as a Hugging Face folder", [export], makes=[plan.path("export/config.json")], clears=[plan.path("export")]),
        Stage("generate", "load it with transformers, write a sentence", [sentence], makes=[plan.path("results/generate.json")]),
        Stage("report", "draw the report", [report], makes=[plan.path("report.html")]),
    ]


def result_of(plan: Plan, name: str) -> dict:
    path = plan.path(f"results/{name}.json")
    try:
        return json.loads((ROOT / path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageFailed(f"{path} is no JSON; the stage's log is {plan.path(f'logs/{name}.log')}") from error


def tokens_found(plan: Plan) -> str:
    counts = {side: json.loads((ROOT / plan.path(f"data/{side}.json")).read_text(encoding="utf-8"))["num_tokens"] for side in ("train", "valid")}
    return f"{counts['train']:,} tokens, {counts['valid']:,} held out"


def logit_difference(plan: Plan) -> float:
    return float(result_of(plan, "prove")["largest_logit_difference"])


def resume_finding(plan: Plan) -> str:
    return f"steps 1 to {COMPARE_STEP} and the checkpoint are equal" if result_of(plan, "compare")["equal"] else "DIFFERENT"


def held_out_losses(plan: Plan) -> list[float]:
    """Losses of the held-out documents, in the order they were measured."""
    records = [json.loads(line) for line in (ROOT / plan.path("run/metrics.jsonl")).read_text(encoding="utf-8").splitlines()]
    return [record["losses"]["held_out"] for record in records if record["kind"] == "eval"]


def loss_finding(plan: Plan) -> str:
    losses = held_out_losses(plan)
    return f"held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}"


def count_gpus() -> int:
    """GPUs torch can use, asked in a process of its own so that this one stays small."""
    question = "import json; from megatron_skywork import device; print(device.count() if device.has_gpu() else 0)"
    done = subprocess.run([sys.executable, "-c", question], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def moe_parameters(dense: Path) -> int:
    """Parameters of the upcycled model, from the dense model's config.json (LLaMA type)."""
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (4 * hidden * hidden + NUM_EXPERTS * 3 * hidden * ffn)


def check_machine(plan: Plan, on_gpu: bool) -> None:
    """Refuse before the first stage what would fail in a later one.

    Raises:
        TooSmall: not enough free memory or disk space; the message has both numbers.
        CheckpointError: DENSE is no Hugging Face folder.
    """
    if plan.own_dense and not (ROOT / plan.dense / "config.json").is_file():
        raise CheckpointError(f"DENSE={plan.dense}: no config.json there; give the folder of a Hugging Face model")
    parameters = moe_parameters(ROOT / plan.dense) if plan.own_dense else 373_000_000
    needed = parameters * (6 if on_gpu else BYTES_PER_PARAMETER) + 3 * GIB
    free = psutil.virtual_memory().available
    if free < needed:
        raise TooSmall(f"about {needed / GIB:.0f} GiB of free memory are needed and {free / GIB:.1f} GiB are there")
    done = (ROOT / plan.out / "summary.json").is_file()
    needed, free = parameters * 36, shutil.disk_usage(ROOT).free
    if free < needed and not done:
        raise TooSmall(f"about {needed / GIB:.0f} GiB of free disk space are needed under {ROOT} and {free / GIB:.1f} GiB are there")


def write_summary(plan: Plan, runner: Runner, on_gpu: bool) -> dict:
    """Write summary.json: what the demo found."""
    losses, resumed, text = held_out_losses(plan), result_of(plan, "compare"), result_of(plan, "generate")
    compared = f"loss, gradient norm, learning rate and tokens of steps 1 to {COMPARE_STEP}, exactly; "
    compared += f"weights, optimizer and random state of the step-{COMPARE_STEP} checkpoint, bit for bit"
    summary = {
        "stages": [{name: record[name] for name in ("name", "seconds", "reused", "peak_memory_bytes", "commands")} for record in runner.records],
        "seconds": round(sum(record["seconds"] for record in runner.records), 1),
        "held_out_loss": {"before": losses[0], "after": losses[-1]},
        "largest_logit_difference": logit_difference(plan),
        "resume_equal": resumed["equal"],
        "resume_compared": {"what": compared, **resumed},
        "generated": {"prompt": text["prompt"], "text": text["text"], "model_class": text["model_class"]},
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in runner.records),
        "peak_disk_bytes": max(record["peak_disk_bytes"] for record in runner.records),
        "device": "gpu" if on_gpu else "cpu",
        "processes": plan.num_processes,
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")} | {"python": sys.version.split()[0]},
        "report": str(plan.path("report.html")),
    }
    (ROOT / plan.path("summary.json")).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def failures(summary: dict) -> list[str]:
    """The claims of the demo that did not hold this time."""
    found = []
    if summary["largest_logit_difference"] > LARGEST_LOGIT_DIFFERENCE:
        found.append(f"dense and upcycled differ by {summary['largest_logit_difference']:.2e} in a logit, more than {LARGEST_LOGIT_DIFFERENCE:.0e}")
    if not summary["resume_equal"]:
        found.append("the resumed run is not equal to the uninterrupted one (see resume_compared in the summary)")
    if not summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]:
        found.append("the held-out loss after training is not below the one before")
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dense", type=Path, metavar="DIR", help="your own dense model (Hugging Face folder) instead of SmolLM2-135M")
    parser.add_argument("--data", metavar="GLOB", help="your own documents: JSONL (.gz, .zst) with a field `text`; 5 %% of them are held out")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything that is written (default runs/demo)")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder for the downloaded package (default .cache)")
    parser.add_argument("--fresh", action="store_true", help="forget finished stages")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    started = time.monotonic()
    try:
        gpus = count_gpus()
        dense = args.dense or args.out / "dense"
        plan = Plan(args.out, dense, args.dense is not None, args.data, args.cache, num_processes=min(2, gpus) or 2)
        check_machine(plan, on_gpu=gpus > 0)
        if args.fresh:
            shutil.rmtree(ROOT / plan.out / "stages", ignore_errors=True)
        where = f"{plan.num_processes} of {gpus} GPUs" if gpus else f"{os.cpu_count()} CPU cores"
        print(f"demo on {where}; what each stage types and prints is in {plan.out}/logs/STAGE.log", flush=True)
        runner = Runner(ROOT / plan.out, ROOT, environment(plan.num_processes), seed=megatron_skywork.__version__)
        *work, report = stages(plan)
        runner.run_all(work, total=len(work) + 1)
        write_summary(plan, runner, on_gpu=gpus > 0)  # the report shows it
        runner.run_all([report], total=len(work) + 1)
        summary = write_summary(plan, runner, on_gpu=gpus > 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{summary['generated']['prompt']}{summary['generated']['text']}\n")
    for problem in failures(summary):
        print(f"NOT SHOWN: {problem}")
    print(f"summary: {plan.path('summary.json')}\nreport:  {plan.path('report.html')}   ({time.monotonic() - started:.0f} s)")
    return EXIT_OTHER if failures(summary) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
