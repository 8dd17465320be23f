"""From counts to the numbers a reader compares: shares, means, quantiles with their bucket's edges, ratios.

Pure functions on integer counts. Knows nothing about storage or how things look.
"""

from __future__ import annotations

from collections.abc import Iterable

from contracts.metrics import (
    LATENCY_BUCKETS_S,
    LATENCY_KINDS,
    PAIR,
    SCORE_VALUES,
    ArmCounts,
    MetricKind,
    MetricSpec,
)
from contracts.rollout import MetricStatus
from serve.rollout.evidence import windows_of
from serve.rollout.report.model import Comparison, Latency, Quantile, Sample

RATE_KINDS = (MetricKind.ERRORS, MetricKind.QUALITY, *LATENCY_KINDS)
"""Kinds that count bad ones of n."""
QUANTILES = (0.5, 0.9, 0.95, 0.99)

_QUESTIONS = {
    MetricKind.ERRORS: "requests that the arm failed",
    MetricKind.TTFT: "answers whose first token came late",
    MetricKind.E2E: "answers that took too long",
    MetricKind.QUALITY: "graded answers that were wrong",
    MetricKind.SCORE: "mean score of the answers",
    MetricKind.PAIRS: "both arms' answers to the same request: 1 the canary's is better, ½ a tie, 0 worse",
    MetricKind.QUERY: "asked of Prometheus",
}


def question(metric: MetricSpec) -> str:
    """What a metric counts, in words."""
    said = _QUESTIONS[metric.kind]
    if metric.kind is MetricKind.QUALITY and metric.pass_at < 1.0:
        said = f"{said} (score below {metric.pass_at:g})"
    return said


def comparisons(
    metric: MetricSpec, status: MetricStatus, counts: dict[str, ArmCounts]
) -> tuple[Comparison, ...]:
    """Both arms' samples on one metric: one, or one for every latency threshold."""
    if "counts" in status.state:  # a query of counters: its counts are in no window
        n_b, k_b, n_c, k_c = (int(v) for v in status.state["counts"])
        return (Comparison(stable=_rate(k_b, n_b), canary=_rate(k_c, n_c)),)
    stable, canary = (counts.get(arm, ArmCounts()) for arm in ("stable", "canary"))
    if metric.kind in RATE_KINDS:
        thresholds: tuple[float | None, ...] = metric.thresholds_s or (None,)
        found = zip(thresholds, windows_of(metric, stable, canary), strict=True)
        return tuple(
            Comparison(threshold_s=t, stable=_rate(w.k_b, w.n_b), canary=_rate(w.k_c, w.n_c))
            for t, w in found
        )
    if metric.kind is MetricKind.SCORE:
        return (Comparison(stable=mean(stable, metric.grader), canary=mean(canary, metric.grader)),)
    if metric.kind is MetricKind.PAIRS:
        pair = mean(counts.get(PAIR, ArmCounts()), metric.grader)
        other = pair.model_copy(update={"mean": None if pair.mean is None else 1.0 - pair.mean})
        return (Comparison(stable=other, canary=pair),)
    return ()


def mean(counts: ArmCounts, grader: str) -> Sample:
    """The mean score a grader gave."""
    n = counts.graded(grader)
    total = sum(v * k for v, k in zip(SCORE_VALUES, counts.scores.get(grader, ()), strict=False))
    return Sample(n=n, mean=total / n if n else None)


def latency(buckets: tuple[int, ...]) -> Latency:
    """Buckets with their quantiles."""
    n = sum(buckets)
    if n == 0:
        return Latency(n=0, buckets=(0,) * (len(LATENCY_BUCKETS_S) + 1))
    return Latency(n=n, buckets=buckets, quantiles=tuple(quantile(buckets, q) for q in QUANTILES))


def quantile(buckets: tuple[int, ...], q: float) -> Quantile:
    """The bucket in which the q-quantile falls; `buckets` must not be empty."""
    left, below = q * sum(buckets), 0.0
    for count, edge in zip(buckets, LATENCY_BUCKETS_S, strict=False):
        left -= count
        if left <= 1e-9:
            return Quantile(q=q, above_s=below, at_most_s=edge)
        below = edge
    return Quantile(q=q, above_s=below, at_most_s=None)


def shares(buckets: tuple[int, ...]) -> list[float]:
    """Share of requests at or below every edge of LATENCY_BUCKETS_S; nothing without data."""
    n, seen, found = sum(buckets), 0, []
    if n == 0:
        return []
    for count in buckets[: len(LATENCY_BUCKETS_S)]:
        seen += count
        found.append(seen / n)
    return found


def promised(stages: Iterable[tuple[float, int, int]]) -> float:
    """Canary requests that weights promise: the sum of weight x requests over (weight, stable, canary)."""
    return sum(weight * (stable + canary) for weight, stable, canary in stages)


def _rate(bad: int, n: int) -> Sample:
    return Sample(n=n, bad=bad, mean=bad / n if n else None)
