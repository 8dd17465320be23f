"""The report's small parts on values: diffs, likeness, quantiles, prices, charts, the board."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from contracts.metrics import LATENCY_BUCKETS_S, SCORE_STEPS
from contracts.price import Price
from contracts.traffic import RequestRow
from serve.rollout.report import alike, chart, measures, words
from serve.rollout.report.board import outcomes, rank
from serve.rollout.report.cost import Served, cost
from serve.rollout.report.requests import Scan, Usage, _count
from serve.rollout.stats.bradley_terry import Games


def test_a_diff_gives_both_texts_back() -> None:
    """Nothing is lost or invented: each side's pieces are its text; what is equal is marked equal."""
    stable, canary = "Order 7 was cancelled, you get 5 EUR.", "Order 7 was shipped; you get 5 EUR."
    pieces = alike.diff(stable, canary)
    assert "".join(p.stable for p in pieces) == stable
    assert "".join(p.canary for p in pieces) == canary
    assert [(p.stable, p.canary) for p in pieces if not p.same] == [("cancelled,", "shipped;")]


def test_changes_with_a_space_between_are_one() -> None:
    """Two changed words are one mark, not two."""
    assert [p.stable for p in alike.diff("a big house", "a wee hut") if not p.same] == ["big house"]


def test_scripts_without_spaces_differ_by_sign() -> None:
    """Chinese is compared sign by sign, not as one long word."""
    changed = [(p.stable, p.canary) for p in alike.diff("订单已经取消", "订单已经发货") if not p.same]
    assert changed == [("取消", "发货")]
    assert alike.similarity(alike.words("订单在哪里"), alike.words("订单在哪儿")) == pytest.approx(4 / 6)


def test_long_texts_are_cut_and_say_so() -> None:
    """A page stays readable, a diff stays quick."""
    assert alike.cut("x" * 2500).endswith("… (500 more)")
    assert alike.cut("short") == "short"


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "image"}]}]},
            "p",
        ),
        ({"prompt": "once"}, "once"),
        ({"input": "say"}, "say"),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": "nonsense", "prompt": 7}, "nonsense"),
        ({}, None),
    ],
)
def test_what_was_asked(body: dict[str, object], asked: str | None) -> None:
    """The last thing a user said in any of the APIs' forms; None when the log keeps no text."""
    assert alike.prompt(body) == asked


def test_quantiles_beyond_the_last_bucket() -> None:
    """What is slower than every edge is 'over' the last one, not a number."""
    buckets = (0,) * len(LATENCY_BUCKETS_S) + (5,)
    found = measures.quantile(buckets, 0.5)
    assert found.at_most_s is None
    assert words.quantile(found) == "over 60 s"
    assert measures.shares(buckets) == [0.0] * len(LATENCY_BUCKETS_S)


def test_a_price_is_one_kind() -> None:
    """Tokens or hours, whole; zero is a price, nothing is not."""
    assert Price(prompt_per_million=0, completion_per_million=0).of_tokens(10, 10) == 0
    for wrong in ({}, {"prompt_per_million": 1}, {"per_hour": 1, "prompt_per_million": 1}):
        with pytest.raises(ValidationError, match="per_million"):
            Price(**wrong)


def test_a_fallback_is_part_of_an_arms_cost() -> None:
    """The assigned arm pays for who helped it out, at the helper's price, unless that is not known."""
    usage = {("canary", "s"): Usage(rows=3, prompt=300, completion=30), ("canary", "t"): Usage(1, 100, 10)}
    cheap, dear = (Price(prompt_per_million=p, completion_per_million=0) for p in (1.0, 10.0))
    served = Served(4, 40, 60.0)
    found = cost("canary", "s", usage, {"s": cheap, "t": dear}, served)
    assert found.per_1000 == pytest.approx(1000 * (300 * 1.0 + 100 * 10.0) / 1e6 / 4)
    assert cost("canary", "s", usage, {"s": cheap}, served).per_1000 is None
    euros = dear.model_copy(update={"currency": "EUR"})
    assert "different currencies" in cost("canary", "s", usage, {"s": cheap, "t": euros}, served).said


