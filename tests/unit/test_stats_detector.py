"""The e-detector: its recursion, its average run length, and a regression after healthy hours."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import binom

from serve.rollout.stats import detector, two_sample
from serve.rollout.stats.two_sample import HARM_ALTERNATIVES, Window


def test_it_is_the_best_of_all_starting_times() -> None:
    """W is the largest sum of the last increments, by brute force over when the change began."""
    rng = np.random.default_rng(0)
    increments = rng.normal(-0.2, 1.0, (30, len(HARM_ALTERNATIVES)))
    state = detector.start()
    for t, row in enumerate(increments.tolist()):
        state = detector.look(state, row)
        best = [max(increments[j : t + 1, i].sum() for j in range(t + 1)) for i in range(len(row))]
        assert state.logs == pytest.approx(best, abs=1e-9)
        mean = sum(w * math.exp(v) for w, v in zip(detector.HARM_WEIGHTS, best, strict=True))
        assert detector.log_value(state) == pytest.approx(math.log(mean), abs=1e-9)


def test_it_is_never_above_shiryaev_roberts() -> None:
    """exp W <= sum over starting times of the products: what the bound on false alarms rests on."""
    rng = np.random.default_rng(1)
    state, roberts = detector.start(1), 0.0
    for e in rng.normal(0.0, 1.0, 50).tolist():
        state = detector.look(state, (e,), None)
        roberts = (roberts + 1.0) * math.exp(e)
        assert math.exp(state.logs[0]) <= roberts * (1 + 1e-12)


def first_alarm(rng: np.random.Generator, rates: list[float], arl: float) -> int | None:
    """Look of the first alarm when the canary fails at these rates by look, 30 of 300 requests each."""
    test, state = two_sample.start(0.01), detector.start()
    for t, rate in enumerate(rates):
        window = Window(270, int(rng.binomial(270, 0.01)), 30, int(rng.binomial(30, rate)))
        after = two_sample.look(test, window, 0.0, 0.02)
        state, test = detector.look(state, detector.harm_increments(test, after)), after
        if detector.alarmed(state, arl):
            return t
    return None


def test_false_alarms_within_a_run_are_at_most_its_length_over_the_arl() -> None:
    """P(alarm in 60 looks) <= 60 / ARL, with an ARL of 1200: 5 % plus 2.3 binomial deviations of 100 runs."""
    rng = np.random.default_rng(7)
    alarms = sum(first_alarm(rng, [0.01] * 60, 1200.0) is not None for _ in range(100))
    assert alarms <= 5 + 2.33 * math.sqrt(100 * 0.05 * 0.95)


def test_a_late_regression_is_found_while_the_spent_e_process_sleeps() -> None:
    """Four healthy hours, then +5 points: within 20 looks at 20 days between false alarms."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        found = first_alarm(rng, [0.01] * 240 + [0.06] * 40, detector.ARL)
        assert found is not None
        assert 240 <= found <= 260


def test_a_healthy_past_costs_at_most_nothing() -> None:
    """However negative the past, the next bad look counts in full."""
    state = detector.look(detector.start(2), (-500.0, -3.0), None)
    assert detector.look(state, (2.0, 1.0), None).logs == (2.0, 1.0)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.03])
def test_against_a_bound_the_e_values_are_valid_at_and_below_it(rate: float) -> None:
    """E[e] <= 1 for every rate up to the bound, 1 at it, by enumeration: no second arm is needed."""
    chance = binom.pmf(np.arange(41), 40, rate)
    e = np.exp([detector.bound_increments(40, k, 0.03) for k in range(41)])
    assert np.all(chance @ e <= 1.0 + 1e-9)
    if rate == 0.03:
        assert chance @ e == pytest.approx(np.ones(len(HARM_ALTERNATIVES)), abs=1e-9)


@pytest.mark.parametrize(("n", "k", "bound"), [(3, 4, 0.1), (3, -1, 0.1), (3, 1, 0.0), (3, 1, 0.99)])
def test_impossible_input_is_refused(n: int, k: int, bound: float) -> None:
    """More failures than requests, or a bound that nothing can break."""
    with pytest.raises(ValueError, match="detector"):
        detector.bound_increments(n, k, bound)


def test_a_detector_needs_an_alternative_and_one_increment_each() -> None:
    """A length that does not fit would silently drop an alternative."""
    with pytest.raises(ValueError, match="one alternative"):
        detector.start(0)
    with pytest.raises(ValueError, match="zip"):
        detector.look(detector.start(), (0.1,))


def test_state_survives_json_to_the_last_bit() -> None:
    """Stored and read again at every look, it goes on exactly as if it had not been."""
    rng = np.random.default_rng(3)
    kept = stored = detector.start()
    for row in rng.normal(0, 1, (20, len(HARM_ALTERNATIVES))).tolist():
        kept = detector.look(kept, row)
        stored = detector.look(detector.load(json.loads(json.dumps(detector.dump(stored)))), row)
    assert stored == kept
    assert detector.load({}) == detector.start()
