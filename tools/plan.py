#!/usr/bin/env python3
"""What a run will cost, worked out without the cluster: memory, speed, idle time, communication, and which layout would do better.

    python tools/plan.py --config configs/skywork_moe_146b.yaml --cluster configs/clusters/a800_192x8.yaml
    python tools/plan.py --config configs/X.yaml --cluster dgx_h100:16 --search --write best.yaml
    python tools/plan.py --config configs/X.yaml --cluster mine.yaml --tokens 3T --gpu-hour-price 2 train.micro_batch_size=2

No torch, no GPU; seconds, and with --search up to --search-seconds more. A cluster is a file with a section `cluster` (configs/clusters, or what
tools/calibrate.py measures on yours), or a machine with its number of nodes.
Exit codes: 0 done, 2 a setting is wrong or cannot work (the nearest plan that does is named), 3 the plan does not fit into memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed
sys.path.insert(0, str(ROOT / "tools"))

from tool_main import finish  # noqa: E402


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that go before the files'")
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="the run's settings; later files win")
    parser.add_argument("--cluster", required=True, metavar="FILE|NAME", help="the machine")
    parser.add_argument("--nodes", type=int, metavar="N", help="as many of the cluster's nodes, instead of what its file says")
    parser.add_argument("--what-if", choices=["zero-bubble"], help="also: the pipeline in an order that the trainer does not run")
    parser.add_argument("--search", action="store_true", help="look for better layouts: all degrees, splits and recomputation that fit")
    looked = "how long to look (default 120); what was not come to is counted, with its bound"
    parser.add_argument("--search-seconds", type=float, default=120.0, metavar="S", help=looked)
    parser.add_argument("--vary", default="", metavar="WHAT", help="with --search also: capacity, precision (with a comma between)")
    parser.add_argument("--write", metavar="FILE", help="with --search: the best plan's settings, which the trainer runs as they are")
    parser.add_argument("--tokens", metavar="COUNT", help="tokens to train on, e.g. 3T, instead of what train.steps comes to")
    parser.add_argument("--days", type=float, metavar="D", help="also: tokens in so many days, and GPUs for the target in so many days")
    parser.add_argument("--failures", metavar="RATE", help="GPU-hours per failure, or a published rate: llama3 (default), rsc1, rsc2, rsc1_jobs, opt, bloom")
    parser.add_argument("--storage", type=float, metavar="GB", help="GB per second that the storage takes from all nodes together, for the interval of saves")
    parser.add_argument("--gpu-hour-price", type=float, metavar="PRICE", help="of one GPU for an hour, in any currency")
    parser.add_argument("--dense-tokens", metavar="COUNT", help="tokens the dense model was trained on: upcycle it, or train from scratch?")
    parser.add_argument("--html", metavar="FILE", help="the plan as a page, with the pipeline drawn")
    parser.add_argument("--png", metavar="FILE", help="the pipeline drawn (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_intermixed_args(words)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan as a dictionary, its text under `text`."""
    from megatron_skywork.plan import answer

    wanted = answer.Wanted(
        what_if=arguments.what_if, search=arguments.search, search_seconds=arguments.search_seconds,
        vary=tuple(filter(None, arguments.vary.split(","))), write=arguments.write,
        tokens=arguments.tokens, days=arguments.days, failures=arguments.failures, storage_gb_per_second=arguments.storage,
        gpu_hour_price=arguments.gpu_hour_price,
        dense_tokens=arguments.dense_tokens, html=arguments.html, png=arguments.png,
    )  # fmt: skip
    return answer.plan(arguments.config, arguments.overrides, arguments.cluster, arguments.nodes, wanted, progress)


def progress(text: str) -> None:
    """On long searches, beside the result."""
    print(text, file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    return finish(parse(words), run, lambda result: "\n".join(result["text"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
