"""Argo Rollouts' rule, re-implemented: an AnalysisRun on the canary's own success rate.

Every `interval` minutes the success rate over the last `window` minutes is held against a condition; more
failed measurements than `failureLimit` in total abort. A measurement without data is an error (a division by
zero is NaN in the query), and more than `consecutiveErrorLimit` = 4 of them in a row abort too. Thresholds
are absolute, each look stands alone. Source: its documentation (features/analysis) as read for
research/rollout-statistics.md, section 1.
"""

from __future__ import annotations

import numpy as np

from benchmarks.decisions.traffic import Floats, Minute, first_minute

CONSECUTIVE_ERROR_LIMIT = 4


def rolled_back(traffic: Minute, success: float, every: int, window: int, failure_limit: int) -> Floats:
    """The minute of the abort by run; inf for none."""
    at = np.arange(every - 1, len(traffic.n_c), every)
    n, bad = (_rolling(column, window)[at] for column in (traffic.n_c, traffic.k_c))
    empty = n == 0
    failed = ~empty & (bad > (1.0 - success) * n)
    aborted = (np.cumsum(failed, axis=0) > failure_limit) | (_row_of(empty) > CONSECUTIVE_ERROR_LIMIT)
    return first_minute(aborted, every)


def _rolling(counts: np.ndarray, window: int) -> np.ndarray:  # type: ignore[type-arg]
    total = np.cumsum(counts, axis=0)
    before = np.concatenate([np.zeros((window, total.shape[1]), total.dtype), total])[: len(total)]
    return total - before


def _row_of(flags: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """How many True in a row up to each look."""
    row, out = np.zeros(flags.shape[1], int), np.zeros(flags.shape, int)
    for i, flag in enumerate(flags):
        row = np.where(flag, row + 1, 0)
        out[i] = row
    return out
