"""Traffic nouns: routes, upstreams, splits, assignments and the request-log row.

Made by serve.router (assignments, rows), serve.rollout (splits) and the serve configuration (upstreams);
read by distill_jobs.collect (rows). Knows nothing about HTTP, storage or statistics.
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import sha256
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from contracts.cascade import CascadeFields, CascadeNote
from contracts.config import Record

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_MAX_UNIT = 512
_ROUNDING = 1e-9
"""Sums of shares are floats."""


def bounded_unit(unit: str) -> str:
    """The unit itself, or its digest when it is longer than anybody's id should be."""
    return unit if len(unit) <= _MAX_UNIT else sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()


def hash_unit(unit: str) -> str:
    """What is stored of a unit or a user id: enough to find it again, not enough to recover it."""
    return sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Arm(StrEnum):
    """An upstream's part in a route."""

    STABLE = "stable"
    CANARY = "canary"
    SHADOW = "shadow"
    FALLBACK = "fallback"
    """One of the route's further upstreams; it only ever serves, nothing is assigned to it."""


class Upstream(Record):
    """What answers: a Ray Serve application of ours, any OpenAI-compatible URL, or a cascade of two such
    upstreams. Exactly one of the three."""

    name: str = Field(pattern=NAME)
    model: str
    """Model name the upstream expects in the request body; of a cascade its own name."""
    app: str | None = None
    """Ray Serve application whose replicas register their endpoints in the state store."""
    url: str | None = None
    """Base URL that ends before /v1, e.g. http://127.0.0.1:8100."""
    api_key_env: str | None = None
    """Environment variable that holds the upstream's key; the key itself is never stored."""
    digest: str | None = None
    """Digest of the artifact it serves, when it is a student of ours."""
    cascade: Cascade | None = None
    """Who is asked first and who when that is unsure."""

    @property
    def parts(self) -> tuple[Upstream, ...]:
        """The upstreams that are really asked: itself, or both of a cascade, the first one first."""
        return (self,) if self.cascade is None else (self.cascade.first, self.cascade.then)

    @model_validator(mode="after")
    def _one_target(self) -> Upstream:
        if [self.app, self.url, self.cascade].count(None) != 2:
            raise ValueError(f"upstream {self.name!r}: give exactly one of 'app', 'url' and 'cascade'")
        if self.cascade is not None and self.api_key_env is not None:
            raise ValueError(f"upstream {self.name!r}: a cascade's upstreams have the keys, not itself")
        return self

    @field_validator("url")
    @classmethod
    def _no_trailing_slash(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value.rstrip("/").removesuffix("/v1")


class Cascade(CascadeFields):
    """Two plain upstreams, and when the second one answers."""

    first: Upstream
    """Asked first, usually a student; its answer is held until it was judged."""
    then: Upstream
    """Asked when the first is unsure, cannot be judged or fails; usually the teacher."""

    @model_validator(mode="after")
    def _of_two(self) -> Cascade:
        for place, upstream in (("first", self.first), ("then", self.then)):
            if upstream.cascade is not None:
                raise ValueError(f"{place}: {upstream.name!r} is a cascade itself; give a plain upstream")
        if self.first.name == self.then.name:
            raise ValueError(f"then: is {self.first.name!r}, as 'first' is; give another upstream")
        return self


Upstream.model_rebuild()


class Slot(Record):
    """The place of one further student of an A/B/n test: units in [start, start + weight) are its."""

    upstream: Upstream
    start: float = Field(ge=0.0, lt=1.0)
    weight: float = Field(gt=0.0, le=1.0)
    rollout_id: str
    """The rollout whose evidence this slot collects."""


class Split(Record):
    """Versioned weights of one route: the only thing router and rollout share.

    `weight` is the canary's share in [0, 1]; assignment is monotone in it. `salt` is drawn once per
    rollout and kept through its ramp, so that raising the weight never moves anybody back.
    """

    route: str = Field(pattern=NAME)
    version: int = Field(ge=1)
    salt: str
    stable: Upstream
    canary: Upstream | None = None
    weight: float = Field(default=0.0, ge=0.0, le=1.0)
    mirror: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the stable arm's conversations whose requests the canary is asked too, as a shadow, so that
    both answers can be compared. `weight` may be 0 meanwhile."""
    rollout_id: str | None = None
    """The rollout whose evidence this split collects; None outside a rollout."""
    window: str | None = None
    """Label of the current step, copied to request logs so that analysis needs no guess."""
    others: tuple[Slot, ...] = ()
    """Further students of an A/B/n test; the canary's own units are [0, weight)."""

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        """Everything this split sends requests to: stable, canary, the others."""
        canary = () if self.canary is None else (self.canary,)
        return (self.stable, *canary, *(slot.upstream for slot in self.others))

    @property
    def rollouts(self) -> tuple[str, ...]:
        """The rollouts whose evidence this split collects, the canary's first."""
        first = () if self.rollout_id is None else (self.rollout_id,)
        return (*first, *(slot.rollout_id for slot in self.others))

    def collects(self, rollout_id: str) -> bool:
        """True while this rollout's student has the canary's place or a slot."""
        return rollout_id in self.rollouts

    def share_of(self, rollout_id: str) -> float:
        """The share of this rollout's student among the units that are its own or the stable arm's."""
        weights = {slot.rollout_id: slot.weight for slot in self.others} | {self.rollout_id: self.weight}
        mine = weights.pop(rollout_id, 0.0)
        return mine / (1.0 - sum(weights.values())) if mine else 0.0

    def rollout_of(self, assignment: Assignment) -> str | None:
        """The rollout a request belongs to; one of the stable arm belongs to all, and the first is named."""
        if assignment.slot:
            return self.others[assignment.slot - 1].rollout_id
        if assignment.arm is Arm.STABLE:
            return next(iter(self.rollouts), None)
        return self.rollout_id

    @model_validator(mode="after")
    def _slots_apart(self) -> Split:
        end, before = self.weight, "the canary"
        for slot in sorted(self.others, key=lambda s: s.start):
            if slot.start < end - _ROUNDING:
                raise ValueError(f"others: {slot.upstream.name!r} begins at {slot.start:g}, inside {before}")
            end, before = slot.start + slot.weight, repr(slot.upstream.name)
        if end > 1.0 + _ROUNDING:
            raise ValueError(f"others: {before} ends at {end:g}; shares end at 1")
        if len(set(self.rollouts)) != len(self.rollouts):
            raise ValueError(f"others: each student needs a rollout of its own, got {self.rollouts}")
        return self

    @model_validator(mode="after")
    def _weight_needs_canary(self) -> Split:
        if (self.weight > 0 or self.mirror > 0) and self.canary is None:
            raise ValueError(f"{'weight' if self.weight > 0 else 'mirror'} > 0 needs a canary")
        return self


class UnitKind(StrEnum):
    """Where the assignment unit came from, best first."""

    HEADER = "header"
    USER = "user"
    METADATA = "metadata"
    MESSAGES = "messages"
    REQUEST = "request"


class Reason(StrEnum):
    """Why an arm was assigned; only RANDOM counts as evidence."""

    RANDOM = "random"
    OVERRIDE = "override"
    ONLY_ARM = "only_arm"
    SHADOW = "shadow"
    """A copy of another request; its answer went to nobody."""


class Assignment(NamedTuple):
    """One decision of the router, logged at decision time. No model: one is made for every request."""

    arm: Arm
    reason: Reason
    unit_kind: UnitKind
    unit_hash: str
    """First 16 hex digits of sha256(unit): enough to count units, not enough to recover them."""
    fraction: float
    """Where the unit falls in [0, 1)."""
    split_version: int
    slot: int = 0
    """Of arm CANARY: 0 is the split's canary itself, n the n-th of its others."""


class Outcome(StrEnum):
    """How a request ended, seen by the assigned arm. CLIENT_CLOSED and REJECTED are nobody's fault."""

    OK = "ok"
    UPSTREAM_ERROR = "upstream_error"
    TIMEOUT = "timeout"
    BROKEN_STREAM = "broken_stream"
    CLIENT_ERROR = "client_error"
    CLIENT_CLOSED = "client_closed"
    REJECTED = "rejected"

    @property
    def counts(self) -> bool:
        """True when the outcome says something about the arm that was assigned."""
        return self is _OK or self in _FAILURES

    @property
    def failed(self) -> bool:
        """True when the assigned arm failed the request (even if a fallback saved the client)."""
        return self in _FAILURES


# Looked up once: a member of an enumeration costs more to name than to compare.
_OK = Outcome.OK
_FAILURES = (Outcome.UPSTREAM_ERROR, Outcome.TIMEOUT, Outcome.BROKEN_STREAM)


class LogMode(StrEnum):
    """How much of a request is written to the request log."""

    FULL = "full"
    REDACTED = "redacted"
    """Texts go through the configured detectors first."""
    METADATA = "metadata"
    """Everything but the texts of request and answer."""
    OFF = "off"
    """No row. Counters and evidence stay exact."""


class RequestRow(Record):
    """One line of the request log (JSON). Written by serve.request_log, read by distill_jobs.collect.

    Seconds are wall-clock durations; `ts` is Unix seconds at arrival.
    """

    request_id: str
    ts: float
    pair_id: str | None = None
    """Of a shadow's row: the id of the request it copies."""
    route: str
    endpoint: str
    arm: Arm
    """The arm that was assigned and is charged."""
    served_arm: Arm
    """The arm whose bytes the client got; differs from `arm` after a fallback."""
    reason: Reason
    unit_kind: UnitKind
    unit_hash: str
    split_version: int
    rollout_id: str | None = None
    upstream: str
    model: str
    digest: str | None = None
    stream: bool
    status: int
    outcome: Outcome
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float
    overhead_s: float
    """Time spent inside the router before the upstream was asked."""
    scores: dict[str, float] = Field(default_factory=dict)
    """Grader → its score of the answer in [0, 1]; a grader that abstained or failed is not in it."""
    log_mode: LogMode = LogMode.FULL
    """How much of the texts below is kept."""
    subjects: tuple[str, ...] = ()
    """`user:<hash>` and `conversation:<hash>` of the ids in the request body (hashes as in unit_hash), so
    that rows can be found and erased whatever is kept of the body."""
    request: dict[str, Any]
    """The request body as the client sent it."""
    response_chars: int | None = None
    """Length of the answer's text, given when the text itself is not kept."""
    response_text: str | None = None
    """The assistant's text, assembled from the stream when there was one."""
    response: dict[str, Any] | None = None
    """The whole response body of a non-streaming request."""
    error: str | None = None
    cascade: CascadeNote | None = None
    """Of an upstream that is a cascade: who answered, and why; `model` and `digest` are that one's."""
    key_id: str | None = None
    """The API key that asked; None where keys are off."""
