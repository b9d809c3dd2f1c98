"""The report's rule with numbers worked out by hand, at its borders, and with nonsense."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_skywork.config.load import load_config
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.parameters import count_parameters
from megatron_skywork.plan.upcycle_or_scratch import PUBLISHED, advice_lines, advice_record, advise, parse_tokens

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
T, B = 10**12, 10**9


def test_skywork_13b_by_hand():
    """13.85 B parameters on 3.2 T tokens; a token of the mixture uses 22.69 B."""
    dense, active = 13_854_113_280, 22_691_271_168
    assert dense == count_parameters(load_config([str(CONFIGS / "skywork_13b.yaml")], [], 512)).active
    assert active == count_parameters(load_config([str(CONFIGS / "skywork_moe_146b.yaml")], [], 1536)).active
    advice = advise(3_200 * B, 500 * B, dense, active)
    assert advice.dense_flops == 265_998_974_976_000_000_000_000 and advice.budget_flops == 68_073_813_504_000_000_000_000
    assert advice.ratio == pytest.approx(0.25592, abs=1e-5) and advice.verdict == "upcycle"
    # 3.2 T * 13.854 / 22.691
    assert advice.equal_cost_tokens / T == pytest.approx(1.95375, abs=1e-5) and advice.double_cost_tokens / T == pytest.approx(3.9075, abs=1e-4)


@pytest.mark.parametrize(("budget", "ratio", "verdict"), [
    (1, 0.003, "upcycle"), (333, 0.999, "upcycle"), (334, 1.002, "either"), (500, 1.5, "either"), (666, 1.998, "either"), (667, 2.001, "scratch"),
    (10**6, 3000, "scratch"),
])  # fmt: skip
def test_ratio_and_borders(budget: int, ratio: float, verdict: str):
    """Dense 100 parameters, 1000 tokens; the mixture uses 300: 333.3 tokens cost the same, 666.7 twice as much."""
    advice = advise(1000, budget, 100, 300)
    assert (advice.dense_flops, advice.budget_flops) == (600_000, 1800 * budget)
    assert advice.ratio == pytest.approx(ratio) and advice.verdict == verdict
    assert (advice.equal_cost_tokens, advice.double_cost_tokens) == (334, 667), "the first whole budgets on the other side"


@pytest.mark.parametrize(("budget", "verdict"), [(1000, "either"), (999, "upcycle"), (2000, "scratch"), (1999, "either")])
def test_exactly_once_and_twice_the_cost(budget: int, verdict: str):
    assert advise(1000, budget, 100, 100).verdict == verdict
    # Where a double cannot tell one token from none, whole numbers still do.
    assert advise(10**17, budget * 10**14, 10**12, 10**12).verdict == advise(1000, budget, 100, 100).verdict
    assert advise(10**17, 10**17 - 1, 10**12, 10**12).verdict == "upcycle" and advise(10**17, 2 * 10**17 - 1, 10**12, 10**12).verdict == "either"


def test_the_budgets_named_are_where_the_verdict_changes():
    for dense_tokens, dense, active in ((3_200 * B, 13_854_113_280, 22_691_271_168), (7, 3, 5), (300 * B, 301_989_888, 478_150_656)):
        named = advise(dense_tokens, 1, dense, active)
        around = [advise(dense_tokens, max(1, tokens), dense, active).verdict for tokens in (
            named.equal_cost_tokens - 1, named.equal_cost_tokens, named.double_cost_tokens - 1, named.double_cost_tokens)]  # fmt: skip
        assert around == ["upcycle", "either", "either", "scratch"]


@pytest.mark.parametrize(("budget", "title", "rule"), [
    (10, "upcycle the dense model", "this project's reading"), (1500, "the report gives no rule", "learning rate"),
    (5000, "train from scratch", "at least 2 times"),
])  # fmt: skip
def test_what_a_person_reads(budget: int, title: str, rule: str):
    advice = advise(1000, budget, 10 * B, 10 * B)
    text = "\n".join(advice_lines(advice))
    assert title in text.splitlines()[0] and rule in text
    for said in ("0.3B dense model, 8 experts", "learning rate matters", "nothing larger was published", "6 * parameters", "output layer counted",
                 "10 B parameters", f"in tokens alone the ratio would be {budget / 1000:g}"):  # fmt: skip
        assert said in text, said
    for run in PUBLISHED:
        assert f"{run.loss}" in text
    assert not re.search(r"\.\.|\bNone\b", text)
    assert max(map(len, advice_lines(advice))) < 500


def test_published_figures():
    """Facts of the report's figure, by budget: from scratch, from 100B, from 300B at constant and at 4 times the rate."""
    losses = {(run.budget_tokens // B, run.dense_tokens and run.dense_tokens // B, run.learning_rate): run.loss for run in PUBLISHED}
    assert losses == {
        (300, None, None): 2.2016, (300, 100, None): 2.2331, (300, 300, "constant"): 2.2498, (300, 300, "4x"): 2.2329,
        (100, None, None): 2.265, (100, 100, None): 2.260, (100, 300, "constant"): 2.287,
    }  # fmt: skip
    threshold = next(sentence for sentence in advise(10, 5, 1, 1).rests_on if "'much less'" in sentence)
    assert "won by 0.005" in threshold and "lost by 0.031" in threshold
    assert not any("'much less'" in sentence for sentence in advise(1, 5, 1, 1).rests_on), "the threshold has no part in this verdict"


def test_the_record_is_json_and_complete():
    advice = advise(1000, 500, 100, 300)
    record = json.loads(json.dumps(advice_record(advice)))
    assert record["verdict"] == "either" and record["ratio"] == 1.5 and record["equal_cost_tokens"] == 334 and record["dense_flops"] == 600_000
    assert (record["upcycle_below"], record["scratch_from"]) == (1, 2) and len(record["published"]) == 7 and record["rests_on"] == list(advice.rests_on)
    assert record["published"][0] == {"budget_tokens": 100 * B, "dense_tokens": None, "learning_rate": None, "loss": 2.265}


def test_all_wrong_numbers_are_named_together():
    with pytest.raises(ConfigError) as error:
        advise(0, -5, 0, 0)
    assert error.value.problems == [
        "--dense-tokens=0: must be at least 1", "--budget-tokens=-5: must be at least 1", "dense parameters=0: must be at least 1",
        "active parameters=0: must be at least 1",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "tokens"), [
    ("3.2T", 3_200_000_000_000), ("300B", 300 * B), ("300b", 300 * B), (" 300 B ", 300 * B), ("100e9", 100 * B), ("100E+9", 100 * B), ("1.5e3", 1500),
    ("5000000", 5_000_000), ("5_000_000", 5_000_000), ("500M", 500_000_000), ("64K", 64_000), ("8.2T", 8_200_000_000_000), ("0.001K", 1), ("1", 1),
    ("1e18", 10**18), ("1.0", 1), ("007", 7),
])  # fmt: skip
def test_tokens_as_people_write_them(text: str, tokens: int):
    found = parse_tokens(text, "--dense-tokens")
    assert found == tokens and type(found) is int


@pytest.mark.parametrize("text", [
    "", " ", "many", "T", "-1", "-3T", "+3T", "3,2T", "3,200B", "3.T", ".5T", "1e", "1e-3", "100e9B", "3.2 TB", "3.2TT", "nan", "inf", "0x10", "1__0",
    "_1", "1.2.3", "٣B", "3 2 B", "1e999999999", "3.2T\n4",
])  # fmt: skip
def test_what_is_no_number_is_refused(text: str):
    with pytest.raises(ConfigError) as error:
        parse_tokens(text, "--budget-tokens")
    assert str(error.value) == f"--budget-tokens={text!r}: is no number of tokens; write it as 3.2T, 300B, 500M, 100e9 or 5000000"


@pytest.mark.parametrize(("text", "says"), [
    ("0", "between 1 and 1e18"), ("0T", "between 1 and 1e18"), ("0.5", "between 1 and 1e18"), ("1e19", "between 1 and 1e18"),
    ("1000001T", "between 1 and 1e18"), ("9" * 6000, "between 1 and 1e18"), ("3.2", "is a unit missing"), ("1.0005K", "no whole number"),
])  # fmt: skip
def test_numbers_no_one_means_are_refused(text: str, says: str):
    with pytest.raises(ConfigError, match=says) as error:
        parse_tokens(text, "--dense-tokens")
    assert str(error.value).startswith(f"--dense-tokens={text!r}: ") and "3.2T" in str(error.value)
