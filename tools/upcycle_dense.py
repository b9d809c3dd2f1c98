"""Make a mixture of experts from a dense checkpoint: every feed-forward is copied into all experts, the router is new.

    python tools/upcycle_dense.py --dense HF_DIR --out DIR --num-experts 16 --topk 2 --verify
    python tools/upcycle_dense.py --dense HF_DIR --out HF_DIR --num-experts 16 --format hf
    python tools/upcycle_dense.py --dense configs/skywork_13b.yaml --out DIR --num-experts 16 --dry-run
    torchrun --nnodes 4 --nproc-per-node 1 ... tools/upcycle_dense.py --dense HF_DIR --out DIR --num-experts 16
    python tools/upcycle_dense.py advise --dense-tokens 3.2T --budget-tokens 500B --dense configs/skywork_13b.yaml --num-experts 16

With --format mcore the result loads under any TP x PP x EP and its model.yaml is the first --config of a training run; with hf transformers loads it. An
interrupted command goes on where it stopped when it is given again. docs/upcycling.md has the methods, each with its paper.
Exit codes: 0 done, 2 a setting is wrong, 3 a source was refused or the result failed the comparison.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from tool_main import finish  # noqa: E402

LARGEST_NUMBER = 100_000


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dense", required=True, metavar="PLACE", help="dense model: Hugging Face folder, folder of ours, or .gguf file")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; absent or complete, never half")
    parser.add_argument("--format", default="mcore", choices=["mcore", "hf"], help="a folder of ours for training (default), or a Hugging Face folder")
    families = ["auto", "skywork_moe", "mixtral", "qwen2_moe", "qwen3_moe"]
    parser.add_argument("--hf-family", default="auto", choices=families, help="with hf: the model type to write (default: skywork_moe)")
    add_shape(parser)
    add_method(parser)
    add_router(parser)
    add_running(parser)
    return parser.parse_args(words)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """What the mixture looks like."""
    group = parser.add_argument_group("shape")
    group.add_argument("--num-experts", required=True, type=int, metavar="E", help="routed experts of every MoE layer (with --granularity: pieces)")
    group.add_argument("--topk", type=int, default=2, metavar="K", help="experts a token is sent to (default 2)")
    group.add_argument("--moe-layers", type=number_list, metavar="LIST", help="layers (from 0) that become mixtures, e.g. 1,3,5-7 (default: all)")
    group.add_argument("--gate-norm", action=argparse.BooleanOptionalAction, default=True, help="gate-logit normalization (default: on)")
    group.add_argument("--gate-norm-scale", type=float, default=1.0, metavar="LAMBDA", help="standard deviation of the normalized logits (default 1)")
    group.add_argument("--pre-softmax", action="store_true", help="the chosen experts keep their probabilities (Qwen2-MoE), instead of summing to 1")


def add_method(parser: argparse.ArgumentParser) -> None:
    """How experts are made."""
    group = parser.add_argument_group("method (default: copies, which compute exactly what the dense model computes)")
    group.add_argument("--noise", type=float, default=0.0, metavar="SHARE", help="noise on every expert, as a share of its matrix's standard deviation")
    group.add_argument("--drop-ratio", type=float, default=0.0, metavar="R", help="Drop-Upcycling: share of each expert's columns drawn anew (paper: 0.5)")
    group.add_argument("--granularity", type=int, default=1, metavar="G", help="cut the feed-forward into G pieces, each an expert")
    group.add_argument("--shared-expert-ffn", type=int, metavar="F", help="an expert that sees every token, from the first F inner columns (or all)")
    group.add_argument("--shared-expert-gate", action="store_true", help="a learned gate before it, as Qwen2-MoE has it")
    group.add_argument("--experts-from", type=expert_source, action="append", default=[], metavar="PLACE=LIST",
                       help="these experts come from another dense model, e.g. models/code=0-3; repeat for more")  # fmt: skip
    group.add_argument("--trunk", default="dense", choices=["dense", "mean"], help="what is no expert: the --dense model's (default), or all models' mean")
    group.add_argument("--seed", type=int, default=1234, help="of the routers and of everything random (default 1234)")


def add_router(parser: argparse.ArgumentParser) -> None:
    """How routers start."""
    group = parser.add_argument_group("router")
    group.add_argument("--router-init", default="normal", choices=["normal", "zero", "orthogonal", "text"], help="how its rows start (default normal)")
    group.add_argument("--router-init-std", type=float, default=0.01, metavar="STD", help="their root mean square (default 0.01)")
    group.add_argument("--router-text", action="append", default=[], metavar="FILE",
                       help="with text: rows are centroids of its hidden states; given once for each expert: the mean state of each text")  # fmt: skip
    group.add_argument("--router-tokens", type=int, default=4096, metavar="N", help="with text: tokens of each text (default 4096)")


def add_running(parser: argparse.ArgumentParser) -> None:
    """How the command runs."""
    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="files written at the same time (default 2); any number writes the same bytes")
    group.add_argument("--file-gib", type=float, metavar="SIZE", help="about the size of a file (default 4)")
    group.add_argument("--dry-run", action="store_true", help="parameters, bytes, time and free space; --dense may be a config.json or a run's configuration")
    group.add_argument("--verify", action="store_true", help="compare with the dense model before the result gets its name; refuse what should be equal")
    group.add_argument("--verify-text", metavar="TEXT", help="with --verify: text to compare on (default: a page of English, code and Chinese)")
    group.add_argument("--verify-tokens", type=int, default=256, metavar="N", help="with --verify: tokens to compare on (default 256)")
    group.add_argument("--precision", default="auto", choices=["auto", "fp32", "fp64"], help="with --verify: auto is fp32, and fp64 where that is not enough")
    group.add_argument("--check-finite", action="store_true", help="refuse a dense model that has NaN or infinite numbers")
    group.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --out")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


def number_list(text: str) -> tuple[int, ...]:
    """`1,3,5-7` as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,3,5-7")
        if int(last or first) > LARGEST_NUMBER:
            raise argparse.ArgumentTypeError(f"{text!r} names numbers above {LARGEST_NUMBER:,}, and no model has so many")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def expert_source(text: str) -> tuple[str, tuple[int, ...]]:
    """`PLACE=0-3` as a place and expert numbers."""
    place, equals, numbers = text.rpartition("=")
    if not equals or not place:
        raise argparse.ArgumentTypeError(f"{text!r} is not a place and its experts such as models/code=0-3")
    return place, number_list(numbers)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Plan, or upcycle and compare; the result as a dictionary, on the first rank."""
    from megatron_skywork.convert.files.output_folder import check_replaceable
    from megatron_skywork.convert.streaming.ranks import Ranks
    from megatron_skywork.convert.streaming.run import Options
    from megatron_skywork.convert.upcycling.options import UpcycleOptions
    from megatron_skywork.convert.upcycling.plan import plan
    from megatron_skywork.convert.upcycling.upcycle import Output, upcycle
    from megatron_skywork.errors import ConfigError

    if arguments.workers < 1:
        raise ConfigError(f"--workers={arguments.workers}: must be 1 or more")
    if arguments.file_gib is not None and not 1 <= arguments.file_gib * 2**30 < math.inf:
        raise ConfigError(f"--file-gib={arguments.file_gib}: must be above 0, and a number of GiB")
    if arguments.format == "mcore" and arguments.hf_family != "auto":
        raise ConfigError(f"--hf-family={arguments.hf_family}: is for --format hf, and the format is mcore")
    options = UpcycleOptions(
        num_experts=arguments.num_experts, topk=arguments.topk, layers=arguments.moe_layers, noise=arguments.noise, drop_ratio=arguments.drop_ratio,
        granularity=arguments.granularity, shared_expert_ffn=arguments.shared_expert_ffn, shared_expert_gate=arguments.shared_expert_gate,
        expert_sources=tuple(arguments.experts_from), trunk=arguments.trunk, router_init=arguments.router_init, router_init_std=arguments.router_init_std,
        router_texts=tuple(arguments.router_text), gate_norm=arguments.gate_norm, gate_norm_scale=arguments.gate_norm_scale,
        pre_softmax=arguments.pre_softmax, seed=arguments.seed,
    )  # fmt: skip
    output = Output(arguments.format, arguments.hf_family, None if arguments.file_gib is None else int(arguments.file_gib * 2**30))
    if arguments.dry_run:
        check_replaceable(Path(arguments.out), arguments.overwrite)
        return {"dry_run": True, **plan(arguments.dense, arguments.out, options, output)}
    ranks = Ranks.from_environment()
    try:
        result = upcycle(
            arguments.dense, arguments.out, options, output, Options(arguments.workers, arguments.overwrite, arguments.check_finite, sys.stderr, ranks),
            accept=gate(arguments) if arguments.verify else None,
            routers=(lambda moe: ranks.from_first(lambda: router_rows(arguments, moe))) if arguments.router_init == "text" else None,
        )  # fmt: skip
        return result if ranks.rank == 0 else None
    finally:
        ranks.close()


def gate(arguments: argparse.Namespace) -> Callable[[Path], dict[str, Any]]:
    """The step-0 gate: compares a finished folder with the dense model. Its text is made into tokens now, before anything is written."""
    from megatron_skywork.convert.check.verify import compare, refuse_if_failed, tokens_for
    from megatron_skywork.convert.sources import open_source

    source = open_source(arguments.dense)
    tokens = tokens_for(source.carried or source.folder, source.model.vocab_size, arguments.verify_text, arguments.verify_tokens)

    def compared(folder: Path) -> dict[str, Any]:
        result = compare(arguments.dense, folder, tokens, progress=sys.stderr, precision=arguments.precision)
        refuse_if_failed(result)
        return result

    return compared


def router_rows(arguments: argparse.Namespace, moe: Any) -> dict[int, Any]:
    """Rows of the routers from the hidden states of the given text."""
    import torch

    from megatron_skywork.convert.check.verify import open_layers
    from megatron_skywork.convert.sources import open_source
    from megatron_skywork.convert.table import moe_layers
    from megatron_skywork.convert.upcycling.router_text import rows_from_text, token_lists_for

    source = open_source(arguments.dense)
    lists = token_lists_for(source.carried or source.folder, arguments.router_text, arguments.router_tokens)
    copies = arguments.num_experts // arguments.granularity
    layers = open_layers(arguments.dense, torch.float32)
    return rows_from_text(layers, lists, moe_layers(source.model, moe), copies, arguments.router_init_std, arguments.seed, sys.stderr)


def describe(result: dict[str, Any]) -> str:
    """The result as a few lines of text."""
    from megatron_skywork.convert.progress import human

    layout, parameters = result["layout"], result["parameters"]
    lines = [f"note: {note}" for note in result["notes"]]
    lines.append(
        f"{layout['layers']} layers ({layout['moe_layers']} of them mixtures), {layout['experts']} experts, top-{layout['topk']}, gate normalization "
        f"{'on' if layout['gate_norm'] else 'off'}: {parameters['total']:,} parameters, {parameters['active']:,} active"
    )
    exact = "computes what the dense model computes" if result["exact"] else f"is not the dense model: {'; '.join(result['inexact_because'])}"
    lines.append(f"method: {result['method']}; {exact}")
    if result.get("dry_run"):
        rate, estimate = result["bytes_per_second"], result["seconds_estimate"]
        time = f"about {human_seconds(estimate)} at the {human(rate)}/s that were just measured" if rate else "no estimate: nothing can be written there now"
        fits = "fits" if result["fits"] else "DOES NOT FIT"
        lines.append(f"{human(result['bytes'])} to write in {result['dtype']}, {human(result['free_bytes'])} free: {fits}; {time}")
        return "\n".join(lines)
    lines.append(f"{result['out']}: {human(result['bytes'])} written in {result['write_seconds']:.1f} s")
    if "verify" in result:
        verified = result["verify"]
        verdict = {True: "equal within the tolerance", None: "inexact by its method"}[verified["passed"]]
        difference, kl = verified["largest_logit_difference"], verified["kl"]
        said = "random tokens" if verified["text"] == "random tokens" else "tokens"
        lines.append(f"against the dense model over {verified['tokens']} {said}: largest logit difference {difference:.2e}, KL {kl:.2e}; {verdict}")
    return "\n".join(lines)


def human_seconds(seconds: float) -> str:
    """Seconds as a person says them."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(words: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["advise"]:
        import upcycle_advise

        return upcycle_advise.main(words[1:])
    return finish(parse(words), run, describe)


if __name__ == "__main__":
    sys.exit(main())
