"""The rules of a rollout, as one pure function: (spec, status, observation) → what to do and to remember.

No clock, no storage, no engine: the same three arguments give the same decision bit for bit, which is how a
killed controller resumes to the same decision and how replay checks the audit trail. Phases and what moves
between them:

    pending → warming → ramping ⇄ held → promoting → promoted
                           ⇅ paused
    any of these before promoting → rolling_back → rolled_back (harm, kill switch, no data) or aborted
"""

from __future__ import annotations

import math

from contracts.metrics import PAIR, ArmCounts
from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from contracts.traffic import Arm
from serve.rollout import evidence, sentences
from serve.rollout.draft import Draft, end, enter_step, promote, roll_back, said
from serve.rollout.observation import Action, Asked, Decision, Observation, SeenWindow

ENGINE_ERROR_BUDGET = 6
"""Engine errors in a row before a rollout gives up; with the back-off below that is about half a minute."""
KILL_SWITCH_SAMPLES = 20
_NOT_ITS_FAULT = "engine error, not the student's failure"
_WITH_TRAFFIC = (Phase.RAMPING, Phase.HELD, Phase.PAUSED)


def initial(spec: RolloutSpec) -> RolloutStatus:
    """The status a rollout is created with."""
    return RolloutStatus(
        id=spec.id,
        reason=f"asked for by {spec.created_by}",
        phase_since=spec.created_at,
        next_look_at=spec.created_at,
        metrics=evidence.fresh(spec),
    )


def decide(spec: RolloutSpec, status: RolloutStatus, observation: Observation) -> Decision:
    """Apply the rules of the status's phase to what was observed."""
    draft = Draft(spec, status, observation)
    if status.phase is Phase.PENDING:
        _pending(draft)
    elif status.phase is Phase.WARMING:
        _warming(draft)
    elif status.phase in _WITH_TRAFFIC:
        _with_traffic(draft)
    elif not status.phase.terminal:
        _draining(draft)
    return draft.decision()


def step_evidence(spec: RolloutSpec, index: int) -> float:
    """The non-inferiority e-value every metric needs to leave a step: its own, or a geometric ladder.

    The ladder rises from 1 (nothing speaks against the canary) to 1/alpha_promote at the last step; the last
    step never needs less than that, whatever the step says.
    """
    full = 1.0 / spec.alpha_promote
    last = len(spec.steps) - 1
    asked = spec.steps[index].evidence
    if index == last:
        return max(full, asked or 0.0)
    return asked if asked is not None else math.pow(full, index / last)


# before traffic ---------------------------------------------------------------------------------


def _pending(d: Draft) -> None:
    if _commands_before_traffic(d) or _engine_error(d, "could not be deployed"):
        return
    if d.seen.ready:
        d.go(Phase.WARMING, "the application is up; probing it", engine_errors=0)
    else:
        _warm_timeout(d, "its application did not come up")


def _warming(d: Draft) -> None:
    if _commands_before_traffic(d) or _engine_error(d, "did not answer its probes"):
        return
    if d.status.paused:
        return
    if not d.seen.warmed:
        _warm_timeout(d, "it did not answer its probes")
    elif d.seen.split is None:
        end(d, "aborted", f"route {d.spec.route!r} has no split; start the stack before a rollout")
    else:
        d.set(stable=d.seen.split.stable, engine_errors=0, last_canary_at=d.seen.now)
        enter_step(d, 0, f"warm after {d.seen.now - d.spec.created_at:.0f} s")


def _warm_timeout(d: Draft, what: str) -> None:
    if not d.status.paused and d.seen.now - d.status.phase_since > d.spec.warm_timeout_s:
        end(d, "aborted", f"{_NOT_ITS_FAULT}: {what} within {d.spec.warm_timeout_s:g} s")


def _engine_error(d: Draft, what: str) -> bool:
    """Spend the error budget: back off, and give up without a verdict on the student when it is gone."""
    if d.seen.engine_error is None:
        return False
    errors = d.status.engine_errors + 1
    if errors >= ENGINE_ERROR_BUDGET:
        d.set(engine_errors=errors)
        end(d, "aborted", f"{_NOT_ITS_FAULT}: it {what} in {errors} tries: {d.seen.engine_error}")
    else:
        d.set(reason=_back_off(d, errors))
    return True


