"""Bootstrap intervals over requests: BCa or percentile, and paired ratios of two metrics.

The requests are resampled once and every metric of every model is computed on the same resamples, so that two
models are compared on the same requests. Knows nothing about what a metric means.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, norm

from distill_jobs.config import IntervalConfig
from distill_jobs.measuring.statistics import Statistic

Interval = tuple[float, float]

_CHUNK = 256
"""Resamples whose counts are floats at a time."""


class Bootstrap:
    """Resamples of n requests, drawn once from the seed."""

    def __init__(self, requests: int, config: IntervalConfig) -> None:
        self.config = config
        self.requests = requests
        rng = np.random.default_rng([config.seed, requests])
        even = np.full(requests, 1.0 / requests)
        self._counts = np.empty((config.resamples, requests), dtype=np.uint16)
        for row in self._counts:
            row[:] = rng.multinomial(requests, even)

    def interval(self, statistic: Statistic) -> Interval | None:
        """The interval of a metric; None with fewer than two requests that say anything.

        What is the same in all resamples looks certain to any bootstrap. A share of 0 or 1 gets Clopper and
        Pearson's exact interval; anything else (a perfect F1, say) has none, rather than one without width.
        """
        n = int(statistic.contributing.sum())
        if n < 2:
            return None
        value = statistic.value()
        if value is not None and statistic.is_share and value in (0.0, 1.0):
            return _exact(round(value * n), n, self.config.level)
        return self._limits(value, self._resampled(statistic), _left_out(statistic))

    def ratio(self, metric: Statistic, reference: Statistic) -> Interval | None:
        """The interval of metric / reference on the same resamples of the same requests."""
        both = int((metric.contributing & reference.contributing).sum())
        value, base = metric.value(), reference.value()
        if both < 2 or value is None or not base:
            return None
        resampled = self._resampled(metric) / _nonzero(self._resampled(reference))
        if metric.is_share and reference.is_share and np.ptp(resampled) == 0:
            # Equal on every request seen: what is left is how often they may differ on others (as above).
            differ = _exact(0, both, self.config.level)[1]
            return (value / base * (1 - differ), value / base * (1 + differ))
        left_out = _left_out(metric) / _nonzero(_left_out(reference))
        return self._limits(value / base, resampled, left_out)

    def _resampled(self, statistic: Statistic) -> np.ndarray:
        """[resamples] values."""
        sums = [
            self._counts[i : i + _CHUNK].astype(np.float64) @ statistic.rows
            for i in range(0, len(self._counts), _CHUNK)
        ]
        return statistic.values(np.concatenate(sums))

    def _limits(self, value: float | None, resampled: np.ndarray, left_out: np.ndarray) -> Interval | None:
        """Quantiles of the resampled values, adjusted for bias and acceleration when asked for."""
        found = resampled[np.isfinite(resampled)]
        if value is None or len(found) < 0.9 * len(resampled) or np.ptp(found) == 0:
            return None
        tails = np.array([(1 - self.config.level) / 2, (1 + self.config.level) / 2])
        if self.config.method == "bca":
            tails = _bca_tails(tails, value, found, left_out[np.isfinite(left_out)])
        low, high = np.quantile(found, tails)
        return float(low), float(high)


def _bca_tails(tails: np.ndarray, value: float, resampled: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """The quantiles that BCa takes (Efron 1987, eq. 2.3); those of the percentile method where BCa has none.

    `left_out` are the metric's values with one request left out each.
    """
    below = ((resampled < value).mean() + (resampled <= value).mean()) / 2
    away = left_out.mean() - left_out if len(left_out) else left_out
    spread = (away**2).sum()
    if not 0 < below < 1 or spread == 0:
        return tails
    bias = norm.ppf(below)
    acceleration = (away**3).sum() / (6 * spread**1.5)
    shifted = bias + norm.ppf(tails)
    adjusted: np.ndarray = norm.cdf(bias + shifted / (1 - acceleration * shifted))
    return adjusted if np.isfinite(adjusted).all() else tails


def _left_out(statistic: Statistic) -> np.ndarray:
    """[requests] values without one request each."""
    return statistic.values(statistic.rows.sum(0) - statistic.rows)


def _nonzero(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, np.nan, values)


def _exact(successes: int, n: int, level: float) -> Interval:
    """Clopper and Pearson's interval of a share."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high
