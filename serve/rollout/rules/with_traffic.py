"""Rules of `ramping`, `held` and `paused`: harm is judged first and always, then people's commands, then
whether the step may be left.
"""

from __future__ import annotations

import math

from contracts.gates import Verdict
from contracts.hooks import HookPoint
from contracts.metrics import ArmCounts
from contracts.rollout import Phase, SrmRule
from contracts.traffic import Arm
from serve.rollout import schedule, sentences
from serve.rollout.draft import Draft, end, enter_step, ours, promote, roll_back, said, superseded
from serve.rollout.observation import Asked
from serve.rollout.rules.confirming import confirmed, hear, waits_for
from serve.rollout.rules.ladder import step_evidence
from serve.rollout.rules.looking import harm_or_silence, kill_switch, look

WITH_TRAFFIC = (Phase.RAMPING, Phase.HELD, Phase.PAUSED)


def with_traffic(d: Draft) -> None:
    """One tick while the canary gets traffic."""
    if (over := superseded(d.spec, d.status, d.seen.split)) is not None:
        end(d, "aborted", over)
        return
    if not ours(d):
        end(d, "aborted", f"the split of route {d.spec.route!r} was changed by somebody else")
        return
    kill = _kill_switch(d)
    asked = d.seen.answers or any(c.verb in ("promote", "approve") for c in d.seen.commands)
    if kill or asked or d.seen.now >= d.status.next_look_at:
        look(d)
    if kill:
        roll_back(d, kill, blame=True)
        return
    if d.looked and harm_or_silence(d):
        return
    _hear(d)
    for command in d.seen.commands:
        _command(d, command)
    if d.looked and d.status.phase in (Phase.RAMPING, Phase.HELD):
        _advance(d)


def _kill_switch(d: Draft) -> str | None:
    now = [window.canary for window in d.seen.windows]
    step = d.status.step_counts.get(Arm.CANARY.value, ArmCounts())
    since = sum(c.n for c in now), sum(c.errors for c in now)
    return kill_switch(d.spec, since, (step.n, step.errors))


def _hear(d: Draft) -> None:
    if (failed := hear(d)) is not None:
        why = f"the next move could not be confirmed: {failed}; 'stillhouse rollout resume' asks again"
        d.go(Phase.PAUSED, why, paused=True)


# commands ---------------------------------------------------------------------------------------


def _command(d: Draft, command: Asked) -> None:
    d.done.append(command.id)
    phase = d.status.phase
    if phase not in WITH_TRAFFIC:
        d.notes.append(f"{command.verb} by {command.by} came too late: it is {phase.value}")
    elif command.verb == "abort":
        end(d, "aborted", said(command, "aborted"))
    elif command.verb == "promote":
        _promote_by_hand(d, command)
    elif command.verb == "approve":
        _approve(d, command)
    elif command.verb == "pause":
        d.go(Phase.PAUSED, said(command, "paused"), paused=True)
    elif phase is Phase.PAUSED:
        d.go(Phase.RAMPING, said(command, "resumed"), paused=False, last_canary_at=d.seen.now)
    else:
        d.notes.append(f"resume by {command.by} changed nothing: it is not paused")


def _promote_by_hand(d: Draft, command: Asked) -> None:
    """A person answers for evidence, approvals and hooks; the schedule binds people too."""
    if schedule.is_open(d.spec.windows, d.seen.now):
        promote(d, said(command, "promoted before the tests were done"))
    else:
        opening = schedule.said_opening(d.spec.windows, d.seen.now)
        d.notes.append(f"promote by {command.by} was ignored: outside the schedule, which opens {opening}")


def _approve(d: Draft, command: Asked) -> None:
    """Approve what this step is held for, no more: what comes up later needs its own approval."""
    given = [gate for gate in _gates(d) if gate not in d.status.approved]
    if given:
        d.set(approved=(*d.status.approved, *given))
        d.notes.append(said(command, f"approved ({', '.join(given)})"))
    else:
        d.notes.append(f"approve by {command.by} changed nothing: this step waits for no approval")


