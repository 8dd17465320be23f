"""The e-processes: exact validity, type-I error, neutrality, and speed on a broken student."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from serve.rollout.stats import two_sample
from serve.rollout.stats.two_sample import HARM_ALTERNATIVES, Window

SHAPES = [(9, 1), (27, 3), (5, 5), (99, 1), (30, 15)]


def expectation(n_b: int, n_c: int, p_b: float, p_c: float, log_e: dict[tuple[int, int], float]) -> float:
    """E[e] by summing over every possible pair of counts."""
    chance_b = binom.pmf(np.arange(n_b + 1), n_b, p_b)
    chance_c = binom.pmf(np.arange(n_c + 1), n_c, p_c)
    values = np.array([[log_e[kb, kc] for kc in range(n_c + 1)] for kb in range(n_b + 1)])
    return float(chance_b @ np.exp(values) @ chance_c)


def table(n_b: int, n_c: int, alt_b: float, alt_c: float, delta: float) -> dict[tuple[int, int], float]:
    """Log e-value of every pair of counts."""
    return {
        (kb, kc): two_sample.block_log_e(Window(n_b, kb, n_c, kc), alt_b, alt_c, delta)
        for kb in range(n_b + 1)
        for kc in range(n_c + 1)
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", [0.001, 0.05, 0.3])
def test_harm_e_value_is_valid_on_the_whole_null(shape: tuple[int, int], base: float) -> None:
    """E[e] <= 1 wherever p_c <= p_b + tolerance, by exact enumeration: no false rollback beyond alpha."""
    n_b, n_c = shape
    tolerance = 0.0125
    for excess, _ in HARM_ALTERNATIVES:
        rate = min(base + tolerance + excess, 0.985)
        log_e = table(n_b, n_c, base, rate, tolerance)
        for p_b in (0.0, 0.01, base, 0.2, 0.6, 0.98):
            for below in (0.0, 0.01, 0.2):
                p_c = min(1.0, max(0.0, p_b + tolerance - below))
                assert expectation(n_b, n_c, p_b, p_c, log_e) <= 1.0 + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", [0.001, 0.05, 0.5])
def test_noninferiority_e_value_is_valid_on_the_whole_null(shape: tuple[int, int], base: float) -> None:
    """E[e] <= 1 wherever p_c >= p_b + margin: no false promotion beyond alpha."""
    n_b, n_c = shape
    margin = 0.05
    for alt_c in (base / 2, base, base + margin / 2):
        log_e = table(n_b, n_c, base, max(alt_c, 1e-4), margin)
        for p_b in (0.0, 0.01, base, 0.2, 0.9):
            for above in (0.0, 0.02, 0.3):
                p_c = min(1.0, p_b + margin + above)
                assert expectation(n_b, n_c, min(p_b, p_c - margin), p_c, log_e) <= 1.0 + 1e-9


def test_e_value_is_tight_on_the_boundary_point_it_was_projected_to() -> None:
    """E[e] is exactly 1 at the projection itself: the test wastes nothing."""
    n_b, n_c, delta = 27, 3, 0.02
    x = two_sample.boundary_projection(n_b, n_c, 0.01, 0.2, delta)
    assert expectation(n_b, n_c, x, x + delta, table(n_b, n_c, 0.01, 0.2, delta)) == pytest.approx(
        1.0, abs=1e-12
    )


def test_projection_without_margin_is_the_pooled_rate() -> None:
    """For delta = 0 the KL projection has the closed form of arXiv 2106.02693."""
    assert two_sample.boundary_projection(270, 30, 0.01, 0.06, 0.0) == pytest.approx(0.015, abs=1e-14)


def test_projection_solves_its_equation_over_extreme_inputs() -> None:
    """The root is found with tiny, large and unequal rates; a wrong root would break validity silently."""
    for n_b, n_c, pb, pc, d in [
        (1, 1, 1e-4, 0.985, 0.0),
        (10_000, 1, 0.02, 0.7, 0.05),
        (3, 500, 0.9, 0.985, 0.01),
    ]:
        x = two_sample.boundary_projection(n_b, n_c, pb, pc, d)
        slope = n_b * (pb - x) / (x * (1 - x)) + n_c * (pc - x - d) / ((x + d) * (1 - x - d))
        scale = n_b / (x * (1 - x)) + n_c / ((x + d) * (1 - x - d))
        assert abs(slope) <= 1e-9 * scale


def test_projection_in_closed_form_is_the_root_that_bisection_finds() -> None:
    """A cubic has three roots; taking another one, or a rounded one, would break validity silently."""
    rng = np.random.default_rng(1)
    for _ in range(2000):
        n_b, n_c = (int(n) for n in 10 ** rng.uniform(0, 5, 2))
        alt_b, alt_c = (float(p) for p in np.minimum(10 ** rng.uniform(-4, 0, 2), 0.985))
        delta = float(rng.choice([0.001, 0.005, 0.0125, 0.05, 0.3]))
        lo, hi = 0.0, 1.0 - delta
        for _ in range(200):
            x = 0.5 * (lo + hi)
            y = x + delta
            if x in (lo, hi):
                break
            rising = n_b * (alt_b - x) * y * (1 - y) + n_c * (alt_c - y) * x * (1 - x) > 0
            lo, hi = (x, hi) if rising else (lo, x)
        found = two_sample.boundary_projection(n_b, n_c, alt_b, alt_c, delta)
        assert found == pytest.approx(lo, rel=1e-6, abs=1e-13)


def test_an_alternative_never_crosses_its_own_boundary() -> None:
    """Near a base rate of 1 the harm test compares nothing; it must not turn round to the other side."""
    window = Window(100, 98, 20, 10)
    for excess, _ in HARM_ALTERNATIVES:
        assert two_sample.harm_log_e(window, 0.98, excess, 0.0125) == 0.0
    assert two_sample.block_log_es(window, 0.5, (0.52, 0.6), 0.02)[0] == 0.0


def test_harm_weights_are_a_prior() -> None:
    """They sum to 1: more would make the mixture reject too often."""
    assert math.fsum(two_sample.HARM_WEIGHTS) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_look_is_valid_as_a_whole(shape: tuple[int, int]) -> None:
    """The mixtures over all alternatives, with tolerance 0 and with one: E[e] <= 1 on their boundaries."""
    n_b, n_c = shape
    for tolerance, margin in ((0.0, 0.02), (0.005, 0.05)):
        looks = {
            (kb, kc): two_sample.look(two_sample.start(0.01), Window(n_b, kb, n_c, kc), tolerance, margin)
            for kb in range(n_b + 1)
            for kc in range(n_c + 1)
        }
        harm = {k: two_sample.log_harm(s) for k, s in looks.items()}
        good = {k: two_sample.log_noninferior(s) for k, s in looks.items()}
        for p_b in (0.0, 0.01, 0.1, 0.5, 0.9):
            assert expectation(n_b, n_c, p_b, min(1.0, p_b + tolerance), harm) <= 1.0 + 1e-9
            assert expectation(n_b, n_c, p_b, min(1.0, p_b + margin), good) <= 1.0 + 1e-9


def test_swapping_the_arms_mirrors_the_e_value() -> None:
    """With delta = 0 canary and stable are interchangeable; GrowthBook #6020 swapped its arms unnoticed."""
    one = two_sample.block_log_e(Window(40, 2, 20, 9), 0.05, 0.4, 0.0)
    other = two_sample.block_log_e(Window(20, 9, 40, 2), 0.4, 0.05, 0.0)
    assert one == pytest.approx(other, rel=1e-12)