def test_a_cascade_costs_what_its_two_cost() -> None:
    """A passed-on request pays both, the held answer included; the cascade itself needs no price."""
    found = Scan()
    note = {"by": "s", "first": "s", "first_prompt_tokens": 140, "first_completion_tokens": 50}
    _count(found, cascade_row(100, 10, note))
    _count(found, cascade_row(120, 12, {**note, "by": "t", "reason": "unsure", "signal": -1.0}))
    assert found.usage["canary", "s"] == Usage(rows=1, prompt=280, completion=100)
    assert found.usage["canary", "t"] == Usage(rows=1, prompt=120, completion=12)
    cheap, dear = (Price(prompt_per_million=p, completion_per_million=0) for p in (1.0, 10.0))
    prices = {"smart": None, "s": cheap, "t": dear}
    served = Served(2, 40, 60.0)
    priced = cost("canary", "smart", found.usage, prices, served, cascade=True)
    assert priced.per_1000 == pytest.approx(1000 * (280 * 1.0 + 120 * 10.0) / 1e6 / 2)
    assert "upstreams.smart.cost" in cost("canary", "smart", found.usage, prices, served).said


def cascade_row(prompt: int, completion: int, note: dict[str, object]) -> RequestRow:
    return RequestRow.model_validate(
        {
            "request_id": "r", "ts": 1.0, "route": "support", "endpoint": "/v1/chat/completions",
            "arm": "canary", "served_arm": "canary", "reason": "random", "unit_kind": "header",
            "unit_hash": "0" * 16, "split_version": 1, "upstream": "smart", "model": "m", "stream": False,
            "status": 200, "outcome": "ok", "e2e_s": 1.0, "overhead_s": 0.0, "request": {},
            "prompt_tokens": prompt, "completion_tokens": completion, "cascade": note,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("high", "first", "last", "most"),
    [
        (30.0, "0 s", "30 s", 8),
        (600.0, "0 min", "10 min", 8),
        (86400.0, "0 h", "24 h", 9),
        (9e6, "0 d", "100 d", 8),
    ],
)
def test_time_ticks_are_round(high: float, first: str, last: str, most: int) -> None:
    """Seconds, minutes, hours, days: round numbers, few of them."""
    found = chart.time_ticks(0.0, high)
    assert (found[0][1], len(found) <= most) == (first, True)
    assert found[-1][1] == last or found[-1][0] <= high


def test_number_ticks_cover_the_range() -> None:
    """1, 2 or 5 times a power of ten, inside the range, at most five and one."""
    found = [v for v, _ in chart.ticks(-0.031, 0.187, str)]
    assert found == pytest.approx([0.0, 0.05, 0.1, 0.15])


def test_many_points_are_thinned_but_the_ends_stay() -> None:
    """A day of looks does not make a page of megabytes."""
    points = [(float(i), 0.0) for i in range(5000)]
    found = chart.thin(points)
    assert len(found) == 500
    assert (found[0], found[-1]) == (points[0], points[-1])


def test_outcomes_of_pairs() -> None:
    """Above a half the canary won, at a half it is a tie."""
    scores = [0] * (SCORE_STEPS + 1)
    scores[0], scores[SCORE_STEPS // 2], scores[SCORE_STEPS], scores[SCORE_STEPS // 2 + 1] = 3, 4, 5, 1
    assert outcomes(scores) == Games(wins=6, ties=4, losses=3)


def test_the_board_orders_students_that_never_met() -> None:
    """Both met the teacher: 75 % and 25 % wins are log odds of ±ln 3, shrunk a little by the prior."""
    rows = rank({("a", "t"): Games(300, 0, 100), ("b", "t"): Games(80, 40, 280)}, "t")
    assert [r.model for r in rows] == ["a", "t", "b"]
    assert rows[0].elo == pytest.approx(400 / math.log(10) * math.log(3), abs=3)
    assert rows[0].win_share == pytest.approx(0.75, abs=0.005)
    assert rows[1].elo == 0.0
    assert rows[2].low < rows[2].elo < rows[2].high < 0
    assert (rows[2].won, rows[2].tied, rows[2].lost, rows[2].games) == (80, 40, 280, 400)
    assert (rows[1].won, rows[1].lost) == (380, 380)
