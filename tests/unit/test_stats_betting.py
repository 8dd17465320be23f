"""Bets on two arms' scores: exact validity, oracles, type-I error, invariances, power."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial

from contracts.metrics import SCORE_STEPS, pass_fail
from serve.rollout.stats import betting, two_sample

TOLERANCE, MARGIN = 0.05, 0.2
LEVELS = (0, SCORE_STEPS // 2, SCORE_STEPS)
"""Bins of the scores 0, 1/2 and 1, on which outcomes are enumerated."""

Probabilities = tuple[float, float, float]


def counted(outcome: tuple[int, ...]) -> tuple[int, ...]:
    """Counts on SCORE_VALUES from counts of 0, 1/2 and 1."""
    counts = [0] * (SCORE_STEPS + 1)
    for at, n in zip(LEVELS, outcome, strict=True):
        counts[at] = n
    return tuple(counts)


def outcomes(n: int) -> list[tuple[int, ...]]:
    """Every way to score n answers with 0, 1/2 or 1."""
    return [(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]


def chances(n: int, of: Probabilities) -> np.ndarray:
    """Chance of each of `outcomes`."""
    return multinomial.pmf(np.array(outcomes(n)), n, of)


@pytest.fixture(scope="module")
def everything() -> tuple[np.ndarray, np.ndarray]:
    """E-values (harm, non-inferiority) of every course of three windows: 2 stable answers, 1 canary."""
    window = list(itertools.product(outcomes(2), outcomes(1)))
    states = [betting.start()]
    for _ in range(3):
        states = [
            betting.look(s, counted(b), counted(c), TOLERANCE, MARGIN) for s in states for b, c in window
        ]
    shape = (len(window),) * 3
    harm = np.exp([betting.log_harm(s) for s in states]).reshape(shape)
    good = np.exp([betting.log_noninferior(s) for s in states]).reshape(shape)
    return harm, good


def expected(e: np.ndarray, arms: list[tuple[Probabilities, Probabilities]]) -> float:
    """E[e] when the windows' (stable, canary) scores are distributed like this."""
    first, second, third = (np.outer(chances(2, b), chances(1, c)).ravel() for b, c in arms)
    return float(np.einsum("abc,a,b,c->", e, first, second, third))


def shifted(of: Probabilities, by: float) -> Probabilities:
    """A distribution whose mean is higher by `by`: chance moves from 0 to 1."""
    return of[0] - by, of[1], of[2] + by


STABLE: list[Probabilities] = [(0.3, 0.0, 0.7), (0.5, 0.2, 0.3), (0.25, 0.5, 0.25), (0.4, 0.6, 0.0)]


@pytest.mark.parametrize("below", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("course", [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (0, 3, 1), (2, 0, 3)])
def test_noninferiority_is_valid_on_the_whole_null(
    everything: tuple[np.ndarray, np.ndarray], course: tuple[int, ...], below: float
) -> None:
    """E[e] <= 1 at the margin and below it, also when both arms drift from window to window."""
    arms = [(shifted(STABLE[i], 0.2), shifted(STABLE[i], -min(below, STABLE[i][2]))) for i in course]
    assert expected(everything[1], arms) <= 1.0 + 1e-12


@pytest.mark.parametrize("above", [-TOLERANCE, 0.0, 0.2])
@pytest.mark.parametrize("course", [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (0, 3, 1), (2, 0, 3)])
def test_harm_is_valid_on_the_whole_null(
    everything: tuple[np.ndarray, np.ndarray], course: tuple[int, ...], above: float
) -> None:
    """E[e] <= 1 wherever the canary's mean is at least the stable's minus the tolerance."""
    arms = [(STABLE[i], shifted(STABLE[i], max(above, -STABLE[i][2]))) for i in course]
    assert expected(everything[0], arms) <= 1.0 + 1e-12


def test_it_is_not_valid_by_being_useless(everything: tuple[np.ndarray, np.ndarray]) -> None:
    """Both tests gain beyond their nulls, within as few as two windows that count."""
    harmed: Probabilities = (1.0, 0.0, 0.0)
    perfect: Probabilities = (0.0, 0.0, 1.0)
    assert expected(everything[0], [(perfect, harmed)] * 3) > 2.0
    assert expected(everything[1], [(perfect, perfect)] * 3) > 1.1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=21, max_size=21),
    st.lists(st.integers(0, 3), min_size=21, max_size=21),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_every_bet_keeps_its_capital_positive_and_fair(
    stable: list[int], canary: list[int], n_b: int, n_c: int
) -> None:
    """Whatever was learned: at the boundary each strategy's factor has mean at most 1, and none is ruined."""
    state = betting.look(betting.start(), (*stable[:-1], stable[-1] + 1), canary, TOLERANCE, MARGIN)
    worst = betting.look(state, pass_fail(n_b, 0), pass_fail(0, n_c), TOLERANCE, MARGIN)
    best = betting.look(state, pass_fail(0, n_b), pass_fail(n_c, 0), TOLERANCE, MARGIN)
    assert all(math.isfinite(v) for s in (worst, best) for v in (*s.harm, *s.noninferior))
    for of, index, distance in (("harm", 2, TOLERANCE), ("noninferior", 3, MARGIN)):
        for p_b in (0.3, 0.9):
            gains = np.zeros(len(getattr(state, of)))
            for k_b, k_c in itertools.product(range(n_b + 1), range(n_c + 1)):
                after = betting.look(
                    state, pass_fail(k_b, n_b - k_b), pass_fail(k_c, n_c - k_c), TOLERANCE, MARGIN
                )
                chance = math.comb(n_b, k_b) * p_b**k_b * (1 - p_b) ** (n_b - k_b)
                p_c = p_b - distance
                chance *= math.comb(n_c, k_c) * p_c**k_c * (1 - p_c) ** (n_c - k_c)
                gains += chance * np.exp(np.array(after[index]) - np.array(state[index]))
            assert gains.max() <= 1.0 + 1e-9


