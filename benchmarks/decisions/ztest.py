"""The repeated z-test: the pooled two-proportion z of all counts so far, looked at every minute at p < 0.05.

What a dashboard and a person do. Once it was significant it acts, so each look is another chance to be wrong;
and cumulative rates across a changing weight compare different hours of the day (Simpson).
"""

from __future__ import annotations

import numpy as np

from benchmarks.decisions.traffic import Floats, Minute, first_minute

CRITICAL = 1.6448536269514722
"""One-sided 5 %."""


def rolled_back(traffic: Minute) -> Floats:
    """The minute by run in which 'worse' was first significant; inf for none."""
    n_b, k_b, n_c, k_c = (np.cumsum(column, axis=0) for column in traffic)
    with np.errstate(divide="ignore", invalid="ignore"):
        pooled = (k_b + k_c) / (n_b + n_c)
        z = (k_c / n_c - k_b / n_b) / np.sqrt(pooled * (1.0 - pooled) * (1.0 / n_b + 1.0 / n_c))
    return first_minute(np.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0) > CRITICAL)


def promoted(traffic: Minute, margin: float) -> Floats:
    """The minute by run in which 'worse by the margin' was first refuted (unpooled z); inf for none.

    Not before the canary's first error: without one its estimated variance is zero and any z is significant.
    """
    n_b, k_b, n_c, k_c = (np.cumsum(column, axis=0) for column in traffic)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_b, p_c = k_b / n_b, k_c / n_c
        z = (p_c - p_b - margin) / np.sqrt(p_b * (1.0 - p_b) / n_b + p_c * (1.0 - p_c) / n_c)
    return first_minute((k_c > 0) & (np.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0) < -CRITICAL))
