"""Whether to upcycle a dense model or to train the mixture from scratch, by the one rule that is published, and how little that rule rests on.

Skywork-MoE report, section 3 (arXiv 2406.06563), with C_dense what the dense model's training cost and C_MoE what the mixture's budget is:

    C_MoE <<  C_dense      upcycle: the dense model's cost is spent already, and the budget could not buy as much
    C_MoE >= 2 C_dense     train from scratch: copies begin alike, and experts that end less alike went with a lower loss

Between the two it gives no rule, and it does not say how much less "much less" is. That, and what a cost is counted in, is read here as:

    C = 6 N D                     N parameters a token uses, embedding and output layer included, D tokens; attention's 12 L A S is left out
    C_MoE < C_dense               for C_MoE << C_dense

6 N is the first term of the report's own formula for its speed (`flops.report_flops_per_token`). The second line is the least that "much less" can mean. The
published losses allow no higher line: of the two upcycled runs with as many tokens as their dense model one won by 0.005 and the other lost by 0.031, and a
token costs a mixture more than its dense model.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal

from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.wording import count
from megatron_skywork.plan.flops import BACKWARD_OVER_FORWARD

Verdict = Literal["upcycle", "scratch", "either"]

# A multiply and an add for every parameter, forward and backward: 6.
FLOPS_PER_PARAMETER = 2 * (1 + BACKWARD_OVER_FORWARD)
FORMULA = f"cost = {FLOPS_PER_PARAMETER} * parameters a token uses * tokens; embedding and output layer counted, attention scores not"
# This project's reading of "C_MoE << C_dense"; the module's docstring says why.
UPCYCLE_BELOW = 1
# The report's figure.
SCRATCH_FROM = 2

DENSE_OPTION, BUDGET_OPTION = "--dense-tokens", "--budget-tokens"
# No commas: 3,200B is 3200 B to some readers and 3.2 B to others.
_TOKENS = re.compile(r"([0-9]+(?:_[0-9]+)*|[0-9]+\.[0-9]+)(?:e\+?([0-9]{1,2})| ?([KMBT]))?", re.IGNORECASE)
_UNITS = {"K": 3, "M": 6, "B": 9, "T": 12}
_MOST_TOKENS = 10**18
_WRITE_IT = "write it as 3.2T, 300B, 500M, 100e9 or 5000000"


@dataclass(frozen=True)
class PublishedRun:
    """One run of the report's experiment: a 0.3B dense model, 8 experts; the loss is read from a plotted curve.

    Args:
        budget_tokens: what the mixture was trained on.
        dense_tokens: what its dense model had been trained on; None from scratch.
        learning_rate: from the dense model at the end of its training: `constant` (going on at its decayed rate) or `4x` that; None for all others.
    """

    budget_tokens: int
    dense_tokens: int | None
    learning_rate: Literal["constant", "4x"] | None
    loss: float


PUBLISHED = (
    PublishedRun(100 * 10**9, None, None, 2.265),
    PublishedRun(100 * 10**9, 100 * 10**9, None, 2.260),
    PublishedRun(100 * 10**9, 300 * 10**9, "constant", 2.287),
    PublishedRun(300 * 10**9, None, None, 2.2016),
    PublishedRun(300 * 10**9, 100 * 10**9, None, 2.2331),
    PublishedRun(300 * 10**9, 300 * 10**9, "constant", 2.2498),
    PublishedRun(300 * 10**9, 300 * 10**9, "4x", 2.2329),
)


@dataclass(frozen=True)
class Advice:
    """The rule applied to one pair of models.

    Args:
        dense_tokens, budget_tokens: what the dense model was trained on, what the mixture is to be trained on.
        dense_parameters, active_parameters: what a token uses of either, embedding and output layer included.
        dense_flops, budget_flops: C_dense and C_MoE, by `formula`.
        ratio: C_MoE / C_dense.
        verdict: `upcycle`, `scratch`, or `either` where the report gives no rule.
        equal_cost_tokens, double_cost_tokens: the first budgets at which the mixture costs as much as its dense model, and twice as much.
        reason: the rule that decided, in a sentence.
        rests_on: what the advice rests on and what it does not say, a sentence each.
    """

    dense_tokens: int
    budget_tokens: int
    dense_parameters: int
    active_parameters: int
    dense_flops: int
    budget_flops: int
    ratio: float
    verdict: Verdict
    equal_cost_tokens: int
    double_cost_tokens: int
    formula: str
    reason: str
    rests_on: tuple[str, ...]


def parse_tokens(text: str, option: str) -> int:
    """A number of tokens as people write it: `3.2T`, `300B`, `500 M`, `100e9`, `5000000`, `5_000_000`.

    Args:
        option: whose value it is, for the message.

    Raises:
        ConfigError: no such number, no whole one, 0, or more than 1e18.
    """
    match = _TOKENS.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{option}={text!r}: is no number of tokens; {_WRITE_IT}")
    digits, exponent, unit = match.groups()
    # A float would make 8.2T a little less than it is.
    number = Decimal(digits.replace("_", "")).scaleb(int(exponent or 0) + (_UNITS[unit.upper()] if unit else 0))
    if not 1 <= number <= _MOST_TOKENS:
        raise ConfigError(f"{option}={text!r}: must lie between 1 and 1e18 tokens; {_WRITE_IT}")
    if number != number.to_integral_value():
        raise ConfigError(f"{option}={text!r}: is no whole number of tokens; is a unit missing? {_WRITE_IT}")
    return int(number)


def advise(dense_tokens: int, budget_tokens: int, dense_parameters: int, active_parameters: int) -> Advice:
    """The report's rule for a dense model that was trained on `dense_tokens` and a mixture that is to be trained on `budget_tokens`.

    Args:
        dense_parameters, active_parameters: `active` of `plan.parameters.count_parameters`, or of the count over the table of weights; a dense model's are all.

    Raises:
        ConfigError: a number below 1.
    """
    given = {DENSE_OPTION: dense_tokens, BUDGET_OPTION: budget_tokens, "dense parameters": dense_parameters, "active parameters": active_parameters}
    problems = [f"{name}={number}: must be at least 1" for name, number in given.items() if number < 1]
    if problems:
        raise ConfigError(problems)
    dense_flops = FLOPS_PER_PARAMETER * dense_parameters * dense_tokens
    budget_flops = FLOPS_PER_PARAMETER * active_parameters * budget_tokens
    # Whole numbers, not their quotient: a budget at the border is on the side the rule says.
    verdict: Verdict = "upcycle" if budget_flops < UPCYCLE_BELOW * dense_flops else "scratch" if budget_flops >= SCRATCH_FROM * dense_flops else "either"
    equal, double = (-(-times * dense_flops // (FLOPS_PER_PARAMETER * active_parameters)) for times in (1, 2))
    ratio = budget_flops / dense_flops
    return Advice(
        dense_tokens, budget_tokens, dense_parameters, active_parameters, dense_flops, budget_flops, ratio, verdict, equal, double, FORMULA,
        _reason(verdict), _rests_on(verdict, budget_tokens / dense_tokens),
    )  # fmt: skip


def _reason(verdict: Verdict) -> str:
    if verdict == "upcycle":
        return (
            "the budget is below what the dense model's training cost: upcycle. The report's rule says 'much less'; that below the same cost is enough "
            "is this project's reading, so the nearer the ratio is to 1, the less it says"
        )
    if verdict == "scratch":
        return f"the budget is at least {SCRATCH_FROM} times what the dense model's training cost: the report trains from scratch there"
    return (
        f"the budget lies between 1 and {SCRATCH_FROM} times what the dense model's training cost: the report gives no rule there. What decides is the "
        "learning rate (an upcycled model needs it raised again and a schedule of its own) and whether the experts come to specialise (copies begin alike; "
        "their similarity is the measure). A short trial of both does not tell: the upcycled model begins ahead"
    )


def _loss(budget: int, dense: int | None, learning_rate: str | None = None) -> float:
    """Of the published run with these numbers, tokens in billions."""
    wanted = (budget * 10**9, dense and dense * 10**9, learning_rate)
    return next(run.loss for run in PUBLISHED if (run.budget_tokens, run.dense_tokens, run.learning_rate) == wanted)


def _rests_on(verdict: Verdict, token_ratio: float) -> tuple[str, ...]:
    experiment = (
        "one experiment (Skywork-MoE report, section 3): a 0.3B dense model, 8 experts, losses read from plotted curves. "
        f"Budget 100B: from scratch {_loss(100, None):.3f}, from the dense model at 100B {_loss(100, 100):.3f}, from the one at 300B at its decayed rate "
        f"{_loss(100, 300, 'constant'):.3f}. Budget 300B: from scratch {_loss(300, None)}, from 100B {_loss(300, 100)}, from 300B at the decayed rate "
        f"{_loss(300, 300, 'constant')}, at 4 times that rate {_loss(300, 300, '4x')}"
    )
    learning_rate = (
        "the learning rate matters: to go on at the dense model's decayed rate was worst under both budgets, and the only one of these runs with fewer tokens "
        "than its dense model did that, and lost to training from scratch"
    )
    size = "nothing larger was published: how far the rule holds for other sizes, numbers of experts or data is not known"
    threshold = (
        "the report does not say how much 'much less' is. Here it is read as: less. With as many tokens as the dense model, upcycling won by "
        f"{_loss(100, None) - _loss(100, 100):.3f} in one published pair and lost by {_loss(300, 300, '4x') - _loss(300, None):.3f} in the other"
    )
    cost = f"that costs are counted in floating-point operations is this project's reading too; counted in tokens alone the ratio would be {token_ratio:.3g}"
    return (experiment, learning_rate, size, *([] if verdict == "scratch" else [threshold]), cost)


def advice_lines(advice: Advice) -> list[str]:
    """What a person reads."""
    share = advice.active_parameters / advice.dense_parameters
    title = {"upcycle": "upcycle the dense model", "scratch": "train from scratch", "either": "either; the report gives no rule"}[advice.verdict]
    return [
        f"advice: {title} (C_MoE / C_dense = {advice.ratio:.3g})",
        f"  {advice.reason}.",
        f"C_dense  {advice.dense_flops:.4g} FLOPs: {count(advice.dense_parameters)} parameters, {count(advice.dense_tokens)} tokens",
        f"C_MoE    {advice.budget_flops:.4g} FLOPs: {count(advice.active_parameters)} active parameters, {count(advice.budget_tokens)} tokens; "
        f"a token costs {share:.3g} times one of the dense model",
        f"  {advice.formula}",
        f"the same cost (ratio 1) is a budget of {count(advice.equal_cost_tokens)} tokens, twice the cost (ratio 2) one of {count(advice.double_cost_tokens)}",
        "this rests on:",
        *(f"  {sentence}." for sentence in advice.rests_on),
    ]


def advice_record(advice: Advice) -> dict[str, Any]:
    """The same for JSON, with the published runs and both limits of the ratio."""
    return {
        **asdict(advice), "rests_on": list(advice.rests_on), "upcycle_below": UPCYCLE_BELOW, "scratch_from": SCRATCH_FROM,
        "published": [asdict(run) for run in PUBLISHED],
    }  # fmt: skip
