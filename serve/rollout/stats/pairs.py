"""E-processes for judged pairs: both arms answered the same requests, is the canary worse, is it no worse?

Each pair gives z in [0, 1], the canary's side of it: win 1, tie 1/2, loss 0; or (x_c - x_s + 1)/2 of the two
answers' scores. Margin and tolerance are on the scale of z: H0 of non-inferiority is E z <= 1/2 - margin, H0
of harm is E z >= 1/2 - tolerance. A margin of 0.05 is thus "wins and half the ties are 45 % or less", and on
scored pairs a score difference of 0.10, twice the margin.

The wealth of a bet is W *= prod_z (1 + λ (z - m)), m the null's mean: 0 < λ < 1/m against H0: E z <= m, and
-1/(1-m) < λ < 0 against H0: E z >= m. λ is known before the window, so each window's factor has an
expectation of at most 1 under the null, also when the pairs of a window have unequal means that average to it
(by the inequality of arithmetic and geometric means). Pairing removes what both arms share of a request's
difficulty, so that half the samples and less decide.

Does not know who judges, nor whether orders were randomised.

Source: Waudby-Smith & Ramdas, JRSS-B 86(1), 2024, arXiv 2010.09686: proposition 2 (capital process), section
B.3 (aGRAPA), B.5 (dKelly, a mean over constant bets).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serve.rollout.stats.betting import FRACTIONS, Moments, log_wealth, remember, scored
from serve.rollout.stats.combine import log_mean_exp

HARM_WEIGHTS = (0.4, *(0.1,) * len(FRACTIONS))
"""aGRAPA, then FRACTIONS."""
NONINFERIOR_WEIGHTS = (0.2, 0.56, *(0.04,) * len(FRACTIONS))
"""aGRAPA on the record, the bet that is best if both arms are equal, then FRACTIONS."""

_SHRINK = 20.0
"""Pseudo-pairs of mean 1/2 in the record's mean."""
_CAP = 0.75
"""Largest fraction of the bankroll's limit that an adaptive bet may take."""


class State(NamedTuple):
    """Both tests; `harm` and `noninferior` are logs of running products by strategy."""

    seen: Moments
    harm: tuple[float, ...]
    noninferior: tuple[float, ...]


def start() -> State:
    """Fresh tests."""
    return State(Moments(), (0.0,) * len(HARM_WEIGHTS), (0.0,) * len(NONINFERIOR_WEIGHTS))


def look(state: State, pairs: Sequence[int], tolerance: float, margin: float) -> State:
    """Multiply one window of pairs into both tests, then let it inform the next windows' bets.

    `pairs` counts SCORE_VALUES of z (empty: none). Raises: ValueError for another length, or a margin of 1/2
    and more, which no canary could fail.
    """
    if not 0.0 <= margin < 0.5 or not 0.0 <= tolerance < 0.5:
        raise ValueError(f"pairs: margin {margin} and tolerance {tolerance} must be in [0, 0.5)")
    z = scored(pairs)
    if not z:
        return state
    mean = (state.seen.total + 0.5 * _SHRINK) / (state.seen.n + _SHRINK)
    spread = state.seen.variance if state.seen.n > 0 else 0.25
    harm = _gain(state.harm, z, 0.5 - tolerance, _harm_bets(mean, spread, 0.5 - tolerance))
    bets = _noninferior_bets(mean, spread, margin)
    return State(remember(state.seen, z), harm, _gain(state.noninferior, z, 0.5 - margin, bets))


def log_harm(state: State) -> float:
    """Log of the e-process against H0: E z >= 1/2 - tolerance."""
    return log_mean_exp(state.harm, HARM_WEIGHTS)


def log_noninferior(state: State) -> float:
    """Log of the e-process against H0: E z <= 1/2 - margin."""
    return log_mean_exp(state.noninferior, NONINFERIOR_WEIGHTS)


def dump(state: State) -> dict[str, list[float]]:
    """The state as lists of floats, exact through JSON."""
    return {name: list(values) for name, values in state._asdict().items()}


def load(stored: dict[str, list[float]]) -> State:
    """The state from `dump`; fresh from an empty dict."""
    if not stored:
        return start()
    return State(Moments(*stored["seen"]), tuple(stored["harm"]), tuple(stored["noninferior"]))


def _gain(
    done: tuple[float, ...], z: list[tuple[float, int]], centre: float, lambdas: tuple[float, ...]
) -> tuple[float, ...]:
    return tuple(
        log + log_wealth(z, lam, centre) if lam else log for log, lam in zip(done, lambdas, strict=True)
    )


def _harm_bets(mean: float, spread: float, null: float) -> tuple[float, ...]:
    limit = 1.0 / (1.0 - null)
    return (-_agrapa(null - mean, spread, limit), *(-f * limit for f in FRACTIONS))


def _noninferior_bets(mean: float, spread: float, margin: float) -> tuple[float, ...]:
    limit = 1.0 / (0.5 - margin)
    above = max(mean - (0.5 - margin), margin / 2.0)
    shown, equal = (_agrapa(by, spread, limit) for by in (above, margin))
    return (shown, equal, *(f * limit for f in FRACTIONS))


def _agrapa(by: float, spread: float, limit: float) -> float:
    """Best second-order growth if the mean is `by` beyond the null: by / (variance + by²)."""
    return min(max(0.0, by) / (spread + by * by), _CAP * limit)