def _back_off(d: Draft, errors: int) -> str:
    d.set(engine_errors=errors, next_look_at=d.seen.now + 0.5 * 2**errors)
    return f"engine error {errors} of {ENGINE_ERROR_BUDGET}, trying again: {d.seen.engine_error}"


def _commands_before_traffic(d: Draft) -> bool:
    """Apply commands; True when the rollout ended."""
    for command in d.seen.commands:
        d.done.append(command.id)
        if command.verb == "abort":
            end(d, "aborted", said(command, "aborted"))
            return True
        if command.verb in ("pause", "resume"):
            paused = command.verb == "pause"
            tail = "; it waits before its first step" if paused else ""
            d.set(paused=paused, phase_since=d.seen.now, reason=said(command, command.verb + "d") + tail)
        else:
            d.notes.append(f"{command.verb} by {command.by} was ignored: the student has not been warmed yet")
    return False


# with traffic -----------------------------------------------------------------------------------


def _with_traffic(d: Draft) -> None:
    if d.seen.split is None or d.seen.split.rollout_id != d.spec.id:
        end(d, "aborted", f"the split of route {d.spec.route!r} was changed by somebody else")
        return
    killed = _kill_switch(d)
    promote_now = any(c.verb == "promote" for c in d.seen.commands)
    if killed or promote_now or d.seen.now >= d.status.next_look_at:
        _look(d)
    if killed:
        roll_back(d, killed, blame=True)
        return
    if d.looked and _harm_or_silence(d):
        return
    for command in d.seen.commands:
        _command(d, command)
    if d.looked and d.status.phase in (Phase.RAMPING, Phase.HELD):
        _advance(d)


def _look(d: Draft) -> None:
    """Consume the windows: each split version is a block of its own, so weights are never mixed."""
    assert d.seen.split is not None
    d.looked = True
    metrics, step, fresh = d.status.metrics, dict(d.status.step_counts), False
    for window in d.seen.windows:
        metrics = evidence.update(d.spec, metrics, window)
        fresh = fresh or window.canary.n > 0
        if window.split_version == d.seen.split.version:
            step = _plus(step, window)
    metrics = evidence.read(d.spec, metrics, d.seen.queries)
    d.set(metrics=metrics, step_counts=step)
    _consume_totals(d)
    last = d.status.last_canary_at or d.seen.now
    # Time in which no controller was watching is not time without data.
    unwatched = max(0.0, d.seen.now - d.status.next_look_at - 2 * d.spec.look_s)
    d.set(last_canary_at=d.seen.now if fresh else last + unwatched, next_look_at=d.seen.now + d.spec.look_s)


def _consume_totals(d: Draft) -> None:
    total = dict(d.status.total_counts)
    for window in d.seen.windows:
        total = _plus(total, window)
    d.set(total_counts=total, cursor={**d.status.cursor, **d.seen.cursor})


def _plus(counts: dict[str, ArmCounts], window: SeenWindow) -> dict[str, ArmCounts]:
    seen = {Arm.STABLE.value: window.stable, Arm.CANARY.value: window.canary}
    if window.pairs.scores:
        seen[PAIR] = window.pairs
    return {**counts, **{arm: counts.get(arm, ArmCounts()).plus(new) for arm, new in seen.items()}}


def _kill_switch(d: Draft) -> str | None:
    """Outside statistics, at every tick: did the canary mostly fail since the last look, or in this step?"""
    now = ArmCounts()
    for window in d.seen.windows:
        now = now.plus(window.canary)
    step = d.status.step_counts.get(Arm.CANARY.value, ArmCounts()).plus(now)
    for counts, since in ((now, "since the last look"), (step, "in this step")):
        if counts.n >= KILL_SWITCH_SAMPLES and counts.errors >= d.spec.kill_switch_errors * counts.n:
            limit = f"(limit {sentences.percent(d.spec.kill_switch_errors)})"
            return f"kill switch: canary failed {counts.errors} of {counts.n} requests {since} {limit}"
    return None


def _harm_or_silence(d: Draft) -> bool:
    family = evidence.combine(d.spec, d.status.metrics)
    if family.harm:
        roll_back(d, sentences.harm(d.spec, family, d.status.total_counts), blame=True)
        return True
    silent = d.seen.now - (d.status.last_canary_at or d.seen.now)
    if d.status.phase is not Phase.PAUSED and silent >= d.spec.no_data_deadline_s:
        why = f"no data: the canary got no counted request for {silent:.0f} s"
        roll_back(d, f"{why} (deadline {d.spec.no_data_deadline_s:g} s)", blame=False)
        return True
    return False


