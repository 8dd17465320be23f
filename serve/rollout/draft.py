"""A decision while it is being made, and the moves that write the split: enter a step, promote, take back.

Lives for one call of decide(). Knows how a move is written down, not when one is due.
"""

from __future__ import annotations

from typing import Any

from contracts.gates import Verdict
from contracts.rollout import MetricStatus, Phase, RolloutSpec, RolloutStatus, WatchStatus
from contracts.traffic import Slot, Split, Upstream
from serve.rollout import evidence, sentences
from serve.rollout.observation import Action, Asked, Decision, Observation
from serve.rollout.stats.combine import Family

_OVER = (Phase.PROMOTING, Phase.ROLLING_BACK, Phase.PROMOTED, Phase.ROLLED_BACK, Phase.ABORTED)


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
        self._family: tuple[tuple[MetricStatus, ...], Family] | None = None

    def set(self, **values: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=values)

    @property
    def family(self) -> Family:
        """The evidence as it stands in this decision, combined once."""
        if self._family is None or self._family[0] is not self.status.metrics:
            self._family = self.status.metrics, evidence.combine(self.spec, self.status.metrics)
        return self._family[1]

    def go(self, phase: Phase, reason: str, **values: Any) -> None:
        """Enter a phase (or stay in it) with a reason."""
        if phase is not self.status.phase:
            values["phase_since"] = self.seen.now
        self.set(phase=phase, reason=reason, **values)

    def decision(self) -> Decision:
        """Freeze it. A tick that changed nothing keeps the status as it was, and is not stored."""
        ended = self.status.phase in _OVER
        if self.status != self.before or self.done or self.notes or self.looked:
            self.set(ticks=self.before.ticks + 1)
        return Decision(
            status=self.status,
            split=self.split,
            actions=self.actions,
            quarantine=self.quarantine,
            done_commands=tuple(c.id for c in self.seen.commands if ended or c.id in self.done),
            looked=self.looked,
            family=self.family if self.looked else None,
            notes=tuple(self.notes),
        )


def enter_step(d: Draft, index: int, why: str) -> None:
    """Give the canary a step's weight; its samples, dwell and sample ratio count from now."""
    weight = d.spec.steps[index].weight
    window = f"step-{index + 1}-of-{len(d.spec.steps)}"
    _split(d, canary=d.spec.candidate, weight=weight, rollout_id=d.spec.id, window=window, salt=_salt(d))
    d.go(
        Phase.RAMPING,
        f"{sentences.step_name(d.spec, index)} begins: {why}",
        step=index,
        weight=weight,
        max_weight=max(weight, d.status.max_weight),
        step_since=d.seen.now,
        step_counts={},
        log_srm=0.0,
        srm=Verdict.NO_DATA,
        srm_block=None,
        next_look_at=d.seen.now + d.spec.look_s,
    )


def promote(d: Draft, reason: str) -> None:
    """Make the candidate the route's stable upstream; it is watched first where the policy says so."""
    if d.spec.watch_s > 0 and d.status.stable is not None:
        _watch(d, d.status.stable, reason)
    else:
        finish_promotion(d, reason)


def _watch(d: Draft, former: Upstream, reason: str) -> None:
    """Swap the arms: the former stable goes on as the control arm with the holdback's weight.

    A salt of its own draws the control anew; under the ramp's, those who had the student longest would be
    the ones to lose it.
    """
    _split(
        d, stable=d.spec.candidate, canary=former, weight=d.spec.holdback,
        rollout_id=d.spec.id, window="watch", salt=f"{d.spec.id}.watch",
    )  # fmt: skip
    assert d.split is not None
    watch = WatchStatus(
        until=d.seen.now + d.spec.watch_s, split_version=d.split.version, metrics=evidence.fresh(d.spec)
    )
    d.go(
        Phase.WATCHING,
        reason,
        decision="promoted",
        watch=watch,
        weight=1.0 - d.spec.holdback,
        max_weight=1.0,
        paused=False,
        engine_errors=0,
        retry_at=d.seen.now,
        next_look_at=d.seen.now + d.spec.look_s,
    )


def finish_promotion(d: Draft, reason: str) -> None:
    """All traffic to the candidate; the former stable drains."""
    _split(d, stable=d.spec.candidate, canary=None, weight=0.0, rollout_id=None, window=None, salt=_salt(d))
    d.go(Phase.PROMOTING, reason, decision="promoted", weight=1.0, max_weight=1.0, **_drain_afresh(d))


def roll_back(d: Draft, reason: str, blame: bool) -> None:
    """Take the traffic away now. `blame` puts the student in quarantine; silence is not its fault."""
    if blame and d.spec.digest is not None:
        d.quarantine = (d.spec.digest, reason)
    end(d, "rolled_back", reason)


def end(d: Draft, decision: str, reason: str) -> None:
    """Enter the drain with the candidate's weight at zero and the former stable back, if it had gone.

    A split that is not ours stays as it is.
    """
    if ours(d):
        assert d.seen.split is not None
        stable = d.status.stable if d.status.watch is not None else d.seen.split.stable
        _split(d, stable=stable, canary=None, weight=0.0, rollout_id=None, window=None, salt=_salt(d))
    d.go(Phase.ROLLING_BACK, reason, decision=decision, weight=0.0, **_drain_afresh(d))


def ours(d: Draft) -> bool:
    """True while the stored split has the place that this rollout wrote."""
    return d.seen.split is not None and d.seen.split.collects(d.spec.id)


def superseded(spec: RolloutSpec, status: RolloutStatus, split: Split | None) -> str | None:
    """Why an A/B/n test is over for a student: the arm it is compared with is not the stable one any more."""
    if spec.test is None or status.stable is None or split is None:
        return None
    now, then = split.stable, status.stable
    same = (now.name, now.digest) == (then.name, then.digest)
    return None if same else f"the test is over: {now.name} became the stable arm"


def _drain_afresh(d: Draft) -> dict[str, Any]:
    return {"paused": False, "engine_errors": 0, "retry_at": d.seen.now, "confirm": None}


def _split(d: Draft, **values: Any) -> None:
    """Write the stored split with changes, one version up."""
    before = d.seen.split
    assert before is not None
    if d.spec.slot > 0:
        values = _in_slot(d.spec, before, **values)
    else:
        values["mirror"] = 0.0 if values["canary"] is None else d.spec.mirror
        values["others"] = () if d.spec.test is None else before.others
    d.split = Split(**{**dict(before), "version": before.version + 1, **values})


def _in_slot(
    spec: RolloutSpec,
    split: Split,
    *,
    canary: Upstream | None,
    weight: float,
    salt: str,
    stable: Upstream | None = None,
    **_canarys: object,
) -> dict[str, Any]:
    """The same change for a student in a slot: the canary and the other slots stay as they are."""
    others = [slot for slot in split.others if slot.rollout_id != spec.id]
    if canary is not None:
        others.append(Slot(upstream=canary, start=spec.start, weight=weight, rollout_id=spec.id))
    others.sort(key=lambda slot: slot.start)
    changes: dict[str, Any] = {"others": tuple(others), "salt": salt, "stable": stable or split.stable}
    if split.rollout_id is None:  # a canary that somebody set by hand is no part of the test
        changes |= {"canary": None, "weight": 0.0, "mirror": 0.0}
    return changes


def _salt(d: Draft) -> str:
    """Drawn once per rollout, or once for all students of a test: their shares are cut from one draw."""
    return d.spec.test or d.spec.id


def said(command: Asked, what: str) -> str:
    """Who asked for it, and why."""
    return f"{what} by {command.by}" + (f": {command.reason}" if command.reason else "")
