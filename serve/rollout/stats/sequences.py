"""Confidence sequences for reports: a rate, a mean score, and the difference of two arms over time.

A sequence holds the truth at all times at once with probability 1 - alpha, so a report may be opened at any
time without a peeking penalty. For people to read, never to decide by: decisions come from the e-processes,
whose bets are sharper. Knows nothing about metrics or roles.

Sources: Howard, Ramdas, McAuliffe & Sekhon, Annals of Statistics 49(2), 2021 (beta-binomial mixture);
Waudby-Smith & Ramdas, JRSS-B 86(1), 2024, arXiv 2010.09686 (means, by constant bets: section B.5); the
two-arm bet is that of `betting`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy

from contracts.metrics import SCORE_VALUES
from serve.rollout.stats.betting import Moments, centres, log_wealth, record_of, remember
from serve.rollout.stats.combine import log_mean_exp
from serve.rollout.stats.two_sample import Window

_FRACTIONS = (0.003, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.7, 0.9)
_TINY = 1e-12
_EDGE = 0.005
"""Smallest distance of a bet's centre from 0, as in `betting`."""
_GRID = 120
"""Candidate differences on each side of the estimate."""

_Floats = npt.NDArray[np.float64]
_Scores = list[tuple[float, int]]


class Interval(NamedTuple):
    """What is still possible, around the estimate."""

    low: float
    estimate: float
    high: float


def rate(k: int, n: int, alpha: float = 0.05) -> Interval:
    """A rate from k of n; without data (0, 1/2, 1). Mixture Beta(1, 1), uniform over all times.

    Collects every p with B(1+k, 1+n-k) / B(1, 1) / (p^k (1-p)^(n-k)) < 1/alpha.
    """
    if not 0 <= k <= n:
        raise ValueError(f"rate: cannot have {k} of {n}")
    if n == 0:
        return Interval(0.0, 0.5, 1.0)
    found = k / n
    mixed = float(betaln(1 + k, 1 + n - k)) + math.log(alpha)

    def kept(p: float) -> float:
        return float(xlogy(k, p) + xlog1py(n - k, -p)) - mixed

    return Interval(_edge(kept, found, 0.0), found, _edge(kept, found, 1.0))


def mean(counts: Sequence[int], alpha: float = 0.05, values: Sequence[float] = SCORE_VALUES) -> Interval:
    """The mean of scores in [0, 1] counted on `values`; without data (0, 1/2, 1).

    For each candidate m half the capital bets upwards with λ = f/m, half downwards with λ = f/(1-m), averaged
    over constant fractions f; m is kept while neither half reaches 1/alpha. Both fall, or rise, in m.
    """
    scores = [(x, n) for x, n in zip(values, counts, strict=True) if n > 0]
    n = sum(k for _, k in scores)
    if n == 0:
        return Interval(0.0, 0.5, 1.0)
    found = math.fsum(x * k for x, k in scores) / n
    level = math.log(2.0 / alpha)

    def kept_low(m: float) -> float:
        return level - log_mean_exp([log_wealth(scores, f / m, m) for f in _FRACTIONS])

    def kept_high(m: float) -> float:
        return level - log_mean_exp([log_wealth(scores, -f / (1.0 - m), m) for f in _FRACTIONS])

    return Interval(_edge(kept_low, found, 0.0), found, _edge(kept_high, found, 1.0))


def risk_difference(windows: Sequence[Window], alpha: float = 0.05) -> list[Interval]:
    """p_canary - p_stable after each window; see `difference`."""
    counted = [((w.n_b - w.k_b, w.k_b), (w.n_c - w.k_c, w.k_c)) for w in windows]
    return difference(counted, alpha, (0.0, 1.0))


def difference(
    windows: Sequence[tuple[Sequence[int], Sequence[int]]],
    alpha: float = 0.05,
    values: Sequence[float] = SCORE_VALUES,
) -> list[Interval]:
    """Mean of canary minus mean of stable after each window, from (stable, canary) counts on `values`.

    Windows compare concurrent traffic, so neither a drift that both arms share nor a ramp biases it; the
    difference itself is taken to stay the same. The estimate weighs windows by n_b n_c / (n_b + n_c)
    (Mantel-Haenszel). For each difference on a grid two wealth processes bet against "at most" and "at least"
    it; what both leave below 2/alpha is kept, and one grid point more on either side. Empty counts are no
    scores.
    """
    estimates = _estimates(windows, values)
    if not estimates:
        return []
    grid = _grid(estimates[-1])
    level, logs = math.log(2.0 / alpha), np.zeros((2, len(_FRACTIONS), grid.size))
    stable = canary = Moments()
    found: list[Interval] = []
    for (counts_b, counts_c), estimate in zip(windows, estimates, strict=True):
        b, c = _scored(counts_b, values), _scored(counts_c, values)
        n_b, n_c = (sum(n for _, n in arm) for arm in (b, c))
        if n_b > 0 and n_c > 0 and stable.n > 0:
            logs += _log_gains(b, c, n_c / n_b, stable, record_of(stable, canary), grid)
        stable, canary = remember(stable, b), remember(canary, c)
        above, below = _log_means(logs)
        found.append(_kept(grid, above < level, below < level, estimate))
    return found


