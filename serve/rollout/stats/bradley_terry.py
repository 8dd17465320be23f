"""Bradley-Terry board: strengths of several models from pairwise wins, ties and losses, with intervals.

P(i beats j) = 1 / (1 + exp(θ_j - θ_i)); a tie is half a win for each. Each model also plays `prior` virtual
games against an average opponent and wins half of them, so that an unbeaten model is finite and models that
never met are comparable, if barely. For the board of an A/B/n test: intervals hold at one look, not at all
times, and independence of the games is assumed; decisions are taken by `pairs`, two arms at a time.

Sources: Bradley & Terry, Biometrika 39(3/4), 1952; Hunter, "MM algorithms for generalized Bradley-Terry
models", Annals of Statistics 32(1), 2004 (existence and uniqueness); Newton's method on the concave penalised
log-likelihood, Wald intervals from its curvature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, ndtri

ELO = 400.0 / math.log(10.0)
"""Elo points of one unit of log odds."""
_STEPS = 100
_Floats = npt.NDArray[np.float64]


class Games(NamedTuple):
    """How the first of two models fared against the second."""

    wins: int
    ties: int
    losses: int


class Row(NamedTuple):
    """One model's line on the board; strengths are log odds against the board's mean (or the reference)."""

    name: str
    strength: float
    low: float
    high: float
    elo: float
    games: int


def board(
    games: Mapping[tuple[str, str], Games],
    *,
    reference: str | None = None,
    confidence: float = 0.95,
    prior: float = 1.0,
) -> tuple[Row, ...]:
    """All models that played, strongest first.

    Args:
        games: by ordered pair of names; (a, b) and (b, a) add up.
        reference: strengths are differences to this model; None: to the mean of all.
        prior: virtual games of each model against an average opponent, above 0.

    Raises: ValueError for a model against itself, negative counts, an unknown reference, or no prior.
    """
    names = sorted({name for pair in games for name in pair})
    if reference is not None and reference not in names:
        raise ValueError(f"board: reference {reference!r} played no game; there are: {', '.join(names)}")
    if prior <= 0.0 or not 0.0 < confidence < 1.0:
        raise ValueError(f"board: prior {prior} must be above 0 and confidence {confidence} in (0, 1)")
    if not names:
        return ()
    wins = _wins(games, names)
    theta = _maximise(wins, prior)
    contrast = _contrast(len(names), None if reference is None else names.index(reference))
    strengths = contrast @ theta
    errors = np.sqrt(
        np.maximum(np.diag(contrast @ np.linalg.inv(_curvature(wins, prior, theta)) @ contrast.T), 0)
    )
    z = float(ndtri(0.5 + confidence / 2.0))
    played = wins.sum(axis=0) + wins.sum(axis=1)
    rows = (
        Row(name, s, s - z * e, s + z * e, ELO * s, round(n))
        for name, s, e, n in zip(names, strengths.tolist(), errors.tolist(), played.tolist(), strict=True)
    )
    return tuple(sorted(rows, key=lambda row: (-row.strength, row.name)))


def win_probability(a: Row, b: Row) -> float:
    """Chance that a's answer is preferred to b's, ties counted half."""
    return float(expit(a.strength - b.strength))


def _wins(games: Mapping[tuple[str, str], Games], names: list[str]) -> _Floats:
    """wins[i, j]: how often i beat j, ties as half."""
    wins = np.zeros((len(names), len(names)))
    for (a, b), played in games.items():
        if a == b or min(played) < 0:
            raise ValueError(f"board: cannot count {played} of {a!r} against {b!r}")
        i, j = names.index(a), names.index(b)
        wins[i, j] += played.wins + played.ties / 2.0
        wins[j, i] += played.losses + played.ties / 2.0
    return wins


def _maximise(wins: _Floats, prior: float) -> _Floats:
    """Newton's method with halved steps; the penalised log-likelihood is strictly concave."""
    theta = np.zeros(len(wins))
    value = _log_likelihood(wins, prior, theta)
    for _ in range(_STEPS):
        chance = expit(theta[:, None] - theta[None, :])
        slope = (wins - (wins + wins.T) * chance).sum(axis=1) + prior * (0.5 - expit(theta))
        step = np.linalg.solve(_curvature(wins, prior, theta), slope)
        while _log_likelihood(wins, prior, theta + step) < value and np.abs(step).max() > 1e-12:
            step = step / 2.0
        theta = theta + step
        value = _log_likelihood(wins, prior, theta)
        if np.abs(step).max() <= 1e-12:
            break
    return theta


def _log_likelihood(wins: _Floats, prior: float, theta: _Floats) -> float:
    ahead = log_expit(theta[:, None] - theta[None, :])
    return float((wins * ahead).sum() + prior / 2.0 * (log_expit(theta) + log_expit(-theta)).sum())


def _curvature(wins: _Floats, prior: float, theta: _Floats) -> _Floats:
    """Minus the second derivative: positive definite."""
    chance = expit(theta[:, None] - theta[None, :])
    weight = (wins + wins.T) * chance * (1.0 - chance)
    own = prior * expit(theta) * expit(-theta)
    found: _Floats = np.diag(weight.sum(axis=1) + own) - weight
    return found


def _contrast(n: int, reference: int | None) -> _Floats:
    """Maps strengths to their differences to the mean, or to one model."""
    contrast: _Floats = np.eye(n)
    if reference is None:
        return contrast - 1.0 / n
    contrast[:, reference] -= 1.0
    return contrast
