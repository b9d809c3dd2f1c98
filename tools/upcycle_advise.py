"""Upcycle a dense model, or train the mixture from scratch? The Skywork-MoE report's rule with the numbers of your model, and what it rests on.

    python tools/upcycle_dense.py advise --dense-tokens 3.2T --budget-tokens 500B --dense configs/skywork_13b.yaml --num-experts 16
    python tools/upcycle_dense.py advise --dense-tokens 3.2T --budget-tokens 500B --dense-parameters 13.85B --active-parameters 22.7B
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from megatron_skywork.errors import ConfigError
from tool_main import finish


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="upcycle_dense.py advise", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--dense-tokens", required=True, metavar="COUNT", help="tokens the dense model was trained on, e.g. 3.2T")
    parser.add_argument("--budget-tokens", required=True, metavar="COUNT", help="tokens you can train the mixture on, e.g. 500B")
    parser.add_argument("--dense", metavar="PLACE", help="the dense model: folder, config.json or a run's configuration; no weight is read")
    parser.add_argument("--num-experts", type=int, metavar="E", help="with --dense: experts of every layer")
    parser.add_argument("--topk", type=int, default=2, metavar="K", help="with --dense: experts a token is sent to (default 2)")
    parser.add_argument("--dense-parameters", metavar="COUNT", help="instead of --dense: parameters of the dense model, e.g. 13.85B")
    parser.add_argument("--active-parameters", metavar="COUNT", help="instead of --dense: parameters of the mixture that a token passes through")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The advice as a dictionary, its text under `text`."""
    from megatron_skywork.plan.upcycle_or_scratch import BUDGET_OPTION, DENSE_OPTION, advice_lines, advice_record, advise, parse_tokens

    dense, active = _parameters(arguments)
    tokens = parse_tokens(arguments.dense_tokens, DENSE_OPTION), parse_tokens(arguments.budget_tokens, BUDGET_OPTION)
    advice = advise(*tokens, dense, active)
    return {**advice_record(advice), "text": advice_lines(advice)}


def _parameters(arguments: argparse.Namespace) -> tuple[int, int]:
    from megatron_skywork.plan.upcycle_or_scratch import parse_tokens

    numbers, model = (arguments.dense_parameters, arguments.active_parameters), (arguments.dense, arguments.num_experts)
    if None not in numbers and model == (None, None):
        return parse_tokens(arguments.dense_parameters, "--dense-parameters"), parse_tokens(arguments.active_parameters, "--active-parameters")
    if numbers != (None, None) or None in model:
        raise ConfigError("give either --dense with --num-experts, or --dense-parameters with --active-parameters")
    from megatron_skywork.convert.upcycling.options import UpcycleOptions
    from megatron_skywork.convert.upcycling.plan import plan

    planned = plan(arguments.dense, ".", UpcycleOptions(num_experts=arguments.num_experts, topk=arguments.topk), probe=False)
    return planned["dense_parameters"], planned["parameters"]["active"]


def main(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    return finish(parse(words), run, lambda result: "\n".join(wrapped(line) for line in result["text"]))


def wrapped(line: str) -> str:
    """A long line in lines of a terminal's width, under its own indentation."""
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line.strip(), 120, initial_indent=indent, subsequent_indent=indent + "  ")