def _gates(d: Draft) -> dict[str, str]:
    """What stands between this step and the next until a person approves, with its sentence."""
    spec, status, found = d.spec, d.status, {}
    family = d.family
    if status.srm is Verdict.FAIL and spec.srm is SrmRule.HOLD:
        found[f"srm:{status.step}"] = sentences.sample_ratio(spec, status)
    if family.objective_harm:
        found[f"objective:{status.step}"] = sentences.objective_harm(spec, family, status.total_counts)
    if spec.steps[status.step].approval:
        found[f"step:{status.step}"] = "its evidence is there"
    return found


# leaving the step -------------------------------------------------------------------------------


def _advance(d: Draft) -> None:
    """Leave the step when nothing stands against it; say what does otherwise."""
    gates = {gate: why for gate, why in _gates(d).items() if gate not in d.status.approved}
    manual = gates.pop(f"step:{d.status.step}", None)
    if gates:
        _hold(d, f"{'; '.join(gates.values())}; {_DECIDE}")
    elif (waiting := _samples_and_dwell(d)) is not None:
        d.go(Phase.RAMPING, waiting)
    elif (weak := _weak(d)) is not None:
        _hold(d, f"waits for evidence: {weak}")
    elif manual is not None:
        _hold(d, f"{manual}; it waits for a person ('stillhouse rollout approve')")
    elif not _last(d):
        _move(d, HookPoint.BEFORE_STEP, f"step {d.status.step + 2} of {len(d.spec.steps)}")
    elif d.spec.hold_final:
        family = d.family
        tests = sentences.promoted(d.spec, family, d.status.total_counts)
        d.go(Phase.HELD, f"A/B test holds its last step until a person decides; {tests}")
    else:
        _move(d, HookPoint.BEFORE_PROMOTE, "the promotion")


_DECIDE = "a person decides: 'stillhouse rollout approve' goes on, 'abort' ends it"


def _hold(d: Draft, why: str) -> None:
    d.go(Phase.HELD, f"{sentences.step_name(d.spec, d.status.step)}: {why}")


def _last(d: Draft) -> bool:
    return d.status.step == len(d.spec.steps) - 1


def _samples_and_dwell(d: Draft) -> str | None:
    step = d.spec.steps[d.status.step]
    seen = d.status.step_counts.get(Arm.CANARY.value, ArmCounts()).n
    if seen < step.min_samples or d.seen.now - d.status.step_since < step.min_dwell_s:
        return sentences.waiting(d.spec, d.status, d.seen.now)
    return None


def _weak(d: Draft) -> str | None:
    """What the weakest metric still lacks; None when every metric has this step's evidence."""
    family, needed = d.family, step_evidence(d.spec, d.status.step)
    weak = needed > 0 and family.weakest.log_noninferior < math.log(needed)
    if weak or (_last(d) and not family.noninferior):
        return sentences.weak(d.spec, family.weakest, d.status.total_counts, needed)
    return None


def _move(d: Draft, point: HookPoint, what: str) -> None:
    """The next step, or the promotion, once schedule and hooks allow it."""
    to = d.status.step + 1
    key = point.value if point is HookPoint.BEFORE_PROMOTE else f"{point}:{to}"
    if not schedule.is_open(d.spec.windows, d.seen.now):
        opening = schedule.said_opening(d.spec.windows, d.seen.now)
        _hold(d, f"its evidence is there; {what} waits for the schedule, which opens {opening}")
    elif not confirmed(d, point, key):
        _hold(d, f"its evidence is there; {waits_for(d, what)}")
    else:
        family = d.family
        if point is HookPoint.BEFORE_PROMOTE:
            promote(d, sentences.promoted(d.spec, family, d.status.total_counts))
            return
        needed = step_evidence(d.spec, d.status.step)
        seen = d.status.step_counts.get(Arm.CANARY.value, ArmCounts()).n
        why = f"{family.weakest.name} {sentences.number(family.weakest.log_noninferior)} >= {needed:.3g}"
        enter_step(d, to, f"weakest evidence {why} after {seen} canary requests")
