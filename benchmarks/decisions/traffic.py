"""Simulated traffic for the peers, all runs of a row at once: one array element a run.

The same distributions as serve.rollout.simulate draws one run at a time. Knows nothing about controllers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.decisions.setting import BASE, INCIDENT_EXTRA, PER_MINUTE, SEED, in_incident

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Minute(NamedTuple):
    """Counts of one minute by run: requests and errors of stable and canary."""

    n_b: Ints
    k_b: Ints
    n_c: Ints
    k_c: Ints


class Traffic:
    """A row's traffic, minute by minute; the weight may differ by run and by minute."""

    def __init__(
        self,
        runs: int,
        extra: float,
        per_minute: float = PER_MINUTE,
        base: float = BASE,
        incident: bool = False,
        seed: int | tuple[int, ...] = SEED,
    ) -> None:
        self.runs, self.per_minute, self.base, self.extra = runs, per_minute, base, extra
        self._incident, self._minute = incident, 0
        self._rng = np.random.default_rng(seed)

    def minute(self, weight: float | Floats) -> Minute:
        """The next minute."""
        self._minute += 1
        shared = INCIDENT_EXTRA if self._incident and in_incident(self._minute) else 0.0
        n = self._rng.poisson(self.per_minute, self.runs)
        n_c = self._rng.binomial(n, weight)
        n_b = n - n_c
        k_b = self._rng.binomial(n_b, self.base + shared)
        return Minute(n_b, k_b, n_c, self._rng.binomial(n_c, self.base + self.extra + shared))

    def minutes(self, count: int, weight: float | Floats) -> Minute:
        """The next minutes as arrays [minute, run]; `weight` is one for all, or one a minute."""
        weights = np.broadcast_to(np.asarray(weight, dtype=float), (count,))
        drawn = [self.minute(float(w)) for w in weights]
        return Minute(*(np.stack(column) for column in zip(*drawn, strict=True)))


def first_minute(hit: NDArray[np.bool_], every: int = 1) -> Floats:
    """By run, the minute of the first True of [look, run], a look being `every` minutes; inf for none."""
    return np.where(hit.any(axis=0), (hit.argmax(axis=0) + 1.0) * every, np.inf)
