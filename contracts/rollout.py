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
from contracts.hooks import HookPoint, HookSpec
from contracts.metrics import ArmCounts, MetricKind, MetricSpec, Role
from contracts.traffic import NAME, Upstream


class Phase(StrEnum):
    """Where a rollout is. Each value has a sentence in PHASE_SENTENCES."""

    PENDING = "pending"
    WARMING = "warming"
    RAMPING = "ramping"
    HELD = "held"
    PAUSED = "paused"
    WATCHING = "watching"
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
    Phase.WATCHING: "promoted; the former stable keeps a share as the control while late harm is watched for",
    Phase.PROMOTING: "it is decided; the student takes all traffic and the old stable drains",
    Phase.PROMOTED: "the student is the route's stable upstream",
    Phase.ROLLING_BACK: "the weight is zero again and the canary drains",
    Phase.ROLLED_BACK: "the student was thrown back; if it did harm its digest is quarantined",
    Phase.ABORTED: "it ended without a verdict (a person, or its engine failed); the route is as before",
}


class SrmRule(StrEnum):
    """What a sample-ratio mismatch does to a rollout: its evidence cannot be trusted then."""

    HOLD = "hold"
    ROLLBACK = "rollback"
    IGNORE = "ignore"


class Step(Record):
    """One weight of the ramp and what it takes to leave it."""

    weight: float = Field(gt=0, le=1)
    min_samples: int = Field(default=0, ge=0)
    """Canary requests needed at this step."""
    min_dwell_s: float = Field(default=0, ge=0)
    evidence: float | None = Field(default=None, ge=0)
    """Non-inferiority e-value every metric must reach to leave the step; default: a ladder up to 1/alpha."""
    approval: bool = False
    """A person must approve before this step is left; harm rolls back while it waits."""


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
    mirror: float = Field(default=0.0, ge=0, le=1)
    """Share of the stable arm's conversations that the canary is asked too, while it has a step."""
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
    test: str | None = Field(default=None, pattern=NAME)
    """Shared by the students of one A/B/n test: one rollout each, all against one stable arm."""
    slot: int = Field(default=0, ge=0)
    """Of a test: 0 is the split's canary, the n-th of the further students has slot n."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Of a test: where its share of the units begins."""
    windows: tuple[str, ...] = ()
    """When a step may begin and a promotion happen: 'Mon-Fri 09:00-17:00 Europe/Berlin'; empty: always."""
    cooldown_s: float = Field(default=600.0, ge=0)
    """After a rollback the route takes no new rollout for this long."""
    srm: SrmRule = SrmRule.HOLD
    alpha_srm: float = Field(default=0.001, gt=0, lt=1)
    """A step's sample-ratio mismatch is shown at an e-value of 1/alpha_srm."""
    srm_unit_requests: float = Field(default=10.0, ge=1)
    """Requests that count as one in the sample-ratio check, because conversations are assigned whole."""
    watch_s: float = Field(default=0.0, ge=0)
    """Seconds in which late harm restores the former stable after the promotion; 0: no watch."""
    holdback: float = Field(default=0.05, gt=0, le=0.5)
    """Share of the traffic that the former stable keeps during the watch."""
    watch_arl: float = Field(default=28_800.0, gt=1)
    """Looks until the watch's detector gives a false alarm, on average at least."""
    hooks: tuple[HookSpec, ...] = ()
    created_at: float
    created_by: str = "cli"

    @property
    def place(self) -> str:
        """What one active rollout at most may have: its route or, of an A/B/n test, its slot there."""
        return self.route if self.slot == 0 else f"{self.route[:120]}#{self.slot}"

    @model_validator(mode="after")
    def _check_test(self) -> RolloutSpec:
        if self.test is None:
            if self.slot or self.start:
                raise ValueError("slot, start: only a rollout of a 'test' has them")
        elif not self.hold_final or len(self.steps) != 1 or self.watch_s > 0 or self.mirror > 0:
            raise ValueError("test: needs hold_final, exactly one step, no watch_s and no mirror")
        elif self.start + self.steps[0].weight > 1.0 + 1e-9:
            raise ValueError(f"start: {self.start:g} and the weight {self.steps[0].weight:g} exceed 1")
        return self

    @model_validator(mode="after")
    def _check(self) -> RolloutSpec:
        if not self.steps:
            raise ValueError("steps must not be empty")
        weights = [s.weight for s in self.steps]
        if any(b <= a for a, b in pairwise(weights)):
            raise ValueError(f"steps must have strictly rising weights, got {weights}")
        if not self.metrics:
            raise ValueError("metrics must not be empty: a rollout without evidence can never promote")
        if all(m.role is Role.INFO for m in self.metrics):
            raise ValueError(
                "metrics: one at least must be a guardrail or an objective; info decides nothing"
            )
        keys = [m.key for m in self.metrics]
        if len(set(keys)) != len(keys):
            raise ValueError(f"metrics need different names, got {keys}: give the second one a 'name'")
        return self