def _command(d: Draft, command: Asked) -> None:
    d.done.append(command.id)
    phase = d.status.phase
    if phase not in _WITH_TRAFFIC:
        d.notes.append(f"{command.verb} by {command.by} came too late: it is {phase.value}")
    elif command.verb == "abort":
        end(d, "aborted", said(command, "aborted"))
    elif command.verb == "promote":
        promote(d, said(command, "promoted before the tests were done"))
    elif command.verb == "pause":
        d.go(Phase.PAUSED, said(command, "paused"), paused=True)
    elif phase is Phase.PAUSED:
        d.go(Phase.RAMPING, said(command, "resumed"), paused=False, last_canary_at=d.seen.now)
    else:
        d.notes.append(f"resume by {command.by} changed nothing: it is not paused")


def _advance(d: Draft) -> None:
    """Leave the step when samples, dwell and every metric's evidence are there; hold it otherwise."""
    spec, status = d.spec, d.status
    step, last = spec.steps[status.step], status.step == len(spec.steps) - 1
    seen = status.step_counts.get(Arm.CANARY.value, ArmCounts()).n
    if seen < step.min_samples or d.seen.now - status.step_since < step.min_dwell_s:
        d.go(Phase.RAMPING, sentences.waiting(spec, status, d.seen.now))
        return
    family, needed = evidence.combine(spec, status.metrics), step_evidence(spec, status.step)
    weak = needed > 0 and family.weakest.log_noninferior < math.log(needed)
    if weak or (last and not family.noninferior):
        why = sentences.weak(spec, family.weakest, status.total_counts, needed)
        d.go(Phase.HELD, f"{sentences.step_name(spec, status.step)} waits for evidence: {why}")
    elif not last:
        why = f"{family.weakest.name} {sentences.number(family.weakest.log_noninferior)} >= {needed:.3g}"
        enter_step(d, status.step + 1, f"weakest evidence {why} after {seen} canary requests")
    elif spec.hold_final:
        tests = sentences.promoted(spec, family, status.total_counts)
        d.go(Phase.HELD, f"A/B test holds its last step until a person decides; {tests}")
    else:
        promote(d, sentences.promoted(spec, family, status.total_counts))


# draining ---------------------------------------------------------------------------------------


def _draining(d: Draft) -> None:
    """Wait until nobody uses the losing upstream, then finish: actions before the terminal status."""
    for command in d.seen.commands:
        d.done.append(command.id)
        d.notes.append(f"{command.verb} by {command.by} came too late: it is {d.status.phase.value}")
    due = d.seen.now >= d.status.next_look_at
    if d.seen.engine_error is not None:
        errors = d.status.engine_errors + 1
        if errors < ENGINE_ERROR_BUDGET:
            d.notes.append(_back_off(d, errors))
        else:
            _finish(d, (), f"{d.status.reason}; cleaning up failed, see to it: {d.seen.engine_error}")
        return
    drained = d.seen.acknowledged and d.seen.in_flight == 0
    late = d.seen.now - d.status.phase_since >= d.spec.drain_timeout_s
    if (drained or late) and due:
        left = f"; {d.seen.in_flight} requests still ran after {d.spec.drain_timeout_s:g} s of drain"
        _finish(d, _closing_actions(d.status), d.status.reason + ("" if drained else left))


def _finish(d: Draft, actions: tuple[Action, ...], reason: str) -> None:
    if d.seen.windows:
        _consume_totals(d)
    ends = {"promoted": Phase.PROMOTED, "rolled_back": Phase.ROLLED_BACK}
    d.actions = actions
    d.go(ends.get(d.status.decision or "", Phase.ABORTED), reason)


def _closing_actions(status: RolloutStatus) -> tuple[Action, ...]:
    if status.decision == "promoted":
        return (Action.NOTIFY_PROMOTED, Action.RETIRE_STABLE)
    if status.decision == "rolled_back":
        return (Action.NOTIFY_ROLLED_BACK, Action.RETIRE_CANDIDATE)
    return (Action.RETIRE_CANDIDATE,)
