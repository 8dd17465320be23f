"""Confidence sequences: ville as an oracle, coverage at all times at once, and what biases them not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import ville
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.metrics import SCORE_STEPS, SCORE_VALUES, pass_fail
from serve.rollout.stats import betting, sequences
from serve.rollout.stats.combine import log_mean_exp
from serve.rollout.stats.two_sample import Window


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 400), (399, 400), (170, 350)])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_rates_are_villes_beta_binomial_sequence(k: int, n: int, alpha: float) -> None:
    """The same bounds as an independent implementation, rare and sure rates included."""
    theirs = ville.BernoulliCS(alpha=alpha, intersect=False).fit([1.0] * k + [0.0] * (n - k))
    ours = sequences.rate(k, n, alpha)
    assert ours.estimate == k / n
    assert (ours.low, ours.high) == pytest.approx((theirs.lower_[-1], theirs.upper_[-1]), abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=21, max_size=21))
def test_the_mean_is_between_its_bounds_and_mirrors(counts: list[int]) -> None:
    """0 <= low <= estimate <= high <= 1; scores turned around turn the interval around."""
    low, estimate, high = sequences.mean(counts)
    assert 0.0 <= low <= estimate <= high <= 1.0
    turned = sequences.mean(counts[::-1])
    assert (1 - turned.high, 1 - turned.low) == pytest.approx((low, high), abs=1e-6)


def test_means_are_about_as_narrow_as_villes_betting_sequence() -> None:
    """Other bets, the same method: widths within a quarter of each other after 600 scores."""
    rng = np.random.default_rng(4)
    drawn = rng.binomial(SCORE_STEPS, rng.beta(7, 3, 600))
    ours = sequences.mean(np.bincount(drawn, minlength=SCORE_STEPS + 1).tolist())
    low, high = ville.BettingCS(grid=2000).fit(np.array(SCORE_VALUES)[drawn]).interval()
    assert 0.75 <= (ours.high - ours.low) / (high - low) <= 1.25


def test_the_mean_is_covered_at_all_times() -> None:
    """200 streams, looked at 12 times each: missed ever in at most 5 % plus 2.3 binomial deviations."""
    rng, missed = np.random.default_rng(6), 0
    for stream in 5 * rng.binomial(4, rng.beta(4, 1, (200, 300))):
        for n in np.geomspace(3, 300, 12).astype(int).tolist():
            found = sequences.mean(np.bincount(stream[:n], minlength=SCORE_STEPS + 1).tolist())
            if not found.low <= 0.8 <= found.high:
                missed += 1
                break
    assert missed <= 200 * 0.05 + 2.33 * math.sqrt(200 * 0.05 * 0.95)


def drifting(rng: np.random.Generator, difference: float, looks: int) -> list[Window]:
    """A ramp 1-10-50 % with an incident of both arms in the middle of it."""
    found = []
    for t in range(looks):
        share, base = (0.01, 0.1, 0.5)[3 * t // looks], 0.03 if t % 20 < 15 else 0.2
        n_c = int(rng.binomial(300, share))
        k = int(rng.binomial(300 - n_c, base)), int(rng.binomial(n_c, base + difference))
        found.append(Window(300 - n_c, k[0], n_c, k[1]))
    return found


def test_the_difference_is_covered_at_all_times_through_ramp_and_incident() -> None:
    """40 rollouts of 60 looks: the true difference is missed ever in at most 5 % plus slack."""
    rng, missed = np.random.default_rng(8), 0
    for _ in range(40):
        found = sequences.risk_difference(drifting(rng, 0.02, 60))
        missed += any(not i.low <= 0.02 <= i.high for i in found)
    assert missed <= 40 * 0.05 + 2.33 * math.sqrt(40 * 0.05 * 0.95)


def log_wealth_above(windows: list[Window], delta: float) -> float:
    """Log of the capital of who bets that the difference is above delta, one delta at a time."""
    stable = canary = betting.Moments()
    logs = [0.0] * len(sequences._FRACTIONS)
    for w in windows:
        b, c = [(0.0, w.n_b - w.k_b), (1.0, w.k_b)], [(0.0, w.n_c - w.k_c), (1.0, w.k_c)]
        ratio = w.n_c / w.n_b
        if stable.n > 0:
            record = betting.record_of(stable, canary)
            at, base = betting.centres(stable, record, ratio, -delta)
            for i, f in enumerate(sequences._FRACTIONS):
                lam = f * min(1 / max(at, 0.005), 1 / (ratio * (1 - base)))
                logs[i] += betting.log_wealth(c, lam, at) + betting.log_wealth(b, -lam * ratio, base)
        stable, canary = betting.remember(stable, b), betting.remember(canary, c)
    return log_mean_exp(logs)


def test_the_lower_bound_is_where_a_bet_on_more_has_won_two_over_alpha() -> None:
    """Each direction gets half of alpha: the capital passes 2/alpha between just below and just above it."""
    rng = np.random.default_rng(10)
    windows = [Window(270, int(rng.binomial(270, 0.02)), 30, int(rng.binomial(30, 0.1))) for _ in range(40)]
    for alpha in (0.05, 0.2):
        low = sequences.risk_difference(windows, alpha)[-1].low
        level = math.log(2 / alpha)
        assert log_wealth_above(windows, low - 0.002) >= level > log_wealth_above(windows, low + 0.002)


def test_a_ramp_does_not_bias_the_difference() -> None:
    """An incident while the canary is at 50 % inflates its pooled rate; the estimate stays at zero."""
    quiet, incident = [Window(2970, 30, 30, 0)] * 10, [Window(1500, 150, 1500, 150)] * 10
    found = sequences.risk_difference(quiet + incident)
    pooled = 1500 / 15300 - 1800 / 44700
    assert pooled > 0.05
    assert abs(found[-1].estimate) < 0.001
    assert found[-1].low < 0.0 < found[-1].high


def test_the_difference_narrows_and_finds_its_sign() -> None:
    """+5 points are told from zero after an hour, and the interval is a tenth of the first one."""
    rng = np.random.default_rng(9)
    windows = [Window(270, int(rng.binomial(270, 0.01)), 30, int(rng.binomial(30, 0.06))) for _ in range(60)]
    found = sequences.risk_difference(windows)
    assert found[0] == pytest.approx((-1.0, found[0].estimate, 1.0))
    assert found[-1].low > 0.0
    assert found[-1].high - found[-1].low < 0.2 * (found[0].high - found[0].low)


def test_scores_and_swapped_arms() -> None:
    """The canary's scores minus the stable's; swapped arms give about the opposite."""
    better = [(pass_fail(60, 40), pass_fail(80, 20))] * 6
    ours = sequences.difference(better)[-1]
    swapped = sequences.difference([(c, b) for b, c in better])[-1]
    assert ours.estimate == pytest.approx(0.2)
    assert 0.0 < ours.low < 0.2 < ours.high
    assert (-swapped.high, -swapped.low) == pytest.approx((ours.low, ours.high), abs=0.02)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.lists(st.sampled_from([0, 0, 1, 5000]), min_size=21, max_size=21)] * 2),
        min_size=1,
        max_size=4,
    )
)
def test_no_counts_break_an_interval(windows: list[tuple[list[int], list[int]]]) -> None:
    """Empty, tiny, huge and lopsided windows: -1 <= low <= estimate <= high <= 1, never NaN."""
    for low, estimate, high in sequences.difference(windows):
        assert -1.0 - 1e-9 <= low <= estimate <= high <= 1.0 + 1e-9


def test_without_data_everything_is_possible() -> None:
    """No counts, one arm only, no windows."""
    assert sequences.rate(0, 0) == (0.0, 0.5, 1.0)
    assert sequences.mean((0,) * 21) == (0.0, 0.5, 1.0)
    assert sequences.difference([]) == []
    (one,) = sequences.difference([(pass_fail(30, 3), ())])
    assert (one.low, one.high) == pytest.approx((-1.0, 1.0))
    with pytest.raises(ValueError, match="3 of 2"):
        sequences.rate(3, 2)
