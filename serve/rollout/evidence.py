"""From counts per arm to evidence per metric, and from all metrics to one answer.

The answer is harm, non-inferior, or neither. A rate (errors, failed grades, latencies above a threshold, an
external counter) is one or more two-sample Bernoulli tests; a grader's or the users' scores are bets on two
means; judged pairs (win, tie, loss, or two scores of one request) are bets on one. How many answers get
feedback at all is a rate too: a query of counters. State is lists of floats, so that JSON keeps it exactly.
Does not know phases, weights or storage.
"""

from __future__ import annotations

from collections.abc import Mapping

from contracts.gates import Verdict
from contracts.metrics import LATENCY_BUCKETS_S, SCORE_STEPS, ArmCounts, MetricKind, MetricSpec, Role
from contracts.rollout import MetricStatus, RolloutSpec
from serve.rollout.observation import QueryReading, SeenWindow
from serve.rollout.stats import betting, pairs, two_sample
from serve.rollout.stats.combine import Family, family, log_each_at, log_mean_exp

CERTAIN = 100.0
"""Log "e-value" of a declared bound that is broken, or kept: outside the statistics, at no alpha."""

_PRIOR_RATE = {
    MetricKind.ERRORS: 0.01,
    MetricKind.QUALITY: 0.05,
    MetricKind.TTFT: 0.1,
    MetricKind.E2E: 0.1,
    MetricKind.QUERY: 0.01,
}


def fresh(spec: RolloutSpec) -> tuple[MetricStatus, ...]:
    """Metric statuses before anything was seen."""
    return tuple(_unseen(m) for m in spec.metrics)


def update(
    spec: RolloutSpec, metrics: tuple[MetricStatus, ...], window: SeenWindow
) -> tuple[MetricStatus, ...]:
    """Fold one window of concurrent counts into every metric's tests, and judge each anew."""
    known = {m.name: m for m in metrics}
    return judge(spec, tuple(_update_one(m, known.get(m.key) or _unseen(m), window) for m in spec.metrics))


def read(
    spec: RolloutSpec, metrics: tuple[MetricStatus, ...], queries: Mapping[str, QueryReading]
) -> tuple[MetricStatus, ...]:
    """Fold one look's answers from Prometheus in, by metric key. What was not asked stays as it is."""
    if not queries:
        return metrics
    known = {m.name: m for m in metrics}
    updated = (
        _read_one(m, known.get(m.key) or _unseen(m), queries[m.key])
        if m.kind is MetricKind.QUERY and m.key in queries
        else known.get(m.key) or _unseen(m)
        for m in spec.metrics
    )
    return judge(spec, tuple(updated))


def judge(spec: RolloutSpec, metrics: tuple[MetricStatus, ...]) -> tuple[MetricStatus, ...]:
    """Give each metric its verdict; when only the mean shows harm, the worst metric carries the FAIL."""
    all_of = combine(spec, metrics)
    roles = _roles(spec)
    return tuple(
        m.model_copy(update={"verdict": _verdict(m, roles[m.name], all_of, spec.alpha_harm)}) for m in metrics
    )


def combine(spec: RolloutSpec, metrics: tuple[MetricStatus, ...]) -> Family:
    """The rollout's metrics as one family: only guardrails throw back, guardrails and objectives promote."""
    return family(metrics, _roles(spec), spec.alpha_harm, spec.alpha_promote)


def windows_of(metric: MetricSpec, stable: ArmCounts, canary: ArmCounts) -> list[two_sample.Window]:
    """The Bernoulli counts a rate is tested on: one window, or one per latency threshold; none for scores."""
    if metric.kind is MetricKind.ERRORS:
        return [two_sample.Window(stable.n, stable.errors, canary.n, canary.errors)]
    if metric.kind is MetricKind.QUALITY:
        of, at = metric.grader, metric.pass_at
        return [
            two_sample.Window(
                stable.graded(of), stable.failed(of, at), canary.graded(of), canary.failed(of, at)
            )
        ]
    b, c = (getattr(arm, metric.kind.value, ()) for arm in (stable, canary))
    return [two_sample.Window(sum(b), above(b, t), sum(c), above(c, t)) for t in metric.thresholds_s]


def above(buckets: tuple[int, ...], threshold_s: float) -> int:
    """Requests slower than a threshold that is a bucket's upper edge."""
    return sum(buckets[LATENCY_BUCKETS_S.index(threshold_s) + 1 :])


def mean_score(counts: tuple[int, ...]) -> float | None:
    """Mean of the scores counted on SCORE_VALUES; None without any."""
    n = sum(counts)
    return sum(i * k for i, k in enumerate(counts)) / (SCORE_STEPS * n) if n else None


