"""Endpoints of rollouts: which there are, what one of them has seen and decided, and what to ask of it.

Asking is writing a command that the controller obeys at its next tick. Knows nothing about who may call this
(auth.py), and nothing about statistics: e-values and thresholds are read as the controller stored them.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field, field_validator
from sqlalchemy import Engine

from contracts.commands import VERBS, allowed, check_verb
from contracts.config import Record
from contracts.gates import Verdict
from contracts.metrics import GRADED_KINDS, ArmCounts, MetricKind, MetricSpec, bucket_quantile
from contracts.rollout import PHASE_SENTENCES, MetricStatus, Phase, RolloutSpec
from contracts.traffic import NAME, Upstream
from serve.state.look import AuditLine, RolloutPages
from serve.state.rollouts import Command, RolloutState, StoredRollout

_log = logging.getLogger("stillhouse.admin")
RECENT = 30
"""Entries of the audit trail that come with a rollout."""
LOOKS = 120
"""Looks whose evidence comes with a rollout, for a curve."""
MAX_REASON = 500
NOBODY = "nobody"
"""Who asked, where the API was started with --insecure."""

RolloutId = Annotated[str, Path(pattern=NAME, description="Id of the rollout.")]
RouteFilter = Annotated[str | None, Query(pattern=NAME, description="Only this route.")]
Active = Annotated[bool | None, Query(description="true: running ones only; false: ended ones only.")]
After = Annotated[str | None, Query(pattern=NAME, description="Id of the last rollout of the page before.")]
Before = Annotated[int | None, Query(ge=1, le=2**62, description="Id of the last entry of the page before.")]
Limit = Annotated[int, Query(ge=1, le=200, description="Most entries of the page.")]
Kind = Annotated[Literal["look", "transition"] | None, Query(description="Only these entries.")]
Observed = Annotated[bool, Query(description="With what was observed at each tick, as replay needs it.")]


class VerbView(Record):
    """A command that fits the rollout as it is now."""

    verb: str
    effect: str
    danger: bool


class ArmView(Record):
    """What one arm did since the rollout began. Latencies are upper edges of buckets, in seconds."""

    n: int
    errors: int
    graded: dict[str, tuple[int, int]]
    """Grader → answers it scored, those of them below a full score."""
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    e2e_p50_s: float | None
    e2e_p95_s: float | None


class MetricView(Record):
    """Evidence on one metric: natural logs of e-values."""

    name: str
    spec: MetricSpec
    log_harm: float | None
    log_noninferior: float | None
    verdict: Verdict


class LookView(Record):
    """Evidence as it was at one look."""

    at: float
    metrics: dict[str, tuple[float | None, float | None]]
    """Metric → logs of its harm and its no-worse e-value."""


class RolloutLine(Record):
    """A rollout in a list."""

    id: str
    route: str
    model_ref: str
    created_at: float
    created_by: str
    phase: Phase
    sentence: str
    """What the phase means."""
    reason: str
    """Why it is in it."""
    decision: str | None
    step: int
    steps: tuple[float, ...]
    """Weights of the ramp."""
    weight: float
    max_weight: float
    paused: bool
    phase_since: float
    next_look_at: float
    canary_requests: int
    status_version: int
    """Rises by one with every tick that changed something."""


class RolloutView(RolloutLine):
    """A rollout with all that is known about it."""

    spec: RolloutSpec
    stable: Upstream | None
    step_since: float
    step_canary_requests: int
    arms: dict[str, ArmView]
    metrics: list[MetricView]
    thresholds: dict[str, Any] | None
    """Logs of the e-values that decide (`step_evidence`: no log), as of the last look; null before it."""
    log_mean_harm: float | None
    looks: list[LookView]
    """Evidence over time, the oldest first."""
    verbs: list[VerbView]
    """What can be asked of it now."""
    pending: list[Command]
    """What was asked and is not done yet."""
    audit: list[AuditLine]
    """The last entries of the audit trail, the newest first."""


class RolloutList(Record):
    """A page of rollouts, the newest first."""

    object: str = "list"
    data: list[RolloutLine]
    has_more: bool


class AuditList(Record):
    """A page of an audit trail, the newest first."""

    object: str = "list"
    data: list[AuditLine]
    has_more: bool


class CommandBody(Record):
    """What is asked of a rollout, and why."""

    verb: str = Field(json_schema_extra={"enum": list(VERBS)})
    reason: str = Field(default="", max_length=MAX_REASON, description="Goes into the audit trail.")

    @field_validator("reason")
    @classmethod
    def _one_line(cls, value: str) -> str:
        value = " ".join(value.split())
        if not value.isprintable():
            raise ValueError("must be printable text")
        return value


class Asked(Record):
    """A command that was accepted; the controller obeys it at its next tick."""

    rollout_id: str
    verb: str
    by: str
    reason: str


class Rollouts:
    """What the endpoints do, over one state store."""

    def __init__(self, engine: Engine) -> None:
        self._state, self._pages = RolloutState(engine), RolloutPages(engine)

    def page(self, route: str | None, active: bool | None, after: str | None, limit: int) -> RolloutList:
        """One page. Raises: NotFoundError for an unknown `after`."""
        found = self._pages.rollouts(route, active, after, limit + 1)
        return RolloutList(data=[line(r) for r in found[:limit]], has_more=len(found) > limit)

    def show(self, rollout_id: str) -> RolloutView:
        """All about one. Raises: NotFoundError."""
        stored = self._state.get(rollout_id)
        looks = self._pages.audit(rollout_id, "look", limit=LOOKS)
        last = looks[0].body if looks else {}
        verbs = [VerbView(verb=v, **VERBS[v].model_dump(exclude={"phases"})) for v in allowed(stored.status)]
        status = stored.status
        return RolloutView(
            **dict(line(stored)),
            spec=stored.spec,
            stable=status.stable,
            step_since=status.step_since,
            step_canary_requests=status.step_counts.get("canary", ArmCounts()).n,
            arms={arm: _arm(counts, stored.spec) for arm, counts in status.total_counts.items()},
            metrics=_metrics(stored),
            thresholds=last.get("thresholds"),
            log_mean_harm=last.get("log_mean_harm"),
            looks=[_look(entry) for entry in reversed(looks)],
            verbs=verbs,
            pending=self._state.pending_commands(rollout_id),
            audit=[_brief(entry) for entry in self._pages.audit(rollout_id, limit=RECENT)],
        )

    def audit(
        self, rollout_id: str, kind: str | None, before: int | None, limit: int, observed: bool
    ) -> AuditList:
        """One page of a trail. Raises: NotFoundError."""
        self._state.get(rollout_id)
        found = self._pages.audit(rollout_id, kind, before, limit + 1)
        data = found[:limit] if observed else [_brief(entry) for entry in found[:limit]]
        return AuditList(data=data, has_more=len(found) > limit)

    def ask(self, rollout_id: str, body: CommandBody, by: str) -> Asked:
        """Hand a command to the controller. Raises: NotFoundError, ConflictError, ConfigError."""
        check_verb(body.verb, self._state.get(rollout_id).status)
        self._state.add_command(rollout_id, body.verb, by, body.reason)
        return Asked(rollout_id=rollout_id, verb=body.verb, by=by, reason=body.reason)


def rollout_router(engine: Engine) -> APIRouter:
    """The endpoints over one state store."""
    rollouts = Rollouts(engine)
    api = APIRouter(prefix="/v1", tags=["rollouts"])

    @api.get("/rollouts")
    def list_rollouts(
        route: RouteFilter = None, active: Active = None, after: After = None, limit: Limit = 50
    ) -> RolloutList:
        """Rollouts, the newest first."""
        return rollouts.page(route, active, after, limit)

    @api.get("/rollouts/{rollout_id}")
    def show_rollout(rollout_id: RolloutId) -> RolloutView:
        """One rollout: spec, phase, evidence against its thresholds, and what can be asked of it."""
        return rollouts.show(rollout_id)

    @api.get("/rollouts/{rollout_id}/audit")
    def list_audit(
        rollout_id: RolloutId,
        kind: Kind = None,
        before: Before = None,
        limit: Limit = 50,
        observed: Observed = False,
    ) -> AuditList:
        """Its audit trail: every look and every move, with the reason."""
        return rollouts.audit(rollout_id, kind, before, limit, observed)

    @api.post("/rollouts/{rollout_id}/commands", status_code=202)
    def ask(rollout_id: RolloutId, body: CommandBody, request: Request) -> Asked:
        """Ask for a command; who asked, and why, goes into the audit trail."""
        asked = rollouts.ask(rollout_id, body, getattr(request.state, "admin", NOBODY))
        _log.info("%s asked to %s rollout %s", asked.by, asked.verb, rollout_id)
        return asked

    return api


def line(stored: StoredRollout) -> RolloutLine:
    """A rollout in short."""
    spec, status = stored.spec, stored.status
    shared = ("phase", "reason", "decision", "step", "weight", "max_weight", "paused")
    return RolloutLine(
        **{name: getattr(spec, name) for name in ("id", "route", "model_ref", "created_at", "created_by")},
        **{name: getattr(status, name) for name in (*shared, "phase_since", "next_look_at")},
        sentence=PHASE_SENTENCES[status.phase],
        steps=tuple(step.weight for step in spec.steps),
        canary_requests=status.total_counts.get("canary", ArmCounts()).n,
        status_version=stored.status_version,
    )


def _metrics(stored: StoredRollout) -> list[MetricView]:
    found = {m.name: m for m in stored.status.metrics}
    unseen = [MetricStatus(name=m.key, kind=m.kind) for m in stored.spec.metrics if m.key not in found]
    known = found | {m.name: m for m in unseen}
    fields = ("name", "log_harm", "log_noninferior", "verdict")
    return [
        MetricView(spec=spec, **{f: getattr(known[spec.key], f) for f in fields})
        for spec in stored.spec.metrics
    ]


def _arm(counts: ArmCounts, spec: RolloutSpec) -> ArmView:
    pass_at = {m.grader: m.pass_at for m in spec.metrics if m.kind is MetricKind.QUALITY}
    graders = dict.fromkeys((*(m.grader for m in spec.metrics if m.kind in GRADED_KINDS), *counts.scores))
    return ArmView(
        n=counts.n,
        errors=counts.errors,
        graded={g: (counts.graded(g), counts.failed(g, pass_at.get(g, 1.0))) for g in graders},
        ttft_p50_s=bucket_quantile(counts.ttft, 0.5),
        ttft_p95_s=bucket_quantile(counts.ttft, 0.95),
        e2e_p50_s=bucket_quantile(counts.e2e, 0.5),
        e2e_p95_s=bucket_quantile(counts.e2e, 0.95),
    )


def _look(entry: AuditLine) -> LookView:
    rows = entry.body.get("metrics", [])
    logs = {m["metric"]: (m.get("log_harm"), m.get("log_noninferior")) for m in rows}
    return LookView(at=entry.at, metrics=logs)


def _brief(entry: AuditLine) -> AuditLine:
    left_out = ("observation", "status_digest")
    return entry.model_copy(update={"body": {k: v for k, v in entry.body.items() if k not in left_out}})