def test_on_verdicts_the_product_is_the_likelihood_ratio_of_the_block_e_variable() -> None:
    """Two derivations: at TLG's projection and its λ, bets on 0 and 1 are two_sample's e-value."""
    n_b, k_b, n_c, k_c, alt_b, alt_c, delta = 27, 2, 3, 1, 0.04, 0.3, 0.0125
    x = two_sample.boundary_projection(n_b, n_c, alt_b, alt_c, delta)
    y = x + delta
    lam = (alt_c - y) / (y * (1 - y))
    assert -lam * n_c / n_b == pytest.approx((alt_b - x) / (x * (1 - x)), rel=1e-6)
    failed = [[(0.0, n - k), (1.0, k)] for n, k in ((n_c, k_c), (n_b, k_b))]
    product = betting.log_wealth(failed[0], lam, y) + betting.log_wealth(failed[1], -lam * n_c / n_b, x)
    assert product == pytest.approx(
        two_sample.block_log_e(two_sample.Window(n_b, k_b, n_c, k_c), alt_b, alt_c, delta), abs=1e-6
    )


def test_harm_looks_at_the_canary_and_not_at_stable() -> None:
    """Low scores of the canary raise harm, the same scores of stable lower it (GrowthBook #6020)."""
    good, bad = pass_fail(95, 5), pass_fail(70, 30)
    canary_bad = stable_bad = betting.start()
    for _ in range(4):
        canary_bad = betting.look(canary_bad, good, bad, 0.0125, 0.05)
        stable_bad = betting.look(stable_bad, bad, good, 0.0125, 0.05)
    assert betting.log_harm(canary_bad) > math.log(1e3)
    assert betting.log_noninferior(canary_bad) < 0.0
    assert betting.log_harm(stable_bad) < 0.0
    assert betting.log_noninferior(stable_bad) > math.log(1e3)


