"""How a judge's agreement with people is computed: against worked examples and exact properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.grading.agreement import Anchor, agrees, kappa, position_bias, wilson

A, B, TIE = 1.0, 0.0, 0.5
ASKED = {"messages": [{"role": "user", "content": "x"}]}


def test_wilson_is_the_published_interval() -> None:
    """Newcombe (1998), table I: 81 of 263 is 0.2553 to 0.3662, 15 of 148 0.0624 to 0.1605, 0 of 20 0 to
    0.1611."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(hits, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_share_and_mirrors(case: tuple[int, int]) -> None:
    """The share lies inside; hits and misses change places with the ends."""
    hits, n = case
    low, high = wilson(hits, n)
    assert 0.0 <= low <= hits / n + 1e-12
    assert hits / n - 1e-12 <= high <= 1.0
    assert wilson(n - hits, n) == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_kappa_is_cohens() -> None:
    """A table with 20 and 15 agreements, 5 and 10 disagreements: observed 0.7, by chance 0.5, kappa 0.4."""
    said = [A] * 20 + [A] * 5 + [B] * 10 + [B] * 15
    truth = [A] * 20 + [B] * 5 + [A] * 10 + [B] * 15
    assert kappa(said, truth, pairwise=True) == pytest.approx(0.4)
    assert kappa([A, B, TIE], [A, B, TIE], pairwise=True) == pytest.approx(1.0)
    assert kappa([A, A], [A, A], pairwise=True) is None
    assert kappa([], [], pairwise=True) is None


def test_an_unreadable_verdict_is_no_agreement() -> None:
    """It counts against the judge in the share and in kappa."""
    assert not agrees(None, A, pairwise=True)
    assert kappa([A, B, None, None], [A, B, A, B], pairwise=True) == pytest.approx((0.5 - 0.25) / 0.75)


def test_kappa_of_scores_weighs_by_distance() -> None:
    """Quadratic weights: exact scores are 1, reversed ones -1, a near miss costs little."""
    truth = [0.0, 0.5, 1.0]
    assert kappa(truth, truth, pairwise=False) == pytest.approx(1.0)
    assert kappa([1.0, 0.5, 0.0], truth, pairwise=False) == pytest.approx(-1.0)
    near, far = (kappa([s, 0.5, 1.0], truth, pairwise=False) for s in (0.1, 0.9))
    assert near is not None
    assert far is not None
    assert 1.0 > near > far
    assert kappa([None], [0.5], pairwise=False) is None


def test_scores_agree_within_a_fifth() -> None:
    """0.2 apart still agrees, more does not; pairs must say the same word."""
    assert agrees(0.7, 0.5, pairwise=False)
    assert not agrees(0.71, 0.5, pairwise=False)
    assert not agrees(TIE, A, pairwise=True)


def test_position_bias_is_told_from_a_preference() -> None:
    """A judge that always says the first is biased and flips; one that always says a is neither."""
    always_first = position_bias([A, A, A], [B, B, B])
    assert always_first == (1.0, 1.0)
    assert position_bias([A, A, A], [A, A, A]) == (0.5, 0.0)
    assert position_bias([TIE, None], [TIE, A]) == (0.0, 0.0)
    assert position_bias([], []) == (None, None)
    assert math.isclose(position_bias([A, B], [B, B])[0] or 0.0, 0.75)


@pytest.mark.parametrize(
    "fields",
    [
        {"answer_a": "x", "answer_b": "y"},
        {"answer_a": "x", "answer_b": "y", "human": "c"},
        {"answer": "x", "human_score": 7},
        {"answer": "x", "human_score": 0.5, "human": "a"},
        {"answer_a": "x", "answer_b": "y", "human": "a", "answer": "z"},
        {},
    ],
)
def test_an_anchor_is_one_judgement(fields: dict[str, object]) -> None:
    """Half a row, two forms in one, or a score on another scale is refused."""
    with pytest.raises(ValidationError):
        Anchor.model_validate({"request": ASKED, **fields})
