"""E-processes for two Bernoulli arms observed in windows: is the canary harmful, is it non-inferior?

Pure functions on integer counts. An e-process starts at 1, is at most 1 in expectation under its null
hypothesis at any time one cares to look, so it passes 1/alpha with probability at most alpha (Ville).
Does not know what is counted (errors, slow answers, wrong answers) nor what is decided from it.

Source: Turner, Ly & Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for
optional stopping", JSPI 230 (2024), arXiv 2106.02693, eq. 2 and theorem 1; nulls with a margin: Turner &
Grünwald, arXiv 2203.09785.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from serve.rollout.stats.combine import log_mean_exp

HARM_ALTERNATIVES: tuple[tuple[float, float], ...] = (
    (0.005, 0.10),
    (0.01, 0.30),
    (0.02, 0.35),
    (0.05, 0.17),
    (0.15, 0.04),
    (0.40, 0.02),
    (0.75, 0.02),
)
"""(excess over the tolerance, prior weight). Most weight lies where minutes are at stake; the three large
ones catch a broken student within a handful of answers and need little, as their products grow by a factor of
ten or more per failure. Tuned in setting S1 (docs/decisions/0010)."""
_EXCESSES = tuple(excess for excess, _ in HARM_ALTERNATIVES)
HARM_WEIGHTS = tuple(weight for _, weight in HARM_ALTERNATIVES)

MEMORY = 4000.0
"""The running estimates forget beyond about this many requests, so that they follow a drifting base rate."""
_SHRINK = 40.0
"""Pseudo-observations at the stable rate in the canary's estimate."""
LOWEST, HIGHEST = 1e-4, 0.985
PRIOR_N = 100.0
"""Pseudo-observations of stable before any window: a look's worth, so a wrong guess is soon outvoted."""


class Window(NamedTuple):
    """Counts of both arms over the same stretch of time."""

    n_b: int
    k_b: int
    n_c: int
    k_c: int


class TwoSample(NamedTuple):
    """State of both tests on one pair of arms. `harm` and `noninferior` are logs of running products."""

    base_n: float
    base_k: float
    canary_n: float
    canary_k: float
    harm: tuple[float, ...]
    noninferior: tuple[float, ...]


def start(prior_rate: float, prior_n: float = PRIOR_N) -> TwoSample:
    """Fresh tests; the prior only steers the first windows' alternatives, validity never depends on it."""
    return TwoSample(
        base_n=prior_n,
        base_k=prior_n * prior_rate,
        canary_n=0.0,
        canary_k=0.0,
        harm=(0.0,) * len(HARM_ALTERNATIVES),
        noninferior=(0.0, 0.0),
    )


def look(state: TwoSample, window: Window, tolerance: float, margin: float) -> TwoSample:
    """Multiply one window into both tests, then let it inform the next windows' alternatives.

    The alternatives come from earlier windows only (they are predictable), which is what makes the product
    of the windows an e-process. A window without one of the arms compares nothing and multiplies by 1.
    """
    harm, noninferior = state.harm, state.noninferior
    if window.n_b > 0 and window.n_c > 0:
        base = _clip(state.base_k / state.base_n)
        worse = [_harmful(base, excess, tolerance) for excess in _EXCESSES]
        harm = _multiply(harm, block_log_es(window, base, worse, tolerance))
        good = _noninferior_alternatives(state, base, margin)
        noninferior = _multiply(noninferior, block_log_es(window, base, good, margin))
    base_n, base_k = _remember(state.base_n, state.base_k, window.n_b, window.k_b)
    canary_n, canary_k = _remember(state.canary_n, state.canary_k, window.n_c, window.k_c)
    return TwoSample(base_n, base_k, canary_n, canary_k, harm, noninferior)


def log_harm(state: TwoSample) -> float:
    """Log of the mixture over alternatives: a weighted mean of e-processes is an e-process."""
    return log_mean_exp(state.harm, HARM_WEIGHTS)


def log_noninferior(state: TwoSample) -> float:
    """Log of the non-inferiority e-process."""
    return log_mean_exp(state.noninferior)


def harm_log_e(window: Window, base: float, excess: float, tolerance: float) -> float:
    """One window against H0: p_c <= p_b + tolerance, alternative (base, base + tolerance + excess)."""
    return block_log_e(window, base, _harmful(base, excess, tolerance), tolerance)


def noninferior_log_e(window: Window, base: float, rate: float, margin: float) -> float:
    """One window against H0: p_c >= p_b + margin, alternative (base, rate) with rate < base + margin."""
    return block_log_e(window, base, rate, margin)


