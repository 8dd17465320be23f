"""How a metric falls with the size of the data: e(n) = a + b n^-c, and what doubling it would bring.

The law and its use for planning data: Hestness et al. 2017 (arXiv 1712.00409), eq. 1; Rosenfeld et al. 2020.
Beyond the rows there are it is an extrapolation. Pure numpy; knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

_EXPONENTS = np.geomspace(0.02, 3.0, 200)
_RESAMPLES = 2000
_PARAMETERS = 3


class Worth(StrEnum):
    """Is more data worth it?"""

    IS = "is"
    IS_NOT = "isn't"
    UNKNOWN = "may be"


@dataclass(frozen=True)
class Curve:
    """A fitted law in the metric's own direction, and its bootstrap's replicates."""

    a: float
    b: float
    c: float
    sign: float
    """1 when less is better, -1 when more is: then the metric is a - b n^-c with a its limit."""
    unit: float
    """Rows that n is counted in: the law fitted is a + b (rows / unit)^-c."""
    replicates: np.ndarray
    """[resamples, 3]: a, b, c of each; empty when there are too few points to say how sure the fit is."""

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The fitted metric."""
        return self.sign * _law(self.a, self.b, self.c, rows / self.unit)

    def band(self, rows: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Pointwise interval of the fitted metric."""
        if not len(self.replicates):
            return None
        a, b, c = (self.replicates[:, i, None] for i in range(3))
        values = self.sign * _law(a, b, c, rows[None, :] / self.unit)
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


@dataclass(frozen=True)
class Gain:
    """What doubling the rows is expected to bring, in the metric's unit; more is better."""

    rows: int
    expected: float
    interval: tuple[float, float] | None
    threshold: float

    @property
    def worth(self) -> Worth:
        """By the whole interval; around the threshold, or without one, nobody knows."""
        if self.interval is None:
            return Worth.UNKNOWN
        if self.interval[0] >= self.threshold:
            return Worth.IS
        return Worth.IS_NOT if self.interval[1] < self.threshold else Worth.UNKNOWN


def fit(rows: np.ndarray, values: np.ndarray, minimise: bool, seed: int = 0) -> Curve:
    """Least squares over the points, c on a grid and a, b in closed form with b >= 0 (more data never harms).

    The replicates are of a residual bootstrap, residuals inflated for the three parameters. With fewer than
    two points more than parameters there are none.
    """
    sign = 1.0 if minimise else -1.0
    unit = float(rows.max())
    n, errors = rows / unit, sign * values
    ((a, b, c),) = _fit_all(n, errors[None, :])
    spare = len(rows) - _PARAMETERS
    if spare < 2:
        return Curve(a, b, c, sign, unit, np.empty((0, 3)))
    fitted = _law(a, b, c, n)
    residuals = (errors - fitted) * np.sqrt(len(rows) / spare)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(residuals - residuals.mean(), size=(_RESAMPLES, len(rows)))
    return Curve(a, b, c, sign, unit, _fit_all(n, fitted + drawn))


def doubling(curve: Curve, level: float, threshold: float) -> Gain:
    """The gain from the most rows there were to twice as many: b (1 - 2^-c), as n is counted in those."""
    expected = curve.b * (1 - 2.0**-curve.c)
    interval = None
    if len(curve.replicates):
        gains = curve.replicates[:, 1] * (1 - 2.0 ** -curve.replicates[:, 2])
        low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
        interval = (float(low), float(high))
    return Gain(round(curve.unit), float(expected), interval, threshold)


def sentence(gain: Gain, metric: str, level: float) -> str:
    """The study's answer in one sentence, with its figures."""
    shown = "no interval: too few points"
    if gain.interval is not None:
        shown = f"{level:.0%} interval {gain.interval[0]:.3g} to {gain.interval[1]:.3g}"
    tail = {
        Worth.IS: "",
        Worth.IS_NOT: "",
        Worth.UNKNOWN: " More seeds or more shares would tell.",
    }[gain.worth]
    return (
        f"More data {gain.worth} worth it: doubling the {gain.rows:,} training rows is expected to improve"
        f" {metric} by {gain.expected:.3g} ({shown}), where {gain.threshold:g} is asked for.{tail}"
    )


def _law(a: float, b: float, c: float, n: np.ndarray) -> np.ndarray:
    return a + b * n**-c


def _fit_all(n: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """[problems, 3]: a, b, c of each row of `errors` [problems, points]."""
    means = errors.mean(1, keepdims=True)
    basis = n[None, :] ** -_EXPONENTS[:, None]
    away = basis - basis.mean(1, keepdims=True)
    size = (away**2).sum(1)
    slopes = np.maximum((errors - means) @ away.T / size, 0.0)
    # The squares left over are those of the centred errors less this.
    best = (slopes * (2 * (errors - means) @ away.T - slopes * size)).argmax(1)
    b = np.take_along_axis(slopes, best[:, None], 1)[:, 0]
    return np.stack([means[:, 0] - b * basis.mean(1)[best], b, _EXPONENTS[best]], 1)
