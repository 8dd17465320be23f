"""A decision while it is being made, and the moves that write the split: enter a step, promote, take back.

Lives for one call of decide(). Knows how a move is written down, not when one is due.
"""

from __future__ import annotations

from typing import Any

from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from contracts.traffic import Split
from serve.rollout import sentences
from serve.rollout.observation import Action, Asked, Decision, Observation


class Draft:
    """The decision while it is being made. Lives for one call of decide()."""

    def __init__(self, spec: RolloutSpec, status: RolloutStatus, seen: Observation) -> None:
        self.spec, self.status, self.seen = spec, status, seen
        self.before = status
        self.split: Split | None = None
        self.actions: tuple[Action, ...] = ()
        self.quarantine: tuple[str, str] | None = None
        self.done: list[int] = []
        self.notes: list[str] = []
        self.looked = False

    def set(self, **values: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=values)

    def go(self, phase: Phase, reason: str, **values: Any) -> None:
        """Enter a phase (or stay in it) with a reason."""
        if phase is not self.status.phase:
            values["phase_since"] = self.seen.now
        self.set(phase=phase, reason=reason, **values)

    def decision(self) -> Decision:
        """Freeze it. A tick that changed nothing keeps the status as it was, and is not stored."""
        ended = self.status.decision is not None
        if self.status != self.before or self.done or self.notes or self.looked:
            self.set(ticks=self.before.ticks + 1)
        return Decision(
            status=self.status,
            split=self.split,
            actions=self.actions,
            quarantine=self.quarantine,
            done_commands=tuple(c.id for c in self.seen.commands if ended or c.id in self.done),
            looked=self.looked,
            notes=tuple(self.notes),
        )


def enter_step(d: Draft, index: int, why: str) -> None:
    """Give the canary a step's weight; its samples and dwell count from now."""
    weight = d.spec.steps[index].weight
    window = f"step-{index + 1}-of-{len(d.spec.steps)}"
    d.split = _next_split(d, canary=d.spec.candidate, weight=weight, rollout_id=d.spec.id, window=window)
    d.go(
        Phase.RAMPING,
        f"{sentences.step_name(d.spec, index)} begins: {why}",
        step=index,
        weight=weight,
        max_weight=max(weight, d.status.max_weight),
        step_since=d.seen.now,
        step_counts={},
        next_look_at=d.seen.now + d.spec.look_s,
    )


def promote(d: Draft, reason: str) -> None:
    """Make the candidate the route's stable upstream; the former one drains."""
    d.split = _next_split(d, stable=d.spec.candidate, canary=None, weight=0.0, rollout_id=None, window=None)
    d.go(Phase.PROMOTING, reason, decision="promoted", weight=1.0, max_weight=1.0, **_drain_afresh(d))


def roll_back(d: Draft, reason: str, blame: bool) -> None:
    """Take the traffic away now. `blame` puts the student in quarantine; silence is not its fault."""
    if blame and d.spec.digest is not None:
        d.quarantine = (d.spec.digest, reason)
    end(d, "rolled_back", reason)


def end(d: Draft, decision: str, reason: str) -> None:
    """Enter the drain with the canary's weight at zero. A split that is not ours stays as it is."""
    if d.seen.split is not None and d.seen.split.rollout_id == d.spec.id:
        d.split = _next_split(d, canary=None, weight=0.0, rollout_id=None, window=None)
    d.go(Phase.ROLLING_BACK, reason, decision=decision, weight=0.0, **_drain_afresh(d))


def _drain_afresh(d: Draft) -> dict[str, Any]:
    return {"paused": False, "engine_errors": 0, "next_look_at": d.seen.now}


def _next_split(d: Draft, **values: Any) -> Split:
    """The stored split with changes, one version up. The salt is the rollout's own, kept through its ramp."""
    assert d.seen.split is not None
    fields = {**dict(d.seen.split), "version": d.seen.split.version + 1, "salt": d.spec.id, **values}
    return Split(**fields)


def said(command: Asked, what: str) -> str:
    """Who asked for it, and why."""
    return f"{what} by {command.by}" + (f": {command.reason}" if command.reason else "")
