"""E-processes for two arms' bounded scores: is the canary's mean harmful, is it non-inferior?

Higher scores are better. One look holds how often each of SCORE_VALUES was given in each arm. A gambler bets
on the canary's scores x against a and on the stable's scores y against b:

    W *= prod_x (1 + λ (x - a)) * prod_y (1 - λ_b (y - b)),    a = b - d,    λ_b = λ n_c / n_b

with b and λ known before the window. By 1 + u <= e^u, E[W'/W] <= exp(n_c λ (E x - E y + d)), which is at most
1 under H0: E x <= E y - d for λ > 0 (non-inferiority, d = margin) and under H0: E x >= E y - d for λ < 0
(harm, d = tolerance), wherever the means are: any drift that both arms share cancels, and scores of unequal
means within a window are covered, as only their sums enter. Sizes are given, outcomes independent given them.
A window's scores have no order, so λ is one number a window. What makes up for that in large windows is the
mixture over constant bets, which needs to learn nothing: its bets are as good on the window's last score as
on its first.

Does not know what is scored, nor what is decided from it.

Sources: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 86(1), 2024,
arXiv 2010.09686 (aGRAPA: section B.3; dKelly: B.5); two samples: Chugg, Cortes-Gomez, Wilder & Ramdas,
"Auditing fairness by betting", NeurIPS 2023, arXiv 2305.17570. On scores 0 and 1 the likelihood ratio of
two_sample is this product at one λ and its own projection b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from contracts.metrics import SCORE_VALUES
from serve.rollout.stats.combine import log_mean_exp

FRACTIONS = (0.01, 0.03, 0.08, 0.2, 0.45, 0.9)
"""Constant bets, as fractions of the largest that cannot lose everything: for small and large differences,
narrow and wide scores."""
HARM_WEIGHTS = (0.4, *(0.1,) * len(FRACTIONS))
"""aGRAPA, then FRACTIONS."""
NONINFERIOR_WEIGHTS = (0.3, 0.34, *(0.06,) * len(FRACTIONS))
"""aGRAPA on the canary's record, the bet that is best if both arms are equal, then FRACTIONS."""

MEMORY = 4000.0
"""The running moments forget beyond about this many scores, so that they follow a drift."""
_SHRINK = 40.0
"""Pseudo-scores distributed as the stable's in the canary's moments."""
_CAP = 0.75
"""Largest fraction of the bankroll's limit that an adaptive bet may take."""
_EDGE = 0.005
"""The centre of the bets keeps this distance from 0 and 1."""


class Moments(NamedTuple):
    """Remembered scores: how many, their sum, their sum of squares."""

    n: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of what is remembered; n must be positive."""
        return self.total / self.n

    @property
    def variance(self) -> float:
        """Variance, with one pseudo-score of variance 1/4 (the largest there is): never zero."""
        return (max(0.0, self.squares - self.total * self.mean) + 0.25) / (self.n + 1.0)


class State(NamedTuple):
    """Both tests on one pair of arms; `harm` and `noninferior` are logs of running products by strategy."""

    stable: Moments
    canary: Moments
    harm: tuple[float, ...]
    noninferior: tuple[float, ...]


class _Bets(NamedTuple):
    """One direction's bets on a window: centres, and a signed λ for each strategy."""

    a: float
    b: float
    lambdas: tuple[float, ...]


def start() -> State:
    """Fresh tests."""
    return State(Moments(), Moments(), (0.0,) * len(HARM_WEIGHTS), (0.0,) * len(NONINFERIOR_WEIGHTS))


def look(
    state: State, stable: Sequence[int], canary: Sequence[int], tolerance: float, margin: float
) -> State:
    """Multiply one window into both tests, then let it inform the next windows' bets.

    `stable` and `canary` count SCORE_VALUES (empty: none). A window without one of the arms compares nothing
    and multiplies by 1; so does the first one with stable scores, since nothing is known yet to centre on.

    Raises: ValueError for counts of another length.
    """
    b, c = scored(stable), scored(canary)
    harm, noninferior = state.harm, state.noninferior
    n_b, n_c = (sum(n for _, n in arm) for arm in (b, c))
    if n_b > 0 and n_c > 0 and state.stable.n > 0:
        record = _record(state)
        harm = _gain(harm, b, c, n_c / n_b, _harm_bets(state.stable, record, n_c / n_b, tolerance))
        bets = _noninferior_bets(state.stable, record, n_c / n_b, margin)
        noninferior = _gain(noninferior, b, c, n_c / n_b, bets)
    return State(remember(state.stable, b), remember(state.canary, c), harm, noninferior)


def log_harm(state: State) -> float:
    """Log of the e-process against H0: the canary's mean is at least the stable's minus the tolerance."""
    return log_mean_exp(state.harm, HARM_WEIGHTS)


