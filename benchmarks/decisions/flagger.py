"""Flagger's rule, re-implemented: every minute a check of the canary's success rate against 99 %.

A failed check (below the threshold, or no data) holds the weight and counts for good: at `threshold` failed
checks in total it rolls back. A passed check adds `step` to the weight; past the largest it promotes. Numbers
are its documentation's example. Source: scheduler and usage documentation as read for
research/rollout-statistics.md, section 1.
"""

from __future__ import annotations

import numpy as np

from benchmarks.decisions.traffic import Floats, Traffic

SUCCESS, THRESHOLD, STEP, MOST = 0.99, 10, 0.05, 0.50


def decided(traffic: Traffic, minutes: int) -> tuple[Floats, Floats]:
    """(minute of the rollback, minute of the promotion) by run; inf for never."""
    weight, failed = np.full(traffic.runs, STEP), np.zeros(traffic.runs, int)
    back, promoted = np.full(traffic.runs, np.inf), np.full(traffic.runs, np.inf)
    for minute in range(1, minutes + 1):
        seen = traffic.minute(np.minimum(weight, MOST))
        open_ = np.isinf(back) & np.isinf(promoted)
        passed = (seen.n_c > 0) & (seen.k_c <= (1.0 - SUCCESS) * seen.n_c)
        failed += open_ & ~passed
        back[open_ & (failed >= THRESHOLD)] = minute
        weight = np.where(open_ & passed, weight + STEP, weight)
        promoted[open_ & passed & (weight > MOST + 1e-9)] = minute
        if not (np.isinf(back) & np.isinf(promoted)).any():
            break
    return back, promoted