def test_harm_looks_at_the_canary_and_not_at_stable() -> None:
    """Failures of the canary raise the harm e-value, the same failures of stable lower it."""
    start = two_sample.start(0.01)
    canary_bad = two_sample.look(start, Window(100, 1, 100, 20), 0.005, 0.02)
    stable_bad = two_sample.look(start, Window(100, 20, 100, 1), 0.005, 0.02)
    assert two_sample.log_harm(canary_bad) > math.log(1e3)
    assert two_sample.log_harm(stable_bad) < 0.0


@pytest.mark.parametrize("window", [Window(500, 7, 0, 0), Window(0, 0, 10, 10), Window(0, 0, 0, 0)])
def test_a_window_without_one_arm_compares_nothing(window: Window) -> None:
    """No concurrent traffic, no evidence in either direction; the estimates may still learn."""
    state = two_sample.look(two_sample.start(0.01), Window(200, 2, 20, 1), 0.005, 0.02)
    after = two_sample.look(state, window, 0.005, 0.02)
    assert (after.harm, after.noninferior) == (state.harm, state.noninferior)


def test_windows_multiply() -> None:
    """Each component's product over two windows is the sum of the windows' logs: nothing is refitted."""
    first = two_sample.look(two_sample.start(0.02), Window(100, 2, 10, 0), 0.01, 0.04)
    window = Window(120, 1, 12, 3)
    base = first.base_k / first.base_n
    gained = two_sample.harm_log_e(window, base, 0.05, 0.01)
    second = two_sample.look(first, window, 0.01, 0.04)
    index = [excess for excess, _ in HARM_ALTERNATIVES].index(0.05)
    assert second.harm[index] == first.harm[index] + gained


