"""What scaling costs, on CPU ranks (gloo) of this machine: seconds per step and bytes sent per rank against the analytic count, and what grows with the world.

Bytes are those really handed to the collectives (benchmarks/scaling_traffic.py), once with the router as it is and once with one that is balanced by
force; analytic is plan/communication.py, which `--dry-run` prints for any layout. They are the proof. Times are not one of scaling: the ranks share
this machine's cores, so more ranks mean less of a core for each.

--growth shows instead what a larger world costs besides training: process groups, the plan of a dry run, start, steps and records of one rank of many
(torch's fake backend stands for the others), and checkpoints and data indices of real ranks.
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
# Libraries' advice to their own developers, once per rank, would bury the tables.
warnings.simplefilter("ignore")

from megatron_skywork.config.load import check_config  # noqa: E402
from megatron_skywork.config.schema import Config  # noqa: E402
from megatron_skywork.errors import ConfigError, UserError  # noqa: E402

DEFAULT_LAYOUTS = ("1", "2", "4", "4:ep=2", "4:ep=4")


def make_config(world_size: int, layout: dict[str, int], arguments: argparse.Namespace) -> Config:
    """The report's routing in a small transformer, its batch in proportion to the data-parallel ranks or fixed."""
    data_parallel = max(1, world_size // (layout.get("tp", 1) * layout.get("pp", 1)))
    batch = arguments.sequences * (data_parallel if arguments.scaling == "weak" else 1)
    config = Config.model_validate(
        {
            "model": {
                "num_layers": 4, "hidden_size": arguments.hidden, "ffn_hidden_size": 2 * arguments.hidden,
                "num_attention_heads": max(4, arguments.hidden // 64), "vocab_size": 1024, "max_position_embeddings": arguments.tokens, "backend": "torch",
            },
            "moe": {"num_experts": 8, "topk": 2, "aux_loss": "report", "capacity_factor": 1.1, "adaptive": {"enabled": True}},
            "parallel": layout,
            "data": {"mock": True, "seq_length": arguments.tokens, "num_workers": 0},
            "optim": {"lr": 1e-4, "schedule": "constant"},
            "train": {"steps": 1_000_000, "global_batch_size": batch, "micro_batch_size": 1, "precision": arguments.precision},
        }
    )  # fmt: skip
    check_config(config, world_size)
    return config


def parse_layout(text: str) -> tuple[int, dict[str, int]]:
    """`4:tp=2,ep=2` as (4, {"tp": 2, "ep": 2})."""
    world, _, degrees = text.partition(":")
    try:
        parsed = {name: int(value) for name, value in (degree.split("=") for degree in degrees.split(",") if degree)}
        if int(world) < 1 or not set(parsed) <= {"tp", "pp", "vpp", "ep", "etp"}:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--layouts {text}: write ranks:degrees, as 4 or 4:ep=2 or 8:tp=2,pp=2,ep=4 (degrees: tp, pp, vpp, ep, etp)") from None
    return int(world), parsed


def make_configs(arguments: argparse.Namespace) -> dict[str, tuple[int, Config]]:
    """Ranks and settings of every layout.

    Raises:
        ConfigError: a layout cannot be read, or does not fit the model or its ranks.
    """
    layouts = {text: parse_layout(text) for text in arguments.layouts}
    return {text: (world, make_config(world, layout, arguments)) for text, (world, layout) in layouts.items()}


def measure(configs: dict[str, tuple[int, Config]], repetitions: int) -> list[dict[str, Any]]:
    """Every layout, one after the other."""
    from scaling_ranks import on_ranks, steps

    found = []
    for text, (world, config) in configs.items():
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            print(f"{text}: {world} rank(s), {repetitions} steps", file=sys.stderr, flush=True)
            answers = on_ranks(world, steps, config.model_copy(update={"run_dir": folder}), repetitions)
        # A step is done when its last rank is.
        seconds = [max(of_ranks) for of_ranks in zip(*(answer["seconds"] for answer in answers), strict=True)]
        found.append({"layout": text, "ranks": world, "seconds": seconds, "sequences": config.train.global_batch_size, "by_collective": merged(answers)})
    return found


def merged(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all ranks as means over them; `exact` where every rank's balanced count is the analytic one."""
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for answer in answers:
        for row in answer["rows"]:
            by_kind.setdefault((row["group"], row["operation"]), []).append(row)
    result = []
    for of_ranks in by_kind.values():
        means = {name: sum(row[name] for row in of_ranks) / len(answers) for name in ("real", "balanced", "expected", "most")}
        exact = all(row["balanced"] == row["expected"] > 0 for row in of_ranks)
        result.append({**{name: of_ranks[0][name] for name in ("group", "operation", "what")}, **means, "exact": exact})
    return result


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The layouts as a person reads them."""
    for entry in found:
        low, middle, high = (min(entry["seconds"]), statistics.median(entry["seconds"]), max(entry["seconds"]))
        yield (f"{entry['layout']}: {entry['ranks']} rank(s), {entry['sequences']} sequences a step, {middle:.3f} s a step ({low:.3f} .. {high:.3f}); "
               "bytes sent by a rank in a step (mean):")  # fmt: skip
        yield f"  {'group':10}{'collective':16}{'counted':>12}{'balanced':>12}{'analytic':>12}{'counted/an.':>12}{'balanced/an.':>13}  what"
        for row in entry["by_collective"]:
            ratios = [f"{row[name] / row['expected']:.4f}" if row["expected"] else "-" for name in ("real", "balanced")]
            if row["exact"]:
                ratios[1] = "exact"
            yield (f"  {row['group']:10}{row['operation']:16}{row['real']:12,.0f}{row['balanced']:12,.0f}{row['expected']:12,.0f}"
                   f"{ratios[0]:>12}{ratios[1]:>13}  {row['what']}")  # fmt: skip
        yield ""
    yield "the ranks share this machine's cores: seconds say nothing about scaling, bytes do"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(DEFAULT_LAYOUTS), metavar="RANKS[:DEGREES]",
                        help="as 2 or 4:ep=2 or 4:tp=2,pp=2 (default: DP 1, 2, 4 and EP 2, 4 of 4 ranks)")  # fmt: skip
    parser.add_argument("--scaling", choices=("weak", "strong"), default="weak", help="--sequences for every data-parallel rank, or in all (default weak)")
    parser.add_argument("--sequences", type=int, default=4, metavar="N", help="per step (default 4)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of a sequence (default 128)")
    parser.add_argument("--hidden", type=int, default=128, metavar="N", help="width of the model, 4 layers, 8 experts (default 128)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="timed steps (default 8)")
    parser.add_argument("--growth", action="store_true", help="what grows with the number of ranks, instead")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 512, 1536, 10000], metavar="N",
                        help="with --growth: sizes that are planned and mocked (default 2 to 64, 512, 1536, 10000)")  # fmt: skip
    parser.add_argument("--real-worlds", type=int, nargs="*", default=[2, 4, 8, 16], metavar="N",
                        help="with --growth: sizes of which every rank is a process (default 2 4 8 16)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    arguments = parser.parse_args(words)
    if min(arguments.sequences, arguments.tokens, arguments.hidden, arguments.steps) < 1:
        parser.error("--sequences, --tokens, --hidden and --steps must be 1 or more")
    if arguments.hidden % 64:
        parser.error(f"--hidden {arguments.hidden}: must be a multiple of 64, or the padding of single parameters would be measured")
    if any(world < 2 or world % 2 for world in [*arguments.worlds, *arguments.real_worlds]):
        parser.error("--worlds and --real-worlds must be even numbers: the experts of a layer are shared by two ranks")
    return arguments


def main() -> int:
    arguments = parse()
    try:
        configs = {} if arguments.growth else make_configs(arguments)
        # These import torch and megatron-core; wrong words have been answered by now.
        from megatron_skywork import device

        if device.has_gpu():
            raise ConfigError("this measures CPU ranks, and here is a GPU; hide it: CUDA_VISIBLE_DEVICES= python benchmarks/scaling.py")
        device.prepare()
        if arguments.growth:
            from scaling_growth import growth, growth_tables

            found: Any = growth(arguments.worlds, arguments.real_worlds)
            lines = growth_tables(found)
        else:
            found = measure(configs, arguments.steps)
            lines = table(found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    import torch
    from megatron.core import __version__ as core_version

    about = {"command": shlex.join(["python", *sys.argv]), "cores": os.cpu_count(), "torch": torch.__version__, "megatron_core": core_version}
    if arguments.json:
        print(json.dumps({"benchmark": "scaling", **about, "results": found}))
    else:
        print("\n".join([*(f"{name}: {value}" for name, value in about.items()), "", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