class LedgerEntry(Record):
    """Counts one writer saw since its previous entry: append-only, exactly once by (replica, seq).

    Made by router replicas and by whoever grades answers later, consumed by serve.rollout. Only assignments
    with reason RANDOM are counted here. `arm` is 'pair' where `counts.scores` compares both arms' answers to
    the same request.
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

    name: str
    """The metric's key in the spec."""
    kind: MetricKind
    log_harm: float = 0.0
    log_noninferior: float = 0.0
    verdict: Verdict = Verdict.NO_DATA
    state: dict[str, list[float]] = Field(default_factory=dict)
    """The test's own state (mixture components, predictable estimates); opaque outside serve.rollout."""


class Confirming(Record):
    """A move that waits for hooks to confirm it."""

    key: str
    """The move, e.g. 'before_step:2'."""
    point: HookPoint
    accepted: tuple[int, ...] = ()
    """Indices in the spec's hooks of those that said yes."""
    errors: int = Field(default=0, ge=0)
    """Errors of hooks in a row: a budget of their own."""
    retry_at: float = 0.0
    words: str = ""
    """What the last hook that did not say yes said."""


class WatchStatus(Record):
    """What the watch after a promotion has seen: the arms are swapped, the former stable is the control."""

    until: float
    split_version: int
    """The split whose counts are swapped; those of older ones are not the watch's."""
    metrics: tuple[MetricStatus, ...] = ()
    detectors: dict[str, list[float]] = Field(default_factory=dict)
    """Guardrail → its detector's state; opaque outside serve.rollout."""
    log_alarm: float = 0.0
    """The strongest detector now."""
    worst: str = ""
    """Whose that is."""
    counts: dict[str, ArmCounts] = Field(default_factory=dict)
    """'stable': the former stable, 'canary': the student."""


class SrmBlock(Record):
    """Since when a step's sample ratio is judged against one share: in an A/B/n test it changes when another
    student comes or goes.
    """

    share: float
    canary: int = 0
    stable: int = 0
    """Requests of the step before this share."""
    log_e: float = 0.0
    """Evidence of a mismatch before this share."""


class RolloutStatus(Record):
    """Where a rollout is and what it has seen; persisted at every tick."""

    id: str
    phase: Phase = Phase.PENDING
    step: int = 0
    weight: float = 0.0
    reason: str = ""
    """One sentence: why it is in this phase."""
    decision: str | None = None
    """'promoted', 'rolled_back' or 'aborted' once decided; late harm turns the first into the second."""
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
    retry_at: float = 0.0
    """When what failed is tried again."""
    log_srm: float = 0.0
    """Highest e-value (log) of a sample-ratio mismatch in this step."""
    srm: Verdict = Verdict.NO_DATA
    """FAIL once the mismatch is shown, for the rest of the step."""
    srm_block: SrmBlock | None = None
    """The share that the sample ratio is judged against now; None before the step's first look."""
    approved: tuple[str, ...] = ()
    """What a person approved, e.g. 'step:2', 'srm:2', 'objective:2'."""
    confirm: Confirming | None = None
    confirmed: tuple[str, ...] = ()
    """Moves that all their hooks confirmed."""
    watch: WatchStatus | None = None
    champion: str = ""
    """What the registry was told: '', 'promoted' or 'restored'."""