def test_the_alternative_ignores_the_window_it_is_tested_on() -> None:
    """Predictability: the first look's e-value is that of the prior, whatever the window's own rates are."""
    start = two_sample.start(0.01)
    after = two_sample.look(start, Window(100, 50, 10, 5), 0.0, 0.02)
    assert after.harm[3] == two_sample.harm_log_e(Window(100, 50, 10, 5), 0.01, 0.05, 0.0)


def test_three_wrong_answers_of_three_are_enough() -> None:
    """A student that fails everything is found within a handful of graded answers."""
    state = two_sample.start(0.05)
    for _ in range(5):
        state = two_sample.look(state, Window(60, 2, 0, 0), 0.0125, 0.05)
    for _ in range(3):
        state = two_sample.look(state, Window(60, 2, 1, 1), 0.0125, 0.05)
    assert two_sample.log_harm(state) > math.log(4 / 0.05)


def run(p_b: float, p_c: float, seed: int, looks: int, tol: float, margin: float) -> tuple[bool, bool]:
    """One simulated sequence: did it ever show harm, did it ever show non-inferiority (alpha 0.05)?"""
    rng = np.random.default_rng(seed)
    state, harm, good = two_sample.start(p_b), False, False
    n_b, n_c = rng.poisson(270, looks), rng.poisson(30, looks)
    k_b, k_c = rng.binomial(n_b, p_b), rng.binomial(n_c, p_c)
    for w in zip(n_b.tolist(), k_b.tolist(), n_c.tolist(), k_c.tolist(), strict=True):
        state = two_sample.look(state, Window(*w), tol, margin)
        harm = harm or two_sample.log_harm(state) >= math.log(20)
        good = good or two_sample.log_noninferior(state) >= math.log(20)
    return harm, good


def test_false_alarms_under_equal_arms_stay_below_alpha() -> None:
    """Setting S1 without tolerance, continuous looks for an hour: at most 5 % plus Monte-Carlo slack."""
    alarms = sum(run(0.01, 0.01, seed, 60, 0.0, 0.02)[0] for seed in range(300))
    assert alarms / 300 <= 0.05


def test_false_promotions_at_the_boundary_stay_below_alpha() -> None:
    """A student exactly at the margin is called non-inferior in at most 5 % plus Monte-Carlo slack."""
    wrong = sum(run(0.01, 0.03, seed, 120, 0.0, 0.02)[1] for seed in range(300))
    assert wrong / 300 <= 0.07


def test_power_in_setting_s1() -> None:
    """+2 points at a 10 % canary is found within an hour, and equal arms are shown non-inferior."""
    found = sum(run(0.01, 0.03, seed, 60, 0.0, 0.02)[0] for seed in range(100))
    shown = sum(run(0.01, 0.01, seed, 60, 0.0, 0.02)[1] for seed in range(100))
    assert found >= 97
    assert shown >= 97
