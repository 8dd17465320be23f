"""Bets on judged pairs: exact validity, ville as an oracle, and half the samples of unpaired scores."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import ville
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial

from contracts.metrics import SCORE_STEPS, SCORE_VALUES, pass_fail
from serve.rollout.stats import betting, pairs

TOLERANCE, MARGIN = 0.05, 0.1


def judged(losses: int, ties: int, wins: int) -> tuple[int, ...]:
    """Counts of z."""
    half = (0,) * (SCORE_STEPS // 2 - 1)
    return (losses, *half, ties, *half, wins)


OUTCOMES = [(i, j, 3 - i - j) for i in range(4) for j in range(4 - i)]
"""Every (losses, ties, wins) of three pairs."""


@pytest.fixture(scope="module")
def everything() -> tuple[np.ndarray, np.ndarray]:
    """E-values (harm, non-inferiority) of every course of three windows with three pairs each."""
    states = [pairs.start()]
    for _ in range(3):
        states = [pairs.look(s, judged(*o), TOLERANCE, MARGIN) for s in states for o in OUTCOMES]
    shape = (len(OUTCOMES),) * 3
    harm, good = ([f(s) for s in states] for f in (pairs.log_harm, pairs.log_noninferior))
    return np.exp(harm).reshape(shape), np.exp(good).reshape(shape)


def expected(e: np.ndarray, *of: tuple[float, float, float]) -> float:
    """E[e] when the windows' losses, ties and wins have these chances."""
    return float(np.einsum("abc,a,b,c->", e, *(multinomial.pmf(np.array(OUTCOMES), 3, p) for p in of)))


def at_mean(z: float, ties: float) -> tuple[float, float, float]:
    """Chances of loss, tie and win with mean z."""
    win = z - ties / 2
    return 1 - ties - win, ties, win


@pytest.mark.parametrize("mean", [0.4, 0.35, 0.2])
@pytest.mark.parametrize("ties", [0.0, 0.1, 0.4])
def test_noninferiority_is_valid_on_the_whole_null(
    everything: tuple[np.ndarray, np.ndarray], mean: float, ties: float
) -> None:
    """E[e] <= 1 wherever E z <= 1/2 - margin, also with other ties in every window."""
    assert expected(everything[1], *(at_mean(mean, ties),) * 3) <= 1 + 1e-12
    assert expected(everything[1], at_mean(mean, 0), at_mean(mean, ties), at_mean(mean, 0.3)) <= 1 + 1e-12


@pytest.mark.parametrize("mean", [0.45, 0.5, 0.7])
@pytest.mark.parametrize("ties", [0.0, 0.1, 0.4])
def test_harm_is_valid_on_the_whole_null(
    everything: tuple[np.ndarray, np.ndarray], mean: float, ties: float
) -> None:
    """E[e] <= 1 wherever E z >= 1/2 - tolerance."""
    assert expected(everything[0], *(at_mean(mean, ties),) * 3) <= 1 + 1e-12
    assert expected(everything[0], at_mean(mean, 0), at_mean(mean, ties), at_mean(mean, 0.3)) <= 1 + 1e-12


def test_constant_bets_are_exactly_fair_at_the_boundary() -> None:
    """E[e] = 1 at E z = 1/2 - margin for each strategy of one window: nothing is wasted."""
    state = pairs.look(pairs.start(), judged(3, 4, 5), TOLERANCE, MARGIN)
    chance = multinomial.pmf(np.array(OUTCOMES), 3, at_mean(0.5 - MARGIN, 0.3))
    after = [pairs.look(state, judged(*o), TOLERANCE, MARGIN) for o in OUTCOMES]
    gains = np.array([np.array(a.noninferior) - np.array(state.noninferior) for a in after])
    assert chance @ np.exp(gains) == pytest.approx(np.ones(gains.shape[1]), abs=1e-12)


@pytest.mark.parametrize("index", range(len(betting.FRACTIONS)))
def test_constant_bets_are_those_of_an_independent_implementation(index: int) -> None:
    """ville.BettingTest with its plug-in bet capped at every step is the same capital process, both ways."""
    f, rng = betting.FRACTIONS[index], np.random.default_rng(3)
    windows = [rng.integers(0, SCORE_STEPS + 1, 9) for _ in range(8)]
    state = pairs.start()
    for w in windows:
        state = pairs.look(state, np.bincount(w, minlength=SCORE_STEPS + 1).tolist(), TOLERANCE, MARGIN)
    z = np.array(SCORE_VALUES)[np.concatenate(windows)]
    up = ville.BettingTest(0.5 - MARGIN, alternative="greater", alpha=1e-300, c=f).fit(z)
    down = ville.BettingTest(0.5 - TOLERANCE, alternative="less", alpha=1e-300, c=f).fit(z)
    assert state.noninferior[2 + index] == pytest.approx(float(up.log_e_values_[-1]), abs=1e-10)
    assert state.harm[1 + index] == pytest.approx(float(down.log_e_values_[-1]), abs=1e-10)


def test_margin_is_on_the_scale_of_wins() -> None:
    """45 % wins and half the ties is the boundary of margin 0.05; on scored pairs, 0.10 of score."""
    state = pairs.look(pairs.start(), judged(55, 0, 45), 0.0125, 0.05)
    scored = pairs.look(pairs.start(), [0] * 9 + [100] + [0] * 11, 0.0125, 0.05)  # z = 0.45: x_c = x_s - 0.1
    assert max(state.noninferior) < 0.0
    assert scored.noninferior == pytest.approx((0.0,) * len(scored.noninferior), abs=1e-12)
    slightly = pairs.look(pairs.start(), judged(40, 0, 60), 0.0125, 0.05)
    assert pairs.log_noninferior(slightly) > 0.0


