"""The sample-ratio check: exact validity, savvi as an oracle, and what it must and must not notice."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from savvi.multinomial import InhomogeneousBernoulliProcess, Multinomial
from scipy.stats import binom

from serve.rollout.stats import srm, two_sample

LOOKS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 400), st.sampled_from([0.01, 0.1, 0.5])), max_size=8
)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_mixture_is_exactly_fair_under_the_intended_share(share: float) -> None:
    """E[e] = 1 over all outcomes of 60 assignments, in one look and in two."""
    once = [math.exp(srm.log_e(srm.look(srm.start(), k, 60, share))) for k in range(61)]
    assert binom.pmf(np.arange(61), 60, share) @ once == pytest.approx(1.0, abs=1e-10)
    first = binom.pmf(np.arange(31), 30, share)
    twice = [
        [math.exp(srm.log_e(srm.look(srm.look(srm.start(), a, 30, share), b, 30, share))) for b in range(31)]
        for a in range(31)
    ]
    assert first @ np.array(twice) @ first == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_it_is_savvis_multinomial_test(share: float) -> None:
    """The same posterior odds as the authors' package, look after look."""
    rng = np.random.default_rng(5)
    theirs = Multinomial(alpha=0.05, theta_0=np.array([share, 1 - share]), k=srm.CONCENTRATION)
    ours = srm.start()
    for n in (40, 0, 300, 7):
        k = int(rng.binomial(n, min(0.9, share * 1.3)))
        theirs.update(np.array([k, n - k]))
        ours = srm.look(ours, k, n, share)
        assert srm.log_e(ours) == pytest.approx(math.log(theirs.odds), abs=1e-9)


def test_on_failures_it_is_the_rate_ratio_test_and_agrees_with_two_sample() -> None:
    """Given a failure, it is the canary's with the canary's share if rates are equal (savvi's process)."""
    theirs = InhomogeneousBernoulliProcess(
        0.05,
        np.array([0.1, 0.9]),
        lambda delta: [delta[0] == delta[1]],
        np.array([[1, -1]]),
        k=srm.CONCENTRATION,
    )
    theirs.update(np.array([16, 20]))
    ratio = srm.block_log_e(srm.Block(0.1, 16, 20))
    assert ratio == pytest.approx(math.log(theirs.odds), abs=1e-3)
    state = two_sample.start(0.01)
    for _ in range(4):
        state = two_sample.look(state, two_sample.Window(450, 5, 50, 4), 0.0, 0.02)
    assert ratio > math.log(20)
    assert two_sample.log_harm(state) > math.log(20)


def test_each_share_is_a_block_of_its_own() -> None:
    """Steps multiply; late counts of an earlier step join its block instead of opening a new one."""
    one, two = srm.Block(0.01, 5, 300), srm.Block(0.1, 30, 200)
    state = srm.look(srm.look(srm.look(srm.start(), 3, 203, 0.01), 30, 230, 0.1), 2, 102, 0.01)
    assert state.blocks == (one, two)
    assert srm.log_e(state) == pytest.approx(srm.block_log_e(one) + srm.block_log_e(two), abs=1e-12)


def test_a_ramp_is_no_mismatch_but_a_lost_router_is() -> None:
    """1, 5, 10, 25 and 50 % as intended stay quiet; a 10 % split that yields 7 % is found in 3000."""
    rng = np.random.default_rng(1)
    state = srm.start()
    for share in (0.01, 0.05, 0.1, 0.25, 0.5):
        for _ in range(20):
            state = srm.look(state, int(rng.binomial(300, share)), 300, share)
    assert srm.log_e(state) < math.log(20)
    broken = srm.start()
    for _ in range(10):
        broken = srm.look(broken, int(rng.binomial(300, 0.07)), 300, 0.1)
    assert srm.log_e(broken) > math.log(1000)


def test_false_alarms_stay_below_alpha() -> None:
    """300 runs of 100 looks at alpha 0.05: 5 % plus 2.3 binomial deviations."""
    rng = np.random.default_rng(2)
    canary = rng.binomial(30, 0.1, (300, 100)).cumsum(axis=1)
    total = 30 * np.arange(1, 101)
    alarms = sum(
        any(
            srm.block_log_e(srm.Block(0.1, k, n - k)) >= math.log(20) for k, n in zip(run, total, strict=True)
        )
        for run in canary.tolist()
    )
    assert alarms <= 300 * 0.05 + 2.33 * math.sqrt(300 * 0.05 * 0.95)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_random_nothing_to_check(share: float) -> None:
    """Before and after the ramp nobody is assigned at random."""
    assert srm.look(srm.start(), 0, 100, share) == srm.start()


@pytest.mark.parametrize(("k", "n", "share"), [(3, 2, 0.1), (-1, 2, 0.1), (1, 2, 1.1), (1, 2, math.nan)])
def test_impossible_counts_are_refused(k: int, n: int, share: float) -> None:
    """More of the canary's than there were, or a share that is none."""
    with pytest.raises(ValueError, match="sample ratio"):
        srm.look(srm.start(), k, n, share)


@given(LOOKS)
def test_state_survives_json_to_the_last_bit(looks: list[tuple[int, int, float]]) -> None:
    """Stored and read again, it is the same state."""
    state = srm.start()
    for k, more, share in looks:
        state = srm.look(state, k, k + more, share)
    assert srm.load(json.loads(json.dumps(srm.dump(state)))) == state
