"""Where to put a cascade's threshold: as few calls of the second as a promise about quality allows.

The promise: with confidence 1 - δ the cascade keeps at least `target` of the second's quality. A request
costs quality when the first's answer is served and worse. For scores of 0 and 1 it is enough that, of the
requests that the second answers rightly, a share of at most α = 1 - target is lost:

    E[cascade] >= P(second right, cascade right) = E[second] (1 - P(lost | second right)),

so every threshold is one binomial test, exact: p = P(Bin(n, α) <= lost). Other scores in [0, 1] are tested
by the Hoeffding-Bentkus bound on  served * max(0, second - first) + α (1 - second),  whose mean is at most α
when the promise holds. Where the first is better than the second it is not counted: the bound is
conservative.

Thresholds are tried from the strictest on, each at level δ, until one fails (fixed-sequence testing), so the
chance that the last one that passed breaks the promise is at most δ. The order must not depend on what is
tested: thresholds are quantiles of a part of the rows that is not tested. Several signals share δ.

Holds for requests drawn like the logged ones, independently. Pure. Knows nothing about where rows come from.

Sources: Angelopoulos, Bates, Candès, Jordan & Lei, "Learn then Test", Annals of Applied Statistics 2025,
arXiv 2110.01052 (sections 2.2 and 3.2); Bates et al., "Distribution-free, risk-controlling prediction sets",
J. ACM 2021, arXiv 2101.02703 (Theorem 2: Hoeffding-Bentkus); Clopper & Pearson, Biometrika 1934.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import xlogy  # type: ignore[import-untyped]
from scipy.stats import beta, binom  # type: ignore[import-untyped]

from contracts.cascade import Signal
from contracts.config import Record
from contracts.errors import DataError

Floats = NDArray[np.float64]

GRID_SHARE, GRID_LEAST = 0.1, 50
"""Of the rows, and at least so many, make the thresholds that the others test."""
_ROUNDING = 1e-9
POINTS = 200
"""Most thresholds of a signal."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request, answered by both."""

    signals: Mapping[Signal, float | None]
    """Of the first's answer; None: it could not be judged, and the second answers whatever the threshold."""
    first: float
    """Score of the first's answer in [0, 1]."""
    then: float
    """Score of the second's."""


class Point(Record):
    """One threshold on the tested rows."""

    threshold: float
    calls: float
    """Share of the requests that the second answers."""
    quality: float
    """Mean score of the cascade."""
    kept: float
    """Quality over the second's."""
    kept_low: float | None
    """Clopper-Pearson lower bound of it at 1 - δ, of this threshold alone; None where scores are no 0 and
    1."""
    p_value: float
    certified: bool
    """It, and every stricter one, passed."""


class Frontier(Record):
    """Every threshold of one signal, the strictest first."""

    signal: Signal
    delta: float
    """This signal's part of δ."""
    points: tuple[Point, ...]

    def best(self) -> Point | None:
        """The loosest certified threshold."""
        return next((p for p in reversed(self.points) if p.certified), None)


class Calibration(Record):
    """What was found."""

    signal: Signal
    best: Point
    target: float
    confidence: float
    rows: int = Field(ge=1)
    """All rows."""
    tested: int
    """Rows that thresholds were tested on; the others made the thresholds."""
    first: float
    """Mean score of the first alone, on the tested rows."""
    then: float
    """Of the second alone."""
    frontiers: tuple[Frontier, ...]


def rows_needed(target: float, delta: float) -> int:
    """Requests that the second answers rightly, at least, for a threshold that loses none of them."""
    return math.ceil(math.log(delta) / math.log(target))