def _edge(kept: Callable[[float], float], inside: float, outermost: float) -> float:
    """Where a candidate stops being kept between the estimate and 0 or 1."""
    if abs(outermost - inside) < _TINY:
        return outermost
    last = abs(outermost - _TINY)
    if kept(last) >= 0.0:
        return outermost
    return float(brentq(kept, *sorted((min(max(inside, _TINY), 1.0 - _TINY), last)), xtol=1e-10))


def _estimates(
    windows: Sequence[tuple[Sequence[int], Sequence[int]]], values: Sequence[float]
) -> list[float]:
    done, weights, found = 0.0, 0.0, []
    for counts in windows:
        (n_b, sum_b), (n_c, sum_c) = (_sums(arm, values) for arm in counts)
        if n_b > 0 and n_c > 0:
            weight = n_b * n_c / (n_b + n_c)
            done += weight * (sum_c / n_c - sum_b / n_b)
            weights += weight
        found.append(done / weights if weights > 0 else 0.0)
    return found


def _sums(counts: Sequence[int], values: Sequence[float]) -> tuple[int, float]:
    scores = _scored(counts, values)
    return sum(n for _, n in scores), math.fsum(x * n for x, n in scores)


def _scored(counts: Sequence[int], values: Sequence[float]) -> _Scores:
    return [(x, n) for x, n in zip(values, counts, strict=True) if n > 0] if counts else []


def _grid(centre: float) -> _Floats:
    """Candidate differences, dense around the final estimate. Each is a test of its own: any will do."""
    spread = np.sinh(np.linspace(0.0, 6.0, _GRID)) / math.sinh(6.0)
    below, above = centre - (centre + 1.0) * spread, centre + (1.0 - centre) * spread
    return np.concatenate((below[:0:-1], above))


def _log_gains(
    b: _Scores, c: _Scores, ratio: float, stable: Moments, record: Moments, grid: _Floats
) -> _Floats:
    """What a window multiplies into (above, below) × bets × differences, as logs."""
    pairs = [centres(stable, record, ratio, -float(delta)) for delta in grid]
    at, base = (np.array(side) for side in zip(*pairs, strict=True))
    up = np.minimum(1.0 / np.maximum(at, _EDGE), 1.0 / (ratio * (1.0 - base)))
    down = np.minimum(1.0 / np.maximum(1.0 - at, _EDGE), 1.0 / (ratio * base))
    fractions = np.array(_FRACTIONS)[:, None]
    lambdas = np.stack((fractions * up, -fractions * down))
    gains = np.zeros_like(lambdas)
    for x, n in c:
        gains += n * np.log1p(lambdas * (x - at))
    for y, n in b:
        gains += n * np.log1p(-lambdas * ratio * (y - base))
    return gains


def _log_means(logs: _Floats) -> tuple[_Floats, _Floats]:
    """Log of the mean over bets, for each direction and difference."""
    top = logs.max(axis=1)
    means = top + np.log(np.exp(logs - top[:, None, :]).mean(axis=1))
    return means[0], means[1]


def _kept(
    grid: _Floats, not_above: npt.NDArray[np.bool_], not_below: npt.NDArray[np.bool_], estimate: float
) -> Interval:
    """Strike off from each end while it is refuted; the neighbour of the last refuted one is the bound.

    Striking off only from the ends keeps the statement true where a wealth is not monotone in the difference.
    """
    first = int(np.argmax(not_above)) if not_above.any() else grid.size - 1
    last = grid.size - 1 - int(np.argmax(not_below[::-1])) if not_below.any() else 0
    low, high = grid[max(first - 1, 0)], grid[min(last + 1, grid.size - 1)]
    return Interval(min(float(low), estimate), estimate, max(float(high), estimate))
