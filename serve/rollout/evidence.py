"""From counts per arm to evidence per metric, and from all metrics to one answer.

The answer is harm, non-inferior, or neither. Every metric is one or more two-sample Bernoulli tests: an
error, a failed grade, a latency above a threshold. State is lists of floats, so that JSON keeps it exactly.
Does not know phases, weights or storage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from contracts.gates import Verdict
from contracts.metrics import LATENCY_BUCKETS_S, ArmCounts, MetricKind, MetricSpec
from contracts.rollout import MetricStatus, RolloutSpec
from serve.rollout.stats import two_sample

_PRIOR_RATE = {MetricKind.ERRORS: 0.01, MetricKind.QUALITY: 0.05, MetricKind.TTFT: 0.1, MetricKind.E2E: 0.1}


@dataclass(frozen=True)
class Family:
    """All metrics of a rollout taken together."""

    harm: bool
    noninferior: bool
    log_mean_harm: float
    """Log of the mean of the harm e-values; harm when it reaches `log_harm_mean_at`."""
    log_harm_mean_at: float
    """Log of 1/alpha_harm."""
    log_harm_each_at: float
    """Log of J/alpha_harm: e-Bonferroni over J metrics."""
    log_promote_at: float
    """Log of 1/alpha_promote, which every metric must reach."""
    worst: MetricStatus
    """The metric with the most evidence of harm."""
    weakest: MetricStatus
    """The metric with the least evidence of non-inferiority."""


def fresh(spec: RolloutSpec) -> tuple[MetricStatus, ...]:
    """Metric statuses before anything was seen."""
    return tuple(_unseen(m) for m in spec.metrics)


def update(
    spec: RolloutSpec, metrics: tuple[MetricStatus, ...], stable: ArmCounts, canary: ArmCounts
) -> tuple[MetricStatus, ...]:
    """Fold one window of concurrent counts into every metric's tests, and judge each anew."""
    known = {m.name: m for m in metrics}
    updated = tuple(_update_one(m, known.get(m.key) or _unseen(m), stable, canary) for m in spec.metrics)
    return judge(spec, updated)


def judge(spec: RolloutSpec, metrics: tuple[MetricStatus, ...]) -> tuple[MetricStatus, ...]:
    """Give each metric its verdict; when only the mean shows harm, the worst metric carries the FAIL."""
    family = combine(spec, metrics)
    return tuple(m.model_copy(update={"verdict": _verdict(m, family)}) for m in metrics)


def combine(spec: RolloutSpec, metrics: tuple[MetricStatus, ...]) -> Family:
    """Harm: any E_j >= J/alpha_harm or mean E_j >= 1/alpha_harm. Non-inferior: all reach 1/alpha_promote.

    The mean of e-values is an e-value under the global null whatever their dependence (Vovk & Wang, Annals
    of Statistics 2021, prop. 3.1). Promotion is an intersection-union test, so each runs at the full alpha.
    """
    mean = two_sample.log_mean_exp([m.log_harm for m in metrics])
    mean_at = math.log(1.0 / spec.alpha_harm)
    each_at = math.log(len(metrics) / spec.alpha_harm)
    promote_at = math.log(1.0 / spec.alpha_promote)
    worst = max(metrics, key=lambda m: m.log_harm)
    weakest = min(metrics, key=lambda m: m.log_noninferior)
    return Family(
        harm=mean >= mean_at or worst.log_harm >= each_at,
        noninferior=weakest.log_noninferior >= promote_at,
        log_mean_harm=mean,
        log_harm_mean_at=mean_at,
        log_harm_each_at=each_at,
        log_promote_at=promote_at,
        worst=worst,
        weakest=weakest,
    )


def windows_of(metric: MetricSpec, stable: ArmCounts, canary: ArmCounts) -> list[two_sample.Window]:
    """The Bernoulli counts a metric is tested on: one window, or one per latency threshold."""
    if metric.kind is MetricKind.ERRORS:
        return [two_sample.Window(stable.n, stable.errors, canary.n, canary.errors)]
    if metric.kind is MetricKind.QUALITY:
        of, at = metric.grader, metric.pass_at
        return [
            two_sample.Window(
                stable.graded(of), stable.failed(of, at), canary.graded(of), canary.failed(of, at)
            )
        ]
    b, c = (getattr(arm, metric.kind.value) for arm in (stable, canary))
    return [two_sample.Window(sum(b), above(b, t), sum(c), above(c, t)) for t in metric.thresholds_s]


def above(buckets: tuple[int, ...], threshold_s: float) -> int:
    """Requests slower than a threshold that is a bucket's upper edge."""
    return sum(buckets[LATENCY_BUCKETS_S.index(threshold_s) + 1 :])


def _update_one(
    metric: MetricSpec, before: MetricStatus, stable: ArmCounts, canary: ArmCounts
) -> MetricStatus:
    windows = windows_of(metric, stable, canary)
    tests = [
        two_sample.look(_load(before, i, metric.kind), w, metric.harm_tolerance, metric.margin)
        for i, w in enumerate(windows)
    ]
    return MetricStatus(
        name=metric.key,
        kind=metric.kind,
        # Harm at any threshold is harm: the mean over thresholds is an e-value of "harmful at none".
        log_harm=two_sample.log_mean_exp([two_sample.log_harm(t) for t in tests]),
        # Non-inferiority must hold at every threshold, so the weakest one speaks; a mean would let a student
        # that is slow in the tail pass on its median.
        log_noninferior=min(two_sample.log_noninferior(t) for t in tests),
        verdict=before.verdict,
        state={key: values for i, t in enumerate(tests) for key, values in _dump(t, i).items()},
    )


def _unseen(metric: MetricSpec) -> MetricStatus:
    return MetricStatus(name=metric.key, kind=metric.kind)


def _verdict(metric: MetricStatus, family: Family) -> Verdict:
    if _canary_seen(metric) == 0:
        return Verdict.NO_DATA
    if metric.log_harm >= family.log_harm_each_at or (family.harm and metric.name == family.worst.name):
        return Verdict.FAIL
    if metric.log_noninferior >= family.log_promote_at:
        return Verdict.PASS
    return Verdict.INCONCLUSIVE


def _canary_seen(metric: MetricStatus) -> float:
    return max((values[2] for key, values in metric.state.items() if key.startswith("rates:")), default=0.0)


def _load(metric: MetricStatus, index: int, kind: MetricKind) -> two_sample.TwoSample:
    rates = metric.state.get(f"rates:{index}")
    if rates is None:
        return two_sample.start(_PRIOR_RATE[kind])
    base_n, base_k, canary_n, canary_k = rates
    harm, noninferior = metric.state[f"harm:{index}"], metric.state[f"noninferior:{index}"]
    return two_sample.TwoSample(base_n, base_k, canary_n, canary_k, tuple(harm), tuple(noninferior))


def _dump(test: two_sample.TwoSample, index: int) -> dict[str, list[float]]:
    return {
        f"rates:{index}": [test.base_n, test.base_k, test.canary_n, test.canary_k],
        f"harm:{index}": list(test.harm),
        f"noninferior:{index}": list(test.noninferior),
    }