def log_noninferior(state: State) -> float:
    """Log of the e-process against H0: the canary's mean is below the stable's by the margin or more."""
    return log_mean_exp(state.noninferior, NONINFERIOR_WEIGHTS)


def dump(state: State) -> dict[str, list[float]]:
    """The state as lists of floats, exact through JSON."""
    return {name: list(values) for name, values in state._asdict().items()}


def load(stored: dict[str, list[float]]) -> State:
    """The state from `dump`; fresh from an empty dict."""
    if not stored:
        return start()
    return State(
        Moments(*stored["stable"]),
        Moments(*stored["canary"]),
        tuple(stored["harm"]),
        tuple(stored["noninferior"]),
    )


def scored(counts: Sequence[int]) -> list[tuple[float, int]]:
    """The scores that occurred and how often. Raises ValueError unless there is one count a SCORE_VALUE."""
    if counts and len(counts) != len(SCORE_VALUES):
        raise ValueError(f"scores: expected {len(SCORE_VALUES)} counts (SCORE_VALUES), got {len(counts)}")
    return [(value, n) for value, n in zip(SCORE_VALUES, counts, strict=False) if n > 0]


def remember(moments: Moments, scores: list[tuple[float, int]]) -> Moments:
    """The moments with a window added, forgetting beyond MEMORY."""
    n = moments.n + sum(k for _, k in scores)
    keep = min(1.0, MEMORY / n) if n > 0 else 1.0
    total = moments.total + math.fsum(k * x for x, k in scores)
    squares = moments.squares + math.fsum(k * x * x for x, k in scores)
    return Moments(n * keep, total * keep, squares * keep)


def log_wealth(scores: list[tuple[float, int]], bet: float, centre: float) -> float:
    """Log of prod (1 + bet (x - centre)) over a window's scores."""
    return math.fsum(n * math.log1p(bet * (x - centre)) for x, n in scores)


def _gain(
    done: tuple[float, ...],
    stable: list[tuple[float, int]],
    canary: list[tuple[float, int]],
    ratio: float,
    bets: _Bets,
) -> tuple[float, ...]:
    return tuple(
        log + log_wealth(canary, lam, bets.a) + log_wealth(stable, -lam * ratio, bets.b) if lam else log
        for log, lam in zip(done, bets.lambdas, strict=True)
    )


def _record(state: State) -> Moments:
    """The canary's moments, shrunk to the stable's: it is taken for equal until it shows otherwise."""
    b, c = state.stable, state.canary
    share = _SHRINK / b.n
    return Moments(c.n + _SHRINK, c.total + share * b.total, c.squares + share * b.squares)


def _harm_bets(stable: Moments, record: Moments, ratio: float, tolerance: float) -> _Bets:
    """Bets against the canary: λ < 0, |λ| < 1/(1-a) and λ_b < 1/b."""
    a, b = _centres(stable, record, ratio, tolerance)
    limit = min(1.0 / (1.0 - a), 1.0 / (ratio * b))
    below = stable.mean - tolerance - record.mean
    adaptive = _agrapa(below, stable, record, ratio, a, b, limit)
    return _Bets(a, b, (-adaptive, *(-f * limit for f in FRACTIONS)))


def _noninferior_bets(stable: Moments, record: Moments, ratio: float, margin: float) -> _Bets:
    """Bets on the canary: λ > 0, λ < 1/a and λ_b < 1/(1-b)."""
    a, b = _centres(stable, record, ratio, margin)
    limit = min(1.0 / max(a, _EDGE), 1.0 / (ratio * (1.0 - b)))
    above = max(record.mean - stable.mean + margin, margin / 2.0)
    shown, equal = (_agrapa(by, stable, record, ratio, a, b, limit) for by in (above, margin))
    return _Bets(a, b, (shown, equal, *(f * limit for f in FRACTIONS)))


def _centres(stable: Moments, record: Moments, ratio: float, distance: float) -> tuple[float, float]:
    """(a, b) on the boundary a = b - distance, nearest to both arms' means weighted by their sizes."""
    pooled = (stable.mean + ratio * (record.mean + distance)) / (1.0 + ratio)
    b = min(max(pooled, _EDGE), 1.0 - _EDGE)
    return b - distance, b


def _agrapa(
    by: float, stable: Moments, record: Moments, ratio: float, a: float, b: float, limit: float
) -> float:
    """The bet with the best second-order growth if the means differ from the boundary by `by`.

    Growth a canary score is about λ by - λ²/2 (V_c + n_c/n_b V_b) with second moments V about the centres:
    aGRAPA of arXiv 2010.09686, extended to two arms.
    """
    spread_c = record.variance + (record.mean - a) ** 2
    spread_b = stable.variance + (stable.mean - b) ** 2
    return min(max(0.0, by) / (spread_c + ratio * spread_b), _CAP * limit)
