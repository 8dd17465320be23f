"""Drift: the divergence's values, the test's error rates, and what a look may spend."""

from __future__ import annotations

import random
from math import comb

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from distill_jobs.flywheel.drift import (
    Unit,
    compare_grades,
    compare_requests,
    features,
    jensen_shannon,
    permute,
    spend,
    wilson_lower,
)

BILLING = ["refund", "invoice", "charge", "card", "receipt", "balance", "plan", "coupon"]
HARDWARE = ["battery", "screen", "cable", "broken", "manual", "charger", "display", "keyboard"]


def units(words: list[str], count: int, seed: int, length: int = 8) -> list[Unit]:
    """Conversations of random words."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=length)) for _ in range(count)]
    return [Unit(n, 0.0, *features(text)) for n, text in enumerate(texts)]


def test_the_divergence_is_scipys_in_bits() -> None:
    """scipy's distance squared; 0 for equal histograms, 1 bit for disjoint ones, empty ones without NaN."""
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 16)), rng.random((5, 16))
    ours = jensen_shannon(a, b)
    theirs = [jensenshannon(p, q, base=2) ** 2 for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    np.testing.assert_allclose(jensen_shannon(np.array([3.0, 1]), np.array([6.0, 2])), 0, atol=1e-12)
    assert jensen_shannon(np.array([1.0, 0]), np.array([0.0, 5])) == pytest.approx(1.0)
    assert np.isfinite(jensen_shannon(np.zeros(2), np.array([1.0, 1])))


def test_wilsons_lower_bound_has_its_textbook_values() -> None:
    """10 of 100 at 97.5 % one-sided: 0.0552; 0 of 10 is 0; nothing is 0."""
    assert wilson_lower(10, 100, 0.025) == pytest.approx(0.0552, abs=1e-4)
    assert wilson_lower(5, 5, 0.025) == pytest.approx(0.5655, abs=1e-4)
    assert wilson_lower(0, 10, 0.05) == 0.0
    assert wilson_lower(0, 0, 0.05) == 0.0


def test_all_looks_together_spend_alpha() -> None:
    """The sum telescopes to alpha · n / (n + 1)."""
    assert sum(spend(0.01, j) for j in range(1, 1000)) == pytest.approx(0.01 * 999 / 1000)


def test_the_p_value_is_the_exact_share_of_permutations() -> None:
    """Two graded crowds of six: the sampled p is near the exact one over all 924 ways to divide them."""
    reference, recent = [1.0, 1, 1, 1, 1, 0], [0.0, 0, 0, 1, 0, 0]
    scores = [*reference, *recent]
    ones = int(sum(scores))
    # recent holds one of the six ones: as few or fewer, hypergeometrically
    exact = sum(comb(ones, k) * comb(12 - ones, 6 - k) for k in (0, 1)) / comb(12, 6)
    found = compare_grades(reference, recent, bound=0.0, alpha=0.0005, seed=1)
    assert found.p == pytest.approx(exact, rel=0.6)
    assert found.value == pytest.approx(4 / 6, abs=0.15)


def test_equal_traffic_is_called_drift_no_more_often_than_alpha_says() -> None:
    """200 pairs of samples of one distribution at 10 %: at most 12 % fire, though any size would do."""
    fired = 0
    for seed in range(200):
        looks = compare_requests(
            units(BILLING, 60, 2 * seed), units(BILLING, 60, 2 * seed + 1), bound=0.0, alpha=0.1, seed=seed
        )
        fired += any(look.fired for look in looks)
    assert fired <= 24


def test_other_words_and_other_lengths_are_found() -> None:
    """New topics fire on words and not on lengths; longer requests of the old topics on lengths."""
    old = units(BILLING, 200, 1)
    topics = {k.kind: k for k in compare_requests(old, units(HARDWARE, 200, 2), 0.02, 0.005, seed=0)}
    assert topics["words"].fired
    assert topics["words"].value > 0.3
    longer = {
        k.kind: k for k in compare_requests(old, units(BILLING, 200, 3, length=40), 0.02, 0.005, seed=0)
    }
    assert longer["length"].fired
    assert not longer["words"].fired


def test_a_fifth_of_new_topics_is_found_and_a_difference_too_small_to_matter_is_not() -> None:
    """The bound is on the size of the drift: at 0.9 bits a fifth of new requests starts nothing."""
    old = units(BILLING, 500, 1)
    mixed = [*units(BILLING, 400, 2), *units(HARDWARE, 100, 3)]
    found = compare_requests(old, mixed, 0.02, 0.005, seed=0)[0]
    assert found.fired
    assert 0.02 < found.value < 0.2
    assert not compare_requests(old, mixed, 0.9, 0.005, seed=0)[0].fired


def test_grades_fire_when_they_fall_and_not_when_they_rise() -> None:
    """One-sided: a better student is no reason to distil."""
    good, bad = [1.0] * 190 + [0.0] * 10, [1.0] * 150 + [0.0] * 50
    fell = compare_grades(good, bad, 0.03, 0.005, seed=0)
    assert fell.fired
    assert fell.value == pytest.approx(0.2, abs=0.02)
    assert not compare_grades(bad, good, 0.03, 0.005, seed=0).fired


def test_a_look_is_the_same_every_time() -> None:
    """Seeded: a daemon that looks again after a crash finds the same."""
    old, new = units(BILLING, 100, 1), units(BILLING + HARDWARE, 100, 2)
    assert compare_requests(old, new, 0.0, 0.01, seed=5) == compare_requests(old, new, 0.0, 0.01, seed=5)


def test_words_of_any_script_count_and_no_text_is_kept() -> None:
    """Chinese is taken by the character, an empty text has no words, a long one is cut."""
    assert len(features("退款 refund")[0]) == 3
    assert features("") == (b"", 0)
    words, length = features("word " * 10_000)
    assert (len(words), length) == (256, 50_000)
    assert (
        compare_requests(
            [Unit(n, 0.0, b"", 0) for n in range(50)],
            [Unit(n, 0.0, b"", 0) for n in range(50)],
            0.02,
            0.01,
            0,
        )[0].fired
        is False
    )


def test_the_test_stops_early_when_nothing_is_there() -> None:
    """A difference below the bound costs one chunk of permutations, whatever alpha asks for."""
    asked: list[int] = []

    def statistic(chosen: np.ndarray) -> np.ndarray:
        asked.append(len(chosen))
        return np.zeros(len(chosen))

    permute(statistic, 50, 50, bound=0.1, alpha=1e-6, seed=0)
    assert sum(asked) == 1 + 256
