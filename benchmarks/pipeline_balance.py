"""Whether the split that the planner proposes beats equal stages as its simulator says: a small model trained on CPU ranks with both, step by step in turn.

With equal stages every rank takes the CPU time of its forwards, backwards and layers; from these costs the simulator proposes a split and predicts the
time of a step with either. Then both are trained in the same processes, and the pipeline's seconds are measured: predicted beside measured.
A large vocabulary makes the loss on the last stage worth several layers.

Two times are predicted and measured for each split:

    wall             on the cores there are. Where stages are more than cores, another stage takes the core of one that waits, and idle time costs nothing until
                     a single stage is more than a core's share of the work; so such a pipeline is predicted with the cores as a limit
                     (benchmarks/pipeline_balance_cores.py). Whatever else runs on the machine makes measured steps longer.
    a core per stage measured: the CPU seconds that every single pass of the step took on its rank, put one after the other in the order in which they ran,
                     each stage with a core to itself. No clock on the wall shows it where stages are more than cores; on others it is the wall's, undisturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Libraries' advice to their own developers, once per rank, would bury the table.
warnings.simplefilter("ignore")

from megatron_skywork.config.load import check_config  # noqa: E402
from megatron_skywork.config.schema import Config  # noqa: E402
from megatron_skywork.errors import ConfigError, UserError  # noqa: E402


def make_config(stages: int, arguments: argparse.Namespace) -> Config:
    """A dense model with equal stages."""
    if arguments.layers % stages or stages < 2:
        raise ConfigError(f"--stages {stages}: 2 or more, and --layers={arguments.layers} must be a multiple of it for stages of equal size to start from")
    config = Config.model_validate(
        {
            "model": {
                "num_layers": arguments.layers, "hidden_size": arguments.hidden, "ffn_hidden_size": 2 * arguments.hidden,
                "num_attention_heads": max(4, arguments.hidden // 64), "vocab_size": arguments.vocab, "max_position_embeddings": arguments.tokens,
                "backend": "torch",
            },
            "parallel": {"pp": stages},
            "data": {"mock": True, "seq_length": arguments.tokens, "num_workers": 0},
            "optim": {"lr": 1e-4, "schedule": "constant"},
            "train": {"steps": 1_000_000, "global_batch_size": arguments.micro_batches, "micro_batch_size": 1, "precision": "fp32"},
            "checkpoint": {"save_at_end": False},
        }
    )  # fmt: skip
    check_config(config, stages)
    return config


def measure(configs: Sequence[Config], cores: int, steps: int) -> list[dict[str, Any]]:
    """Every number of stages, one after the other."""
    from pipeline_balance_ranks import compare
    from scaling_ranks import on_ranks

    found = []
    for config in configs:
        print(f"{config.parallel.pp} stages: {steps} steps of each split", file=sys.stderr, flush=True)
        before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="pipeline-balance-") as folder:
            first, *_ = on_ranks(config.parallel.pp, compare, config.model_copy(update={"run_dir": f"{folder}/uniform"}), cores, steps)
        found.append({**first, "load_before": before, **_ratios(first)})
    return found


def _ratios(entry: dict[str, Any]) -> dict[str, Any]:
    """Time of the planned split over the uniform one's: predicted, and measured of neighbouring steps as quartiles."""
    result = {}
    for name, predicted, measured in (("wall", "predicted", "seconds"), ("own_core", "predicted_own_core", "own_core_seconds")):
        pairs = [planned / uniform for planned, uniform in zip(entry["planned"][measured], entry["uniform"][measured], strict=True)]
        result[f"{name}_ratio_predicted"] = entry["planned"][predicted] / entry["uniform"][predicted]
        result[f"{name}_ratio_measured"] = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return result


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """As a page of the manual shows it."""
    yield "| stages | cores | layers of the stages | wall, predicted | measured | a core per stage, predicted | measured |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for entry in found:
        start = f"| {entry['stages']} | {entry['cores']} |"
        for name in ("uniform", "planned"):
            run = entry[name]
            wall, own = (statistics.median(run[key]) for key in ("seconds", "own_core_seconds"))
            yield (f"{start} {name} {run['split']} | {1e3 * run['predicted']:.0f} ms | {1e3 * wall:.0f} ms (fastest {1e3 * min(run['seconds']):.0f}) "
                   f"| {1e3 * run['predicted_own_core']:.0f} ms | {1e3 * own:.0f} ms |")  # fmt: skip
        columns = []
        for name in ("wall", "own_core"):
            low, middle, high = entry[f"{name}_ratio_measured"]
            columns.append(f"{entry[f'{name}_ratio_predicted']:.3f} | {middle:.3f} ({low:.3f} .. {high:.3f})")
        yield f"{start} planned / uniform | {' | '.join(columns)} |"
    yield ""
    for entry in found:
        costs = entry["costs"]
        layer, last = sum(costs["layer"]), sum(costs["last"])
        yield (f"{entry['stages']} stages: a layer {1e3 * layer:.2f} ms of CPU for a micro-batch, forward and backward; the last stage's loss "
               f"{last / layer:.1f} layers; a send {1e3 * costs['send']:.2f} ms; {entry['micro_batches']} micro-batches; "
               f"load of the machine before: {entry['load_before']:.1f}")  # fmt: skip
    yield "measured: medians of steps taken in turn; of the ratio median and quartiles of neighbouring steps"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4], metavar="N", help="pipeline stages, each a rank (default 2 and 4)")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="a multiple of the stages (default 12)")
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="width of the model (default 256)")
    parser.add_argument("--vocab", type=int, default=8192, metavar="N", help="size of the vocabulary, whose loss is on the last stage (default 8192)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of a micro-batch, which is one sequence (default 128)")
    parser.add_argument("--micro-batches", type=int, default=8, metavar="N", help="of a step (default 8)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured with each split (default 20)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args(words)
    if min(arguments.layers, arguments.hidden, arguments.vocab, arguments.tokens, arguments.micro_batches, arguments.steps) < 1:
        parser.error("--layers, --hidden, --vocab, --tokens, --micro-batches and --steps must be 1 or more")
    return arguments


def main() -> int:
    arguments = parse()
    try:
        configs = [make_config(stages, arguments) for stages in arguments.stages]
        # These import torch and megatron-core; wrong words have been answered by now.
        from megatron_skywork import device

        if device.has_gpu():
            raise ConfigError("this measures CPU ranks, and here is a GPU; hide it: CUDA_VISIBLE_DEVICES= python benchmarks/pipeline_balance.py")
        device.prepare()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = measure(configs, cores, arguments.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    import torch
    from megatron.core import __version__ as core_version

    about = {"command": shlex.join(["python", *sys.argv]), "cores": cores, "torch": torch.__version__, "megatron_core": core_version}
    if arguments.json:
        print(json.dumps({"benchmark": "pipeline_balance", **about, "results": found}))
    else:
        print("\n".join([*(f"{name}: {value}" for name, value in about.items()), "", *table(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
