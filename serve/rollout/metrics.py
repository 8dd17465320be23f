"""Prometheus metrics of the control plane.

Works with prometheus_client's multiprocess mode (PROMETHEUS_MULTIPROC_DIR) and without: gauges say
"mostrecent", because the controller that holds the lease is the one that wrote last. Decides nothing.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from contracts.gates import Verdict
from contracts.metrics import ArmCounts
from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from serve.rollout.observation import Decision

DECISIONS = ("step", "held", "paused", "resumed", "promoted", "restored", "rolled_back", "aborted")
_TICK_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class ControllerMetrics:
    """What the controller exports; one instance a process (or one a registry, in tests)."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(
                f"stillhouse_rollout_{name}", text, labels, registry=registry, multiprocess_mode="mostrecent"
            )

        self.phase = gauge(
            "phase", "1 for the phase the route's rollout is in, 0 for the others.", "route", "phase"
        )
        self.step = gauge("step", "Step of the ramp, from 1; 0 before the first.", "route")
        self.weight = gauge("weight", "Canary's share of the route's traffic.", "route")
        self.log_evalue = gauge(
            "log_evalue",
            "Natural log of the e-value of a metric's test (harm, noninferior).",
            "route",
            "metric",
            "test",
        )
        self.log_threshold = gauge(
            "log_threshold", "Natural log of the e-value at which a test decides.", "route", "test"
        )
        self.samples = gauge(
            "samples", "Requests counted as evidence since the rollout began.", "route", "arm"
        )
        self.phase_since = gauge(
            "phase_since_timestamp_seconds", "When the route's rollout came into its phase.", "route"
        )
        self.canary_seen = gauge(
            "canary_seen_timestamp_seconds",
            "When the canary's last counted request was seen; the beginning of its traffic before the first.",
            "route",
        )
        self.no_data_deadline = gauge(
            "no_data_deadline_seconds", "Time without counted canary requests that rolls back.", "route"
        )
        self.srm = gauge(
            "sample_ratio_mismatch",
            "1 once the step's traffic is shown not to be split as it was told.",
            "route",
        )
        self._seen: set[str] = set()
        self.leader = Gauge(
            "stillhouse_rollout_controller_leader",
            "1 when this controller holds the lease.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.decisions = Counter(
            "stillhouse_rollout_decisions_total",
            f"Decisions taken: {', '.join(DECISIONS)}.",
            ("route", "decision"),
            registry=registry,
        )
        self.tick_seconds = Histogram(
            "stillhouse_rollout_tick_seconds",
            "One controller tick over all rollouts.",
            buckets=_TICK_BUCKETS,
            registry=registry,
        )

    def observe(self, spec: RolloutSpec, before: RolloutStatus, decision: Decision) -> None:
        """Export a stored tick."""
        after, route = decision.status, spec.place
        new = before.ticks == 0 or route not in self._seen  # the rollout, or this process
        if new:
            self._seen.add(route)
            self._begin(spec)
        if new or after.phase is not before.phase:
            for phase in Phase:
                self.phase.labels(route, phase.value).set(1.0 if phase is after.phase else 0.0)
            self.phase_since.labels(route).set(after.phase_since)
        if after.last_canary_at is not None:
            self.canary_seen.labels(route).set(after.last_canary_at)
        self.srm.labels(route).set(after.srm is Verdict.FAIL)
        self.step.labels(route).set(after.step + 1 if after.max_weight > 0 else 0)
        self.weight.labels(route).set(after.weight if after.decision != "promoted" else 0.0)
        for metric in after.metrics:
            self.log_evalue.labels(route, metric.name, "harm").set(metric.log_harm)
            self.log_evalue.labels(route, metric.name, "noninferior").set(metric.log_noninferior)
        for arm in ("stable", "canary"):
            self.samples.labels(route, arm).set(after.total_counts.get(arm, ArmCounts()).n)
        event = decided(before, after)
        if event is not None:
            self.decisions.labels(route, event).inc()

    def _begin(self, spec: RolloutSpec) -> None:
        """What a rollout never changes; its decisions start at zero, so that the first one is an increase."""
        self.no_data_deadline.labels(spec.place).set(spec.no_data_deadline_s)
        for word in DECISIONS:
            self.decisions.labels(spec.place, word)

    def thresholds(self, route: str, harm: float, noninferior: float) -> None:
        """Export the bounds of a route's rollout."""
        self.log_threshold.labels(route, "harm").set(harm)
        self.log_threshold.labels(route, "noninferior").set(noninferior)


def decided(before: RolloutStatus, after: RolloutStatus) -> str | None:
    """The word for what a tick decided, or None when it only looked."""
    if after.decision != before.decision:
        return after.decision if before.decision is None else "restored"
    if (after.step, after.max_weight) != (before.step, before.max_weight):
        return "step"
    if after.phase is before.phase:
        return None
    words = {Phase.HELD: "held", Phase.PAUSED: "paused", Phase.RAMPING: "resumed"}
    return words.get(after.phase)