@pytest.mark.parametrize(
    "window", [(pass_fail(9, 1), ()), ((), pass_fail(3, 3)), ((), ()), ((0,) * 21, (0,) * 21)]
)
def test_a_window_without_one_arm_compares_nothing(window: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """It multiplies by 1 in either direction; the moments may still learn."""
    state = betting.start()
    for _ in range(2):
        state = betting.look(state, pass_fail(50, 5), pass_fail(8, 2), 0.01, 0.05)
    after = betting.look(state, *window, 0.01, 0.05)
    assert state.harm[0] != 0.0
    assert (after.harm, after.noninferior) == (state.harm, state.noninferior)


def test_the_bets_ignore_the_window_they_are_placed_on() -> None:
    """Predictability: λ is fixed before the window, so its gain is additive over its scores."""
    state = betting.look(betting.start(), pass_fail(90, 10), pass_fail(9, 1), 0.01, 0.05)
    stable = pass_fail(10, 0)
    gains = [
        np.array(betting.look(state, stable, canary, 0.01, 0.05).harm) - np.array(state.harm)
        for canary in (pass_fail(2, 0), pass_fail(1, 1), pass_fail(0, 2))
    ]
    assert gains[0] + gains[2] == pytest.approx(2 * gains[1], abs=1e-12)
    assert gains[0] != pytest.approx(gains[2], abs=1e-3)


def test_a_broken_student_is_found_within_a_handful_of_scores() -> None:
    """Three answers scored 0 against a stable of 0.95: thrown back at the first percent of traffic."""
    state = betting.start()
    for _ in range(5):
        state = betting.look(state, pass_fail(57, 3), (), 0.0125, 0.05)
    for _ in range(4):
        state = betting.look(state, pass_fail(57, 3), pass_fail(0, 1), 0.0125, 0.05)
    assert betting.log_harm(state) > math.log(4 / 0.05)


def test_counts_of_another_length_are_refused() -> None:
    """A histogram on another grid would be read as wrong scores."""
    with pytest.raises(ValueError, match="expected 21 counts"):
        betting.look(betting.start(), (1, 2, 3), pass_fail(1, 1), 0.01, 0.05)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.lists(st.sampled_from([0, 0, 1, 10**6]), min_size=21, max_size=21)] * 2),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from([(0.0, 0.0), (0.0, 1e-6), (0.01, 0.05), (0.9, 0.999)]),
)
def test_no_counts_make_it_overflow_or_lose_everything(
    windows: list[tuple[list[int], list[int]]], distances: tuple[float, float]
) -> None:
    """Empty, tiny, huge and lopsided windows, and margins from none to all: e-values stay finite."""
    state = betting.start()
    for b, c in windows:
        state = betting.look(state, b, c, *distances)
        assert all(math.isfinite(v) for part in state for v in part)
        assert math.isfinite(betting.log_harm(state) + betting.log_noninferior(state))


COUNTS = st.one_of(st.just(()), st.lists(st.integers(0, 50), min_size=21, max_size=21).map(tuple))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=6))
def test_state_survives_json_to_the_last_bit(windows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Stored and read again at every look, it goes on exactly as if it had not been."""
    kept = stored = betting.start()
    for b, c in windows:
        kept = betting.look(kept, b, c, 0.01, 0.05)
        stored = betting.look(betting.load(json.loads(json.dumps(betting.dump(stored)))), b, c, 0.01, 0.05)
    assert stored == kept


def spread(rng: np.random.Generator, mean: float, n: int) -> tuple[int, ...]:
    """n scores around a mean, as a judge gives them who knows five grades."""
    drawn = 5 * rng.binomial(4, rng.beta(8 * mean, 8 * (1 - mean), n))
    return tuple(np.bincount(drawn, minlength=SCORE_STEPS + 1).tolist())


def ever(mean_b: float, mean_c: float, seed: int, looks: int = 60) -> tuple[bool, bool]:
    """Was harm (tolerance 0), was non-inferiority (margin 0.05) ever shown at alpha 0.05? Both arms drift."""
    rng = np.random.default_rng(seed)
    state, harm, good = betting.start(), False, False
    for t in range(looks):
        drift = 0.05 * math.sin(t / 7)
        stable, canary = spread(rng, mean_b + drift, 40), spread(rng, mean_c + drift, 8)
        state = betting.look(state, stable, canary, 0.0, 0.05)
        harm = harm or betting.log_harm(state) >= math.log(20)
        good = good or betting.log_noninferior(state) >= math.log(20)
    return harm, good


def test_type_one_errors_stay_below_alpha_under_drift() -> None:
    """200 runs of 50 looks: alarms at equal arms, passes at the margin: 5 % plus 2.3 binomial deviations."""
    bound = 200 * 0.05 + 2.33 * math.sqrt(200 * 0.05 * 0.95)
    assert sum(ever(0.75, 0.75, seed, 50)[0] for seed in range(200)) <= bound
    assert sum(ever(0.75, 0.70, seed, 50)[1] for seed in range(200)) <= bound


def test_power_on_scores() -> None:
    """Equal arms are shown non-inferior and a tenth worse is shown harmful, within 480 canary answers."""
    assert sum(ever(0.75, 0.75, seed)[1] for seed in range(40)) >= 30
    assert sum(ever(0.75, 0.65, seed)[0] for seed in range(40)) >= 38
