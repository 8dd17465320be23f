"""Kayenta's judge (NetflixACAJudge), re-implemented: Mann-Whitney on the points of two time series.

The points are error rates by minute. A metric is High when the lower end of the 98 % confidence interval of
the Hodges-Lehmann shift exceeds a quarter of the shift's size (and the ratio of means is at least 1);
everything else, undecided included, passes. Points, not requests, are its samples. The interval inverts the
normal approximation with tie and continuity corrections, as in Bauer, JASA 67 (1972).
Source: research/rollout-statistics.md, section 1.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from benchmarks.decisions.traffic import Floats, Minute

_CONFIDENCE, _TOLERANCE = 0.98, 0.25
_CRITICAL = float(norm.ppf(0.5 + _CONFIDENCE / 2))


def high(traffic: Minute) -> np.ndarray:  # type: ignore[type-arg]
    """By run, whether one judgement over all minutes calls the canary High."""
    with np.errstate(divide="ignore", invalid="ignore"):
        stable, canary = traffic.k_b / traffic.n_b, traffic.k_c / traffic.n_c
    runs = range(stable.shape[1])
    return np.array([judged_high(_points(canary[:, r]), _points(stable[:, r])) for r in runs])


def judged_high(canary: Floats, stable: Floats) -> bool:
    """One judgement."""
    if len(canary) == 0 or len(stable) == 0 or np.array_equal(canary, stable):
        return False
    low, estimate = shift(canary, stable)
    mean = float(np.mean(stable))
    ratio = float(np.mean(canary)) / mean if mean > 0 else math.inf
    return low > _TOLERANCE * abs(estimate) and ratio >= 1.0


def shift(x: Floats, y: Floats) -> tuple[float, float]:
    """(lower end of the interval, estimate) of the shift of x against y."""
    ends = float(np.min(x) - np.max(y)), float(np.max(x) - np.min(y))
    if ends[0] == ends[1]:
        return ends[0], ends[0]
    return _root(x, y, ends, _CRITICAL, 0.5), _root(x, y, ends, 0.0, 0.0)


def _root(x: Floats, y: Floats, ends: tuple[float, float], target: float, correction: float) -> float:
    """The d at which the standardised statistic of x - d against y falls to the target."""

    def distance(d: float) -> float:
        return _standardised(x - d, y, correction) - target

    if distance(ends[0]) <= 0.0:
        return ends[0]
    if distance(ends[1]) >= 0.0:
        return ends[1]
    return float(brentq(distance, *ends, xtol=1e-6))


def _standardised(x: Floats, y: Floats, correction: float) -> float:
    n, m = len(x), len(y)
    ranks = rankdata(np.concatenate([x, y]))
    above = float(ranks[:n].sum()) - n * (n + 1) / 2 - n * m / 2
    _, ties = np.unique(ranks, return_counts=True)
    tied = float((ties**3 - ties).sum()) / ((n + m) * (n + m - 1))
    sigma = math.sqrt(n * m / 12 * (n + m + 1 - tied))
    return (above - math.copysign(correction, above)) / sigma if sigma > 0 else 0.0


def _points(rates: Floats) -> Floats:
    return rates[~np.isnan(rates)]