def test_mirrored_pairs_mirror_the_evidence() -> None:
    """Wins and losses exchanged: what showed harm shows none, and the other way round."""
    bad = good = pairs.start()
    for _ in range(6):
        bad = pairs.look(bad, judged(14, 4, 2), 0.0125, 0.05)
        good = pairs.look(good, judged(2, 4, 14), 0.0125, 0.05)
    assert pairs.log_harm(bad) > math.log(1e3)
    assert pairs.log_noninferior(bad) < 0.0
    assert pairs.log_noninferior(good) > math.log(1e3)
    assert pairs.log_harm(good) < 0.0


def test_no_pairs_no_evidence() -> None:
    """An empty window changes nothing at all."""
    state = pairs.look(pairs.start(), judged(3, 4, 5), 0.01, 0.05)
    assert pairs.look(state, (), 0.01, 0.05) == state
    assert pairs.look(state, (0,) * 21, 0.01, 0.05) == state


@pytest.mark.parametrize(
    ("counts", "margin"), [((1, 2), 0.05), (pass_fail(1, 1), 0.5), (pass_fail(1, 1), -0.1)]
)
def test_impossible_input_is_refused(counts: tuple[int, ...], margin: float) -> None:
    """Another grid, or a margin that no canary could miss."""
    with pytest.raises(ValueError, match=r"scores:|pairs:"):
        pairs.look(pairs.start(), counts, 0.0, margin)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=21, max_size=21), min_size=1, max_size=6))
def test_state_survives_json_to_the_last_bit(windows: list[list[int]]) -> None:
    """Stored and read again at every look, it goes on exactly as if it had not been."""
    kept = stored = pairs.start()
    for z in windows:
        kept = pairs.look(kept, z, 0.01, 0.05)
        stored = pairs.look(pairs.load(json.loads(json.dumps(pairs.dump(stored)))), z, 0.01, 0.05)
    assert stored == kept


def ever(chances: tuple[float, float, float], seed: int, looks: int = 60) -> tuple[bool, bool]:
    """Was harm (tolerance 0.0125), was non-inferiority (margin 0.05) ever shown, 10 pairs a look?"""
    rng = np.random.default_rng(seed)
    state, harm, good = pairs.start(), False, False
    for z in rng.multinomial(10, chances, looks).tolist():
        state = pairs.look(state, judged(*z), 0.0125, 0.05)
        harm = harm or pairs.log_harm(state) >= math.log(20)
        good = good or pairs.log_noninferior(state) >= math.log(20)
    return harm, good


def test_type_one_errors_stay_below_alpha() -> None:
    """300 runs of 60 looks at each boundary: 5 % plus 2.3 binomial deviations."""
    bound = 300 * 0.05 + 2.33 * math.sqrt(300 * 0.05 * 0.95)
    assert sum(ever(at_mean(0.5 - 0.0125, 0.4), seed)[0] for seed in range(300)) <= bound
    assert sum(ever(at_mean(0.5 - 0.05, 0.4), seed)[1] for seed in range(300)) <= bound


def until_noninferior(paired: bool, seed: int, right: float = 0.9, differ: float = 0.036) -> int:
    """Judged answers of the canary until equal arms of 90 % are shown no worse by 5 points, 5 a look."""
    rng, n, at = np.random.default_rng(seed), 0, math.log(20)
    scores, judged_ = betting.start(), pairs.start()
    while n < 4000:
        n += 5
        if paired:
            losses, wins, ties = rng.multinomial(5, [differ, differ, 1 - 2 * differ]).tolist()
            judged_ = pairs.look(judged_, judged(losses, ties, wins), 0.00625, 0.025)
            done = pairs.log_noninferior(judged_) >= at
        else:
            b, c = (pass_fail(int(k), 5 - int(k)) for k in rng.binomial(5, right, 2))
            scores = betting.look(scores, b, c, 0.0125, 0.05)
            done = betting.log_noninferior(scores) >= at
        if done:
            break
    return n


def test_pairs_need_half_the_samples() -> None:
    """Equal arms of 90 %, 7.2 % of the pairs differ, margin 5 points of score: median at most half."""
    paired = np.median([until_noninferior(True, seed) for seed in range(120)])
    unpaired = np.median([until_noninferior(False, seed) for seed in range(120)])
    assert paired <= 0.5 * unpaired
    assert 100 <= paired <= 300
    assert 350 <= unpaired <= 650


def test_windows_of_one_and_of_many_pairs_agree() -> None:
    """Constant bets do not care how pairs are cut into windows."""
    one = many = pairs.start()
    for z in itertools.islice(itertools.cycle([(1, 0, 0), (0, 1, 0), (0, 0, 1)]), 30):
        one = pairs.look(one, judged(*z), 0.01, 0.05)
    many = pairs.look(many, judged(10, 10, 10), 0.01, 0.05)
    assert one.harm[1:] == pytest.approx(many.harm[1:], abs=1e-12)
    assert one.noninferior[2:] == pytest.approx(many.noninferior[2:], abs=1e-12)
