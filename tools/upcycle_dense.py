"""Make a mixture of experts from a dense Hugging Face checkpoint: every feed-forward is copied into all experts, the router is new.

    python tools/upcycle_dense.py --dense HF_DIR --out DIR --num-experts 16 --topk 2

The result is a weights-only checkpoint that loads under any TP x PP x EP; its model.yaml is the first --config of a training run.
Exit codes: 0 done, 2 a setting is wrong, 3 the source was refused or the result failed the comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, UserError  # noqa: E402


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dense", required=True, metavar="HF_DIR", help="Hugging Face folder of a dense model (llama, mistral, qwen2, qwen3, skywork)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; absent or complete, never half")
    parser.add_argument("--num-experts", required=True, type=int, metavar="E", help="experts of every MoE layer")
    parser.add_argument("--topk", type=int, default=2, metavar="K", help="experts a token is sent to (default 2)")
    parser.add_argument("--moe-layers", type=layer_list, metavar="LIST", help="layers (from 0) that become mixtures, e.g. 1,3,5-7 (default: all)")
    parser.add_argument("--gate-norm", action=argparse.BooleanOptionalAction, default=True, help="gate-logit normalization (default: on)")
    parser.add_argument("--gate-norm-scale", type=float, default=1.0, metavar="LAMBDA", help="standard deviation of the normalized logits (default 1)")
    parser.add_argument("--router-init-std", type=float, default=0.01, metavar="STD", help="standard deviation of the new router (default 0.01)")
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="SHARE", help="noise on every expert, as a share of its tensor's std; the result is then inexact"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the router and the noise (default 1234)")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, bytes and free space; no weight is read")
    parser.add_argument(
        "--verify", action="store_true", help="compare with the dense model before the result gets its name; refuse an exact method that differs"
    )
    parser.add_argument("--verify-text", metavar="TEXT", help="with --verify: text to compare on (default: random tokens)")
    parser.add_argument("--verify-tokens", type=int, default=256, metavar="N", help="with --verify: tokens to compare on (default 256)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp64"], help="with --verify: what to compute in (default fp32)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(words)


def layer_list(text: str) -> tuple[int, ...]:
    """`1,3,5-7` as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 1,3,5-7")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan, or upcycle and compare; the result as a dictionary."""
    from megatron_skywork.convert.upcycle import UpcycleOptions, plan, upcycle
    from megatron_skywork.convert.verify import compare, refuse_if_failed, tokens_for

    options = UpcycleOptions(
        num_experts=arguments.num_experts,
        topk=arguments.topk,
        layers=arguments.moe_layers,
        gate_norm=arguments.gate_norm,
        gate_norm_scale=arguments.gate_norm_scale,
        router_init_std=arguments.router_init_std,
        seed=arguments.seed,
        noise=arguments.noise,
    )
    planned = plan(arguments.dense, arguments.out, options)
    if arguments.dry_run:
        return {"dry_run": True, **planned}

    def accept(folder: Path) -> dict[str, Any]:
        tokens = tokens_for(arguments.dense, planned["layout"]["vocabulary"], arguments.verify_text, arguments.verify_tokens)
        result = compare(arguments.dense, folder, tokens, progress=sys.stderr, precision=arguments.precision)
        refuse_if_failed(result)
        return result

    return upcycle(arguments.dense, arguments.out, options, arguments.overwrite, sys.stderr, accept if arguments.verify else None)


def describe(result: dict[str, Any]) -> str:
    """The result as a few lines of text."""
    from megatron_skywork.convert.progress import human

    layout, parameters = result["layout"], result["parameters"]
    lines = [f"note: {note}" for note in result["notes"]]
    lines.append(
        f"{layout['layers']} layers ({layout['moe_layers']} of them mixtures), {layout['experts']} experts, top-{layout['topk']}, gate normalization "
        f"{'on' if layout['gate_norm'] else 'off'}: {parameters['total']:,} parameters, {parameters['active']:,} active"
    )
    if result.get("dry_run"):
        lines.append(
            f"{human(result['bytes'])} to write in {result['dtype']}, {human(result['free_bytes'])} free: {'fits' if result['fits'] else 'DOES NOT FIT'}"
        )
        return "\n".join(lines)
    lines.append(f"{result['out']}: {human(result['bytes'])} in {result['seconds']:.1f} s")
    if "verify" in result:
        verified = result["verify"]
        verdict = {True: "equal within the tolerance", None: "inexact by its method"}[verified["passed"]]
        difference, kl = verified["largest_logit_difference"], verified["kl"]
        lines.append(f"against the dense model over {verified['tokens']} tokens: largest logit difference {difference:.2e}, KL {kl:.2e}; {verdict}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse(words)
    try:
        result = run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or arguments.out}: {error.strerror or error}", file=sys.stderr)
        return EXIT_OTHER
    print(json.dumps(result) if arguments.json else describe(result))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
