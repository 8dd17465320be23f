"""Rollout nouns: the spec that never changes, the status that does, and the evidence between them.

Spec and status are different types; the controller never edits a spec. Counts are integers per arm, so
every decision can be replayed. Knows nothing about storage, HTTP or Ray.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise

from pydantic import Field, model_validator

from contracts.config import Record
from contracts.gates import Verdict
from contracts.traffic import NAME, Upstream

LATENCY_BUCKETS_S: tuple[float, ...] = (
    0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.030, 0.040, 0.060, 0.080, 0.100, 0.150, 0.200, 0.300,
    0.400, 0.600, 0.800, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0,
)  # fmt: skip
"""Upper edges in seconds of every latency histogram (metrics and ledger): fine enough for small models."""


class Phase(StrEnum):
    """Where a rollout is. Each value has a sentence in PHASE_SENTENCES."""

    PENDING = "pending"
    WARMING = "warming"
    RAMPING = "ramping"
    HELD = "held"
    PAUSED = "paused"
    PROMOTING = "promoting"
    PROMOTED = "promoted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"

    @property
    def terminal(self) -> bool:
        """True when nothing will happen any more."""
        return self in (Phase.PROMOTED, Phase.ROLLED_BACK, Phase.ABORTED)


PHASE_SENTENCES: dict[Phase, str] = {
    Phase.PENDING: "accepted; the student's Serve application is being created",
    Phase.WARMING: "the student is up and answers probe requests before it gets traffic",
    Phase.RAMPING: "the canary gets its step's share of traffic while evidence accumulates",
    Phase.HELD: "the step is over but its evidence is not there yet; the weight stays",
    Phase.PAUSED: "a person paused it; the weight stays, harm is still judged",
    Phase.PROMOTING: "all tests passed; the canary takes all traffic and the old stable drains",
    Phase.PROMOTED: "the student is the route's stable upstream",
    Phase.ROLLING_BACK: "the weight is zero again and the canary drains",
    Phase.ROLLED_BACK: "the student was thrown back; if it did harm its digest is quarantined",
    Phase.ABORTED: "it ended without a verdict (a person, or its engine failed); the route is as before",
}


class MetricKind(StrEnum):
    """What is counted per request."""

    ERRORS = "errors"
    TTFT = "ttft"
    E2E = "e2e"
    QUALITY = "quality"


class MetricSpec(Record):
    """One guardrail of a rollout: a harm test and a non-inferiority test on the same counts.

    All metrics are Bernoulli per request: an error, a latency above `threshold_s`, a failed grade.
    """

    kind: MetricKind
    margin: float = Field(gt=0, lt=1)
    """Non-inferiority margin Δ on the risk difference: promote only if p_canary < p_stable + Δ is shown."""
    tolerance: float | None = Field(default=None, ge=0, lt=1)
    """Harm tolerance: roll back if p_canary > p_stable + tolerance is shown. Default: margin / 4."""
    thresholds_s: tuple[float, ...] = ()
    """Edges from LATENCY_BUCKETS_S, ttft and e2e only: harm at any counts, all must be non-inferior."""

    @model_validator(mode="after")
    def _check(self) -> MetricSpec:
        if self.kind in (MetricKind.TTFT, MetricKind.E2E):
            wrong = [t for t in self.thresholds_s if t not in LATENCY_BUCKETS_S]
            if not self.thresholds_s or wrong:
                raise ValueError(
                    f"metric {self.kind}: thresholds_s must be bucket edges; {wrong or 'none given'}: "
                    f"choose from {LATENCY_BUCKETS_S}"
                )
        elif self.thresholds_s:
            raise ValueError(f"metric {self.kind}: thresholds_s is only for latency metrics")
        if self.tolerance is not None and self.tolerance >= self.margin:
            raise ValueError(f"metric {self.kind}: tolerance must be smaller than margin {self.margin}")
        return self

    @property
    def harm_tolerance(self) -> float:
        """The tolerance in force."""
        return self.margin / 4 if self.tolerance is None else self.tolerance


class Step(Record):
    """One weight of the ramp and what it takes to leave it."""

    weight: float = Field(gt=0, le=1)
    min_samples: int = Field(default=0, ge=0)
    """Canary requests needed at this step."""
    min_dwell_s: float = Field(default=0, ge=0)
    evidence: float | None = Field(default=None, ge=0)
    """Non-inferiority e-value every metric must reach to leave the step; default: a ladder up to 1/alpha."""


class RolloutSpec(Record):
    """What was asked for. Immutable after start."""

    id: str = Field(pattern=NAME)
    route: str = Field(pattern=NAME)
    model_ref: str
    """Registry reference 'name:version' of the candidate."""
    candidate: Upstream
    artifact_uri: str | None = None
    """Folder to deploy; None when the candidate is an upstream that already runs."""
    digest: str | None = None
    steps: tuple[Step, ...]
    metrics: tuple[MetricSpec, ...]
    alpha_harm: float = Field(default=0.05, gt=0, lt=1)
    alpha_promote: float = Field(default=0.05, gt=0, lt=1)
    look_s: float = Field(default=60.0, gt=0)
    """Length of a look window in seconds."""
    no_data_deadline_s: float = Field(default=3600.0, gt=0)
    """Roll back when a ramping canary got no counted request for this long."""
    kill_switch_errors: float = Field(default=0.5, gt=0, le=1)
    """Outside statistics: roll back at once when this share of at least 20 canary requests failed."""
    warm_timeout_s: float = Field(default=600.0, gt=0)
    drain_timeout_s: float = Field(default=300.0, gt=0)
    hold_final: bool = False
    """An A/B test: stay on the last step until a person decides."""
    created_at: float
    created_by: str = "cli"

    @model_validator(mode="after")
    def _check(self) -> RolloutSpec:
        if not self.steps:
            raise ValueError("steps must not be empty")
        weights = [s.weight for s in self.steps]
        if any(b <= a for a, b in pairwise(weights)):
            raise ValueError(f"steps must have strictly rising weights, got {weights}")
        if not self.metrics:
            raise ValueError("metrics must not be empty: a rollout without evidence can never promote")
        kinds = [m.kind for m in self.metrics]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"each metric kind may appear once, got {[str(k) for k in kinds]}")
        return self


class ArmCounts(Record):
    """Integer counts of one arm over some time: the sufficient statistics of every test.

    `ttft` and `e2e` are per-bucket counts over LATENCY_BUCKETS_S plus one overflow bucket
    (length 31, not cumulative); they hold counted, non-failed requests.
    """

    n: int = Field(default=0, ge=0)
    errors: int = Field(default=0, ge=0)
    graded: int = Field(default=0, ge=0)
    grade_failed: int = Field(default=0, ge=0)
    ttft: tuple[int, ...] = ()
    e2e: tuple[int, ...] = ()

    def plus(self, other: ArmCounts) -> ArmCounts:
        """Sum of two counts."""
        return ArmCounts(
            n=self.n + other.n,
            errors=self.errors + other.errors,
            graded=self.graded + other.graded,
            grade_failed=self.grade_failed + other.grade_failed,
            ttft=_add(self.ttft, other.ttft),
            e2e=_add(self.e2e, other.e2e),
        )


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if not a or not b:
        return a or b
    return tuple(x + y for x, y in zip(a, b, strict=True))


class LedgerEntry(Record):
    """Counts one router replica saw since its previous entry: append-only, exactly once by (replica, seq).

    Made by serve.router, consumed by serve.rollout. Only assignments with reason RANDOM are counted here.
    """

    replica: str
    seq: int = Field(ge=1)
    route: str
    rollout_id: str | None
    arm: str
    split_version: int
    at: float
    counts: ArmCounts


class MetricStatus(Record):
    """Evidence on one metric so far; logs of e-values because they grow without bound."""

    kind: MetricKind
    log_harm: float = 0.0
    log_noninferior: float = 0.0
    verdict: Verdict = Verdict.NO_DATA
    state: dict[str, list[float]] = Field(default_factory=dict)
    """The test's own state (mixture components, predictable estimates); opaque outside serve.rollout."""


class RolloutStatus(Record):
    """Where a rollout is and what it has seen; persisted at every tick."""

    id: str
    phase: Phase = Phase.PENDING
    step: int = 0
    weight: float = 0.0
    reason: str = ""
    """One sentence: why it is in this phase."""
    decision: str | None = None
    """'promoted', 'rolled_back' or 'aborted' once decided."""
    phase_since: float = 0.0
    step_since: float = 0.0
    last_canary_at: float | None = None
    """When a counted canary request was last seen."""
    step_counts: dict[str, ArmCounts] = Field(default_factory=dict)
    total_counts: dict[str, ArmCounts] = Field(default_factory=dict)
    """Arm → counts since the step, the rollout began."""
    metrics: tuple[MetricStatus, ...] = ()
    cursor: dict[str, int] = Field(default_factory=dict)
    """Router replica → last ledger sequence consumed."""
    next_look_at: float = 0.0
    ticks: int = 0
    paused: bool = False
    max_weight: float = 0.0
    """Highest weight the canary ever had."""
    stable: Upstream | None = None
    """The route's stable upstream when the ramp began: what a promotion drains and retires."""
    engine_errors: int = Field(default=0, ge=0)
    """Errors in a row of whoever runs the engine: a budget of their own, never held against the student."""