def block_log_e(window: Window, alt_b: float, alt_c: float, delta: float) -> float:
    """Log of the block e-variable for the null boundary p_c = p_b + delta (arXiv 2106.02693, eq. 2).

    It is the likelihood ratio of the alternative (alt_b, alt_c) to its KL projection (x, x + delta) on the
    boundary. Why it is an e-variable on the whole null side: with a_b = (alt_b - x)/(x(1-x)) and a_c alike,
    ln E[e] <= n_b a_b (p_b - x) + n_c a_c (p_c - x - delta), and the projection makes n_b a_b = -n_c a_c, so
    this is n_c a_c (p_c - p_b - delta): never positive on the side of the null away from the alternative.
    """
    return block_log_es(window, alt_b, (alt_c,), delta)[0]


def block_log_es(window: Window, alt_b: float, alts_c: Sequence[float], delta: float) -> list[float]:
    """`block_log_e` for several canary rates at once; 0 for one on the boundary, which would compare nothing.

    Most of a controller's arithmetic happens here, so what the alternatives share is computed once.
    """
    n_b, k_b, n_c, k_c = window
    if n_b <= 0 or n_c <= 0:
        return [0.0] * len(alts_c)
    ok_b, ok_c, log = n_b - k_b, n_c - k_c, math.log
    known = k_b * log(alt_b) + ok_b * log(1.0 - alt_b)
    logs = []
    for alt_c in alts_c:
        if alt_c == alt_b + delta:
            logs.append(0.0)
            continue
        x = boundary_projection(n_b, n_c, alt_b, alt_c, delta)
        y = x + delta
        alternative = known + k_c * log(alt_c) + ok_c * log(1.0 - alt_c)
        null = k_b * log(x) + ok_b * log(1.0 - x) + k_c * log(y) + ok_c * log(1.0 - y)
        logs.append(alternative - null)
    return logs


def boundary_projection(n_b: int, n_c: int, alt_b: float, alt_c: float, delta: float) -> float:
    """The x that minimises KL((alt_b, alt_c) || (x, x + delta)) weighted by the arms' sizes.

    Root of n_b(alt_b - x)/(x(1-x)) + n_c(alt_c - x - delta)/((x+delta)(1-x-delta)), which falls in x. Cleared
    of its denominators that is a cubic with three real roots, and ours is the middle one (as in Farrington &
    Manning, Statistics in Medicine 9 (1990), appendix). A Newton step takes the cosine's rounding away.
    """
    if delta == 0.0:
        return (n_b * alt_b + n_c * alt_c) / (n_b + n_c)
    share_b = n_b / (n_b + n_c)
    share_c = 1.0 - share_b
    spread, shifted = delta * (1.0 - delta), alt_c - delta
    # x³ + square x² + linear x + rest = 0
    square = -(share_b * (alt_b + 1.0 - 2.0 * delta) + share_c * (shifted + 1.0))
    linear = share_b * (alt_b * (1.0 - 2.0 * delta) - spread) + share_c * shifted
    rest = share_b * alt_b * spread
    third = square / 3.0
    radius = math.sqrt(third * third - linear / 3.0)
    ratio = (0.5 * third * linear - third * third * third - 0.5 * rest) / (radius * radius * radius)
    angle = math.acos(min(max(ratio, -1.0), 1.0))
    x = 2.0 * radius * math.cos((angle - math.tau) / 3.0) - third
    return x - (((x + square) * x + linear) * x + rest) / ((3.0 * x + 2.0 * square) * x + linear)


def _noninferior_alternatives(state: TwoSample, base: float, margin: float) -> tuple[float, float]:
    """Two predictable guesses of the canary's rate under 'no worse': its record, and the stable's rate."""
    shrunk = (state.canary_k + _SHRINK * base) / (state.canary_n + _SHRINK)
    cap = min(base + margin / 2.0, HIGHEST)
    return min(max(shrunk, LOWEST), cap), base


def _harmful(base: float, excess: float, tolerance: float) -> float:
    """Never below the boundary, where it would test the other direction."""
    boundary = base + tolerance
    rate = boundary + excess
    return rate if rate <= HIGHEST else max(HIGHEST, boundary)


def _multiply(done: tuple[float, ...], gained: list[float]) -> tuple[float, ...]:
    return tuple([a + b for a, b in zip(done, gained, strict=True)])


def _remember(n: float, k: float, new_n: int, new_k: int) -> tuple[float, float]:
    total = n + new_n
    keep = min(1.0, MEMORY / total) if total > 0 else 1.0
    return total * keep, (k + new_k) * keep


def _clip(rate: float) -> float:
    return min(max(rate, LOWEST), HIGHEST)
