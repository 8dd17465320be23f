"""The threshold of a cascade: its promise holds in simulation, and is refused where nothing can be shown."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom  # type: ignore[import-untyped]

from contracts.cascade import Signal
from contracts.errors import DataError
from serve.cascade.calibrate import Item, calibrate, hoeffding_bentkus, rows_needed
from serve.cascade.report import plot, shown

MEAN, LEAST = Signal.MEAN_LOGPROB, Signal.MIN_LOGPROB


def traffic(count: int, seed: int, right: float = 0.9) -> list[Item]:
    """Signals uniform in [0, 1] minus 1; the first is wrong at x with probability 0.3 (1 - x)^2, whatever the
    second does, which is right in `right` of the cases."""
    random = np.random.default_rng(seed)
    sure = random.uniform(size=count)
    first = random.uniform(size=count) >= 0.3 * (1 - sure) ** 2
    then = random.uniform(size=count) < right
    return [Item({MEAN: float(s) - 1}, float(f), float(t)) for s, f, t in zip(sure, first, then, strict=True)]


def lost(threshold: float) -> float:
    """P(served and wrong) of that traffic: ∫ 0.3 (1 - x)² dx from the threshold on."""
    return 0.1 * (1 - (threshold + 1)) ** 3


@pytest.mark.parametrize("right", [0.9, 1.0])
def test_the_promise_is_kept_as_often_as_was_said(right: float) -> None:
    """Of 120 calibrations at confidence 90 %, at most 10 % break the promise on the whole population.

    Losses are independent of the second, so a share `lost` of what it answers rightly is lost, and the law is
    tight: a bound that forgets its δ, or thresholds picked by what is tested, would be seen.
    """
    found = [calibrate(traffic(2500, seed, right), [MEAN], 0.99, 0.9).best for seed in range(120)]
    assert sum(lost(point.threshold) > 0.01 for point in found) <= binom.ppf(0.9999, 120, 0.1)
    assert 0.536 < float(np.mean([p.calls for p in found])) < 0.7  # 0.536 is exactly at the target


def test_what_the_sample_says_is_no_promise() -> None:
    """The loosest threshold that keeps the target on these rows breaks it on others half of the time."""
    frontiers = [calibrate(traffic(2500, s, 1.0), [MEAN], 0.99, 0.9).frontiers[0] for s in range(60)]
    naive = [next(p for p in reversed(f.points) if p.kept >= 0.99) for f in frontiers]
    assert sum(lost(point.threshold) > 0.01 for point in naive) > 15


def test_scores_between_zero_and_one_keep_it_too() -> None:
    """Graded scores are tested by a bound that holds for any values; it is dearer than the exact one."""
    broken, calls = 0, []
    for seed in range(60):
        items = [
            Item(i.signals, 0.25 + 0.5 * i.first, 0.25 + 0.5 * i.then) for i in traffic(4000, seed, right=1.0)
        ]
        point = calibrate(items, [MEAN], 0.98, 0.9).best
        broken += 0.5 * lost(point.threshold) > 0.02 * 0.75
        calls.append(point.calls)
        assert point.kept_low is None
    assert broken <= binom.ppf(0.9999, 60, 0.1)
    assert float(np.mean(calls)) < 0.75


def test_the_binomial_is_exact() -> None:
    """p-values and lower bounds against their definitions, on rows that can be counted by hand."""
    items = [Item({MEAN: -0.001 * i}, float(i % 100 != 0), 1.0) for i in range(2000)]
    points = calibrate(items, [MEAN], 0.97, 0.95).frontiers[0].points
    for point in points[:: len(points) // 7]:
        served = round(2000 * 0.9 * (1 - point.calls))
        wrong = [p for p in range(40) if math.isclose(binom.cdf(p, 1800, 0.03), point.p_value)]
        assert len(wrong) == 1
        assert wrong[0] <= served
        assert point.kept_low is not None
        # Clopper-Pearson: at its lower bound so few losses have probability δ exactly.
        assert binom.cdf(wrong[0], 1800, 1 - point.kept_low) == pytest.approx(0.05, abs=1e-9)
        assert point.quality == pytest.approx(1 - wrong[0] / 1800)
    assert all(p.certified for p in points)


def test_certified_thresholds_are_the_first_ones() -> None:
    """Nothing looser than a threshold that failed is trusted, however well it looks."""
    points = calibrate(traffic(2500, 1), [MEAN], 0.99, 0.9).frontiers[0].points
    certified = [p.certified for p in points]
    assert certified == sorted(certified, reverse=True)
    assert [p.threshold for p in points] == sorted((p.threshold for p in points), reverse=True)
    assert not certified[-1]


def test_the_signal_with_fewer_calls_is_taken_and_pays_for_the_choice() -> None:
    """A useless signal beside a good one loses, and both get half of δ."""
    random = np.random.default_rng(0)
    items = [Item({**i.signals, LEAST: -float(random.uniform())}, i.first, i.then) for i in traffic(4000, 3)]
    found = calibrate(items, [LEAST, MEAN], 0.99, 0.9)
    assert found.signal is MEAN
    assert [f.delta for f in found.frontiers] == pytest.approx([0.05, 0.05])
    assert found.best in found.frontiers[1].points
    assert found.best in shown(found.frontiers[1])
    assert plot(found).count("<svg") == 1


def test_answers_that_cannot_be_judged_are_passed_on() -> None:
    """They count as calls at every threshold, and never as losses."""
    items = [Item({MEAN: None if i % 2 else -0.001 * i}, float(i % 2 == 0), 1.0) for i in range(4000)]
    found = calibrate(items, [MEAN], 0.99, 0.95)
    assert found.best.kept == 1.0
    assert found.best.calls == pytest.approx(0.5, abs=0.05)
    assert found.first == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("target", "confidence", "needed"), [(0.995, 0.95, 598), (0.99, 0.95, 299), (0.9, 0.9, 22)]
)
def test_too_few_requests_are_refused_with_the_number_that_it_takes(
    target: float, confidence: float, needed: int
) -> None:
    """ln δ / ln target requests, answered rightly by the second, are the least, even without any loss."""
    assert rows_needed(target, 1 - confidence) == needed
    count = next(n for n in range(needed, 2 * needed + 100) if n - max(50, round(0.1 * n)) == needed)
    perfect = [Item({MEAN: -float(i)}, 1.0, 1.0) for i in range(count)]
    assert calibrate(perfect, [MEAN], target, confidence).best.certified
    with pytest.raises(DataError, match=f"takes {needed}, even if nothing is lost"):
        calibrate(perfect[:-1], [MEAN], target, confidence)


def test_a_first_that_is_wrong_where_it_is_sure_saves_nothing() -> None:
    """What the promise may lose is lost at the strictest thresholds; a blind signal gets none at all."""
    items = [Item({MEAN: -0.001 * i}, float(i > 1000), 1.0) for i in range(3000)]
    assert calibrate(items, [MEAN], 0.99, 0.95).best.calls > 0.99
    blind = [Item({MEAN: -1.0}, item.first, 1.0) for item in items]
    with pytest.raises(DataError, match=r"no threshold keeps 0\.99 .*mean_logprob: at the strictest"):
        calibrate(blind, [MEAN], 0.99, 0.95)
    unjudged = [Item({MEAN: None}, 1.0, 1.0) for _ in range(3000)]
    with pytest.raises(DataError, match="no answer could be judged"):
        calibrate(unjudged, [MEAN], 0.99, 0.95)


@pytest.mark.parametrize(("target", "confidence"), [(0.0, 0.9), (1.0, 0.9), (0.9, 1.0), (float("nan"), 0.9)])
def test_promises_that_mean_nothing_are_refused(target: float, confidence: float) -> None:
    """Shares are between 0 and 1; the message names which one is not."""
    with pytest.raises(DataError, match="must be between 0 and 1"):
        calibrate(traffic(500, 0), [MEAN], target, confidence)


def test_hoeffding_bentkus_is_a_p_value() -> None:
    """At the edge of the null it rejects no oftener than it says; at alpha and above never."""
    assert hoeffding_bentkus(np.array([0.1, 0.2]), 100, 0.1).tolist() == [1.0, 1.0]
    # min(exp(-n kl), e P(Bin(n, alpha) <= 0)) without any loss: (1 - alpha)^n is smaller than e times itself.
    assert hoeffding_bentkus(np.array([0.0]), 50, 0.1)[0] == pytest.approx(0.9**50)
    random = np.random.default_rng(0)
    p = hoeffding_bentkus(random.binomial(400, 0.05, size=4000) / 400, 400, 0.05)
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level + 3 * np.sqrt(level / 4000)
