"""The Bradley-Terry board: closed forms, another optimiser, and models that never lost or never met."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from serve.rollout.stats.bradley_terry import Games, Row, board, win_probability


def by_name(rows: tuple[Row, ...]) -> dict[str, Row]:
    """Rows by model."""
    return {row.name: row for row in rows}


def test_two_models_have_the_closed_form() -> None:
    """With hardly any prior the strength is the log odds, its deviation sqrt(1/(n p q)); ties are halves."""
    rows = by_name(board({("a", "b"): Games(60, 20, 20)}, reference="b", prior=1e-9))
    assert rows["a"].strength == pytest.approx(math.log(70 / 30), abs=1e-6)
    half = 1.959964 * math.sqrt(1 / (100 * 0.7 * 0.3))
    assert (rows["a"].low, rows["a"].high) == pytest.approx(
        (rows["a"].strength - half, rows["a"].strength + half), abs=1e-4
    )
    assert rows["a"].elo == pytest.approx(400 * math.log10(7 / 3), abs=1e-4)
    assert rows["b"] == Row("b", 0.0, 0.0, 0.0, 0.0, 100)
    assert win_probability(rows["a"], rows["b"]) == pytest.approx(0.7, abs=1e-6)


def test_it_is_the_maximum_that_another_optimiser_finds() -> None:
    """Four models, uneven games: the penalised likelihood's maximum by scipy's BFGS."""
    names = ["a", "b", "c", "d"]
    games = {
        ("a", "b"): Games(12, 3, 5), ("b", "c"): Games(9, 0, 9), ("c", "d"): Games(4, 8, 1),
        ("d", "a"): Games(2, 1, 17), ("b", "a"): Games(1, 0, 2),
    }  # fmt: skip

    def loss(theta: np.ndarray) -> float:
        total = 0.0
        for (first, second), (wins, ties, losses) in games.items():
            gap = theta[names.index(first)] - theta[names.index(second)]
            total += (wins + ties / 2) * np.logaddexp(0, -gap) + (losses + ties / 2) * np.logaddexp(0, gap)
        return float(total + 0.5 * (np.logaddexp(0, theta) + np.logaddexp(0, -theta)).sum())

    theirs = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    ours = by_name(board(games))
    assert [ours[n].strength for n in names] == pytest.approx(theirs - theirs.mean(), abs=1e-6)
    assert sum(row.strength for row in ours.values()) == pytest.approx(0.0, abs=1e-12)


def test_an_unbeaten_model_is_finite_and_first() -> None:
    """Without regularisation its strength would be infinite."""
    rows = board({("a", "b"): Games(30, 0, 0), ("b", "c"): Games(5, 5, 5)})
    assert rows[0].name == "a"
    assert 2.0 < rows[0].strength < 8.0
    assert rows[0].low < rows[0].strength < rows[0].high < 20.0


def test_models_that_never_met_are_comparable_but_barely() -> None:
    """Two islands of two: an answer, with wide intervals."""
    rows = by_name(board({("a", "b"): Games(40, 0, 20), ("c", "d"): Games(40, 0, 20)}, reference="c"))
    assert rows["a"].strength == pytest.approx(0.0, abs=1e-9)
    assert rows["a"].high - rows["a"].low > 2 * (rows["d"].high - rows["d"].low)


def test_order_of_the_pair_does_not_matter() -> None:
    """(a, b) with 3 wins is (b, a) with 3 losses, and both add up."""
    one = board({("a", "b"): Games(5, 2, 9)})
    other = board({("b", "a"): Games(6, 1, 4), ("a", "b"): Games(1, 1, 3)})
    assert [tuple(r) for r in one] == [pytest.approx(tuple(r)) for r in other]


def test_intervals_cover() -> None:
    """Two models 60 to 40, 200 boards of 100 games: 95 % intervals miss in 5 % plus 2.3 deviations."""
    wins = np.random.default_rng(1).binomial(100, 0.6, 200).tolist()
    truth = math.log(1.5)
    rows = [by_name(board({("a", "b"): Games(w, 0, 100 - w)}, reference="b"))["a"] for w in wins]
    missed = sum(not row.low <= truth <= row.high for row in rows)
    assert missed <= 200 * 0.05 + 2.33 * math.sqrt(200 * 0.05 * 0.95)


def test_nobody_played_an_empty_board() -> None:
    """Before the first verdict there is nothing to show."""
    assert board({}) == ()


@pytest.mark.parametrize(
    ("games", "options", "says"),
    [
        ({("a", "a"): Games(1, 0, 0)}, {}, "cannot count"),
        ({("a", "b"): Games(1, -1, 0)}, {}, "cannot count"),
        ({("a", "b"): Games(1, 0, 0)}, {"reference": "z"}, "'z' played no game; there are: a, b"),
        ({("a", "b"): Games(1, 0, 0)}, {"prior": 0.0}, "prior 0.0 must be above 0"),
    ],
)
def test_bad_input_is_refused(
    games: dict[tuple[str, str], Games], options: dict[str, float], says: str
) -> None:
    """The message names what is wrong."""
    with pytest.raises(ValueError, match=says):
        board(games, **options)  # type: ignore[arg-type]