def _update_one(metric: MetricSpec, before: MetricStatus, window: SeenWindow) -> MetricStatus:
    if metric.kind is MetricKind.QUERY:
        return before
    tolerance, margin = metric.harm_tolerance, _margin(metric)
    if metric.kind is MetricKind.SCORE:
        stable, canary = (arm.scores.get(metric.grader, ()) for arm in (window.stable, window.canary))
        scores = betting.look(betting.load(before.state), stable, canary, tolerance, margin)
        harm, good = betting.log_harm(scores), betting.log_noninferior(scores)
        return _with(before, harm, good, betting.dump(scores))
    if metric.kind is MetricKind.PAIRS:
        judged = pairs.look(
            pairs.load(before.state), window.pairs.scores.get(metric.grader, ()), tolerance, margin
        )
        return _with(before, pairs.log_harm(judged), pairs.log_noninferior(judged), pairs.dump(judged))
    return _compare(metric, before, windows_of(metric, window.stable, window.canary))


def _compare(metric: MetricSpec, before: MetricStatus, windows: list[two_sample.Window]) -> MetricStatus:
    """Two-sample tests on one window, or on one per latency threshold."""
    tests = [
        two_sample.look(_load(before, i, metric.kind), w, metric.harm_tolerance, _margin(metric))
        for i, w in enumerate(windows)
    ]
    return _with(
        before,
        # Harm at any threshold is harm: the mean over thresholds is an e-value of "harmful at none".
        log_mean_exp([two_sample.log_harm(t) for t in tests]),
        # Non-inferiority must hold at every threshold, so the weakest one speaks; a mean would let a student
        # that is slow in the tail pass on its median.
        min(two_sample.log_noninferior(t) for t in tests),
        {key: values for i, t in enumerate(tests) for key, values in _dump(t, i).items()},
    )


def _read_one(metric: MetricSpec, before: MetricStatus, reading: QueryReading) -> MetricStatus:
    """Counters are compared like any rate; a value is held against its bound, look by look."""
    assert metric.query is not None
    if metric.query.value is None:
        if reading.problem is not None:
            return before
        w = two_sample.Window(
            reading.stable_total, reading.stable_bad, reading.canary_total, reading.canary_bad
        )
        after = _compare(metric, before, [w])
        so_far = [float(a + b) for a, b in zip(before.state.get("counts", [0.0] * 4), w, strict=True)]
        return after.model_copy(update={"state": {**after.state, "counts": so_far}})
    row = before.state.get("row", [0.0])[0]
    if reading.value is None:  # not a pass; nor does it end a row of broken looks
        return _with(before, before.log_harm, 0.0, {"row": [row]})
    broken = not metric.query.keeps(reading.value)
    row = row + 1.0 if broken else 0.0
    harm = CERTAIN if row >= metric.query.failures else 0.0
    return _with(before, harm, 0.0 if broken else CERTAIN, {"row": [row], "value": [reading.value]})


def _with(
    before: MetricStatus, log_harm: float, log_noninferior: float, state: dict[str, list[float]]
) -> MetricStatus:
    return MetricStatus(
        name=before.name,
        kind=before.kind,
        log_harm=log_harm,
        log_noninferior=log_noninferior,
        verdict=before.verdict,
        state=state,
    )


def _unseen(metric: MetricSpec) -> MetricStatus:
    return MetricStatus(name=metric.key, kind=metric.kind)


def _roles(spec: RolloutSpec) -> dict[str, Role]:
    return {m.key: m.role for m in spec.metrics}


def _margin(metric: MetricSpec) -> float:
    """The boundary that a promotion must refute: worse by the margin, or (better) not better at all."""
    return 0.0 if metric.better else metric.margin


def _verdict(metric: MetricStatus, role: Role, all_of: Family, alpha_harm: float) -> Verdict:
    if not _seen(metric):
        return Verdict.NO_DATA
    each_at, carries = {
        Role.GUARDRAIL: (all_of.log_harm_each_at, all_of.worst if all_of.harm else None),
        Role.OBJECTIVE: (
            all_of.log_objective_each_at,
            all_of.worst_objective if all_of.objective_harm else None,
        ),
        Role.INFO: (log_each_at(alpha_harm, 1), None),
    }[role]
    if metric.log_harm >= each_at or (carries is not None and metric.name == carries.name):
        return Verdict.FAIL
    if metric.log_noninferior >= all_of.log_promote_at:
        return Verdict.PASS
    return Verdict.INCONCLUSIVE


def _seen(metric: MetricStatus) -> bool:
    """Whether anything of the canary's was counted."""
    state = metric.state
    rates = any(values[2] > 0 for key, values in state.items() if key.startswith("rates:"))
    moments = any(state[key][0] > 0 for key in ("canary", "seen") if key in state)
    return rates or moments or "value" in state


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