def calibrate(
    items: Sequence[Item], wanted: Sequence[Signal], target: float, confidence: float, seed: int = 0
) -> Calibration:
    """The signal and threshold with the fewest calls of the second that keep the promise.

    Args:
        target: share of the second's quality to keep, in (0, 1).
        confidence: 1 - δ, in (0, 1).
        seed: of the choice of the rows that make the thresholds.

    Raises: DataError when rows are too few, or no threshold keeps the promise.
    """
    _check(items, wanted, target, confidence)
    delta = (1.0 - confidence) / len(wanted)
    order = np.random.default_rng(seed).permutation(len(items))
    cut = max(GRID_LEAST, round(GRID_SHARE * len(items)))
    makers, tested = order[:cut], order[cut:]
    first, then = (np.array([getattr(i, name) for i in items], float) for name in ("first", "then"))
    exact = bool(np.isin(np.concatenate([first, then]), (0.0, 1.0)).all())
    right, needed = float(then[tested].sum()), rows_needed(target, delta)
    if right < needed:
        raise DataError(
            f"too few requests: {len(items)}; {len(tested)} test thresholds, the second answers {right:.0f} "
            f"of them rightly; {target:g} of its quality at confidence {confidence:g} takes {needed}, even "
            "if nothing is lost. Log more, or ask for less."
        )
    frontiers = []
    for signal in wanted:
        values = np.array([_number(i.signals.get(signal)) for i in items])
        grid = _thresholds(values[makers])
        points = _points(grid, values[tested], first[tested], then[tested], 1.0 - target, delta, exact)
        frontiers.append(Frontier(signal=signal, delta=delta, points=points))
    best = [(point.calls, f.signal, point) for f in frontiers if (point := f.best()) is not None]
    if not best:
        raise DataError(_none(frontiers, target, confidence))
    _, signal, point = min(best, key=lambda one: one[0])
    return Calibration(
        signal=signal, best=point, target=target, confidence=confidence, rows=len(items), tested=len(tested),
        first=float(first[tested].mean()), then=float(then[tested].mean()), frontiers=tuple(frontiers),
    )  # fmt: skip


def hoeffding_bentkus(mean: Floats, n: int, alpha: float) -> Floats:
    """p-values of "the mean of n values in [0, 1] is at least alpha" (Bates et al. 2021, Theorem 2)."""
    below = np.clip(mean, 0.0, alpha)
    kl = xlogy(1.0 - below, (1.0 - below) / (1.0 - alpha)) + xlogy(below, below / alpha)
    # Sums of many floats: what should be an integer count may lie just above it.
    bentkus = math.e * binom.cdf(np.ceil(n * below - _ROUNDING), n, alpha)
    p: Floats = np.where(mean >= alpha, 1.0, np.minimum(1.0, np.minimum(np.exp(-n * kl), bentkus)))
    return p


def _points(
    grid: Floats, values: Floats, first: Floats, then: Floats, alpha: float, delta: float, exact: bool
) -> tuple[Point, ...]:
    served = values[None, :] >= grid[:, None]
    low: list[float | None] = [None] * len(grid)
    if exact:
        n, lost = int(then.sum()), (served & (then > first)).sum(1)
        p = binom.cdf(lost, n, alpha)
        some = np.where(lost < n, beta.ppf(1.0 - delta, lost + 1, np.maximum(n - lost, 1)), 1.0)
        low = list(1.0 - some)
    else:
        losses = served * np.maximum(0.0, then - first) + alpha * (1.0 - then)
        p = hoeffding_bentkus(losses.mean(1), len(then), alpha)
    certified = np.logical_and.accumulate(p <= delta)
    quality = np.where(served, first, then).mean(1)
    return tuple(
        Point(
            threshold=float(grid[i]),
            calls=float(1.0 - served[i].mean()),
            quality=float(quality[i]),
            kept=float(quality[i] / then.mean()),
            kept_low=low[i],
            p_value=float(p[i]),
            certified=bool(certified[i]),
        )
        for i in range(len(grid))
    )


def _thresholds(values: Floats) -> Floats:
    """At most POINTS of the values, the strictest first, none twice."""
    found = np.unique(values[np.isfinite(values)])[::-1]
    if len(found) <= POINTS:
        return found
    return found[np.unique(np.linspace(0, len(found) - 1, POINTS).round().astype(int))]


def _number(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def _check(items: Sequence[Item], wanted: Sequence[Signal], target: float, confidence: float) -> None:
    if not wanted or len(set(wanted)) != len(wanted):
        raise DataError(f"give one signal at least, and none twice; got {', '.join(wanted) or 'none'}.")
    for name, value in (("target", target), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise DataError(f"{name}: must be between 0 and 1, as in 0.995; got {value:g}.")
    if len(items) <= GRID_LEAST:
        raise DataError(f"too few requests: {len(items)}; more than {GRID_LEAST} make the thresholds alone.")
    if any(not 0.0 <= score <= 1.0 for item in items for score in (item.first, item.then)):
        raise DataError("scores must lie in [0, 1].")


def _none(frontiers: Sequence[Frontier], target: float, confidence: float) -> str:
    tried = [f"{f.signal}: {_tried(f)}" for f in frontiers]
    return (
        f"no threshold keeps {target:g} of the second's quality at confidence {confidence:g}: "
        f"{'; '.join(tried)}. Train the first better, try another signal, or ask for less."
    )


def _tried(frontier: Frontier) -> str:
    if not frontier.points:
        return "no answer could be judged"
    point = frontier.points[0]
    at = f"at the strictest threshold ({point.threshold:.4g})"
    return f"{at} {point.kept:.4f} is kept, p = {point.p_value:.2g}"
