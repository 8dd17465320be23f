"""What decide() is told and what it answers: the records between the pure rules and the acting controller.

An observation is JSON-able, because the audit trail stores every one that changed something and replay feeds
it back. Knows nothing about how an observation was made or how an action is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import Field, model_validator

from contracts.config import Record
from contracts.metrics import PAIR, ArmCounts
from contracts.rollout import RolloutStatus
from contracts.traffic import Arm, Split


class Asked(Record):
    """A person's command, as far as the rules need it."""

    id: int
    verb: str
    by: str
    reason: str = ""


class SeenWindow(Record):
    """Counts of both arms that routers made under one split version: the same weights, the same time."""

    split_version: int
    stable: ArmCounts = Field(default_factory=ArmCounts)
    canary: ArmCounts = Field(default_factory=ArmCounts)
    pairs: ArmCounts = Field(default_factory=ArmCounts)
    """Requests that both arms answered: `scores` count the canary's side of each, by judge."""

    def plus(self, arm: str, counts: ArmCounts) -> SeenWindow:
        """The window with an entry's counts added to its arm; shadow counts are nobody's evidence here."""
        if arm == PAIR:
            return self.model_copy(update={"pairs": self.pairs.plus(counts)})
        if arm == Arm.CANARY:
            return self.model_copy(update={"canary": self.canary.plus(counts)})
        if arm == Arm.STABLE:
            return self.model_copy(update={"stable": self.stable.plus(counts)})
        return self


class QueryReading(Record):
    """What an external Prometheus answered to one metric's query at one look.

    Counters: how much of `total` and `bad` each arm gained since the look before, at one instant for all
    four; a value: the canary's. Anything else (unreachable, empty, NaN, a counter that cannot be) is a
    `problem`: no data, never a pass.
    """

    stable_total: int = Field(default=0, ge=0)
    stable_bad: int = Field(default=0, ge=0)
    canary_total: int = Field(default=0, ge=0)
    canary_bad: int = Field(default=0, ge=0)
    value: float | None = Field(default=None, allow_inf_nan=False)
    problem: str | None = None
    """Why there is no answer, in a sentence for people."""

    @model_validator(mode="after")
    def _possible(self) -> QueryReading:
        for arm, bad, total in (
            ("stable", self.stable_bad, self.stable_total),
            ("canary", self.canary_bad, self.canary_total),
        ):
            if bad > total:
                raise ValueError(f"query reading: {arm} has {bad} bad of {total}; say 'problem' instead")
        if self.problem is not None and (self.value is not None or self.stable_total or self.canary_total):
            raise ValueError("query reading: a 'problem' has no figures beside it")
        return self


class Observation(Record):
    """Everything a decision depends on besides spec and status."""

    now: float
    split: Split | None = None
    """The route's split as it is stored now."""
    windows: tuple[SeenWindow, ...] = ()
    """Ledger counts beyond the status's cursor, by split version, oldest first."""
    queries: dict[str, QueryReading] = Field(default_factory=dict)
    """Answers to the queries of this look, by metric key; consumed with the windows."""
    cursor: dict[str, int] = Field(default_factory=dict)
    """The cursor once these windows are consumed."""
    commands: tuple[Asked, ...] = ()
    ready: bool = False
    """The candidate's application is up (asked while pending)."""
    warmed: bool = False
    """Probe requests were answered (asked while warming)."""
    engine_error: str | None = None
    """What the deployer or a hook said when it failed in this tick."""
    acknowledged: bool = False
    """Every live router replica assigns with the stored split (asked while draining)."""
    in_flight: int = 0
    """Requests the losing upstream still works on (asked while draining)."""


class Action(StrEnum):
    """What the controller must do before it may store the status that came with it. All are idempotent."""

    RETIRE_CANDIDATE = "retire_candidate"
    RETIRE_STABLE = "retire_stable"
    NOTIFY_PROMOTED = "notify_promoted"
    NOTIFY_ROLLED_BACK = "notify_rolled_back"


@dataclass(frozen=True)
class Decision:
    """What decide() answers. `split` and `quarantine` are stored in one transaction with `status`."""

    status: RolloutStatus
    split: Split | None = None
    actions: tuple[Action, ...] = ()
    quarantine: tuple[str, str] | None = None
    """(digest, reason)."""
    done_commands: tuple[int, ...] = ()
    looked: bool = False
    """The windows were consumed."""
    notes: tuple[str, ...] = field(default=())
    """Sentences for the audit that are not the reason of a phase, e.g. a command that came too late."""
