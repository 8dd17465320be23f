"""Rules of `pending` and `warming`: nobody's request is at stake, so an error only costs its own budget."""

from __future__ import annotations

from contracts.hooks import HookPoint
from contracts.rollout import Phase
from serve.rollout import schedule
from serve.rollout.draft import Draft, end, enter_step, said, superseded
from serve.rollout.rules.budgets import NOT_ITS_FAULT, engine_error
from serve.rollout.rules.confirming import confirmed, hear, waits_for


def pending(d: Draft) -> None:
    """Wait for whoever must confirm the start, then until the application is up."""
    if d.spec.test is not None and d.status.stable is None and d.seen.split is not None:
        d.set(stable=d.seen.split.stable)
    if _commands(d) or _over(d):
        return
    if (failed := hear(d)) is not None:
        end(d, "aborted", f"the start could not be confirmed: {failed}")
    elif engine_error(d, "could not be deployed"):
        return
    elif not confirmed(d, HookPoint.BEFORE_START, HookPoint.BEFORE_START):
        d.set(reason=waits_for(d, "the start"), phase_since=d.seen.now)
    elif d.seen.ready:
        d.go(Phase.WARMING, "the application is up; probing it", engine_errors=0)
    else:
        _warm_timeout(d, "its application did not come up")


def warming(d: Draft) -> None:
    """Probe it; once it answers, the first step begins when windows and hooks allow."""
    if _commands(d) or _over(d):
        return
    if (failed := hear(d)) is not None:
        again = f"{failed}; '{_RESUME}' asks again"
        d.set(paused=True, phase_since=d.seen.now, reason=f"the first step could not be confirmed: {again}")
    elif engine_error(d, "did not answer its probes") or d.status.paused:
        return
    elif not d.seen.warmed:
        if d.seen.now >= d.status.next_look_at:
            _warm_timeout(d, "it did not answer its probes")
    elif d.seen.split is None:
        end(d, "aborted", f"route {d.spec.route!r} has no split; start the stack before a rollout")
    else:
        _first_step(d)


_RESUME = "stillhouse rollout resume"


def _first_step(d: Draft) -> None:
    assert d.seen.split is not None
    d.set(engine_errors=0)
    if not schedule.is_open(d.spec.windows, d.seen.now):
        opening = schedule.said_opening(d.spec.windows, d.seen.now)
        _wait(d, f"warm; the first step waits for the schedule, which opens {opening}")
    elif not confirmed(d, HookPoint.BEFORE_STEP, f"{HookPoint.BEFORE_STEP}:0"):
        _wait(d, waits_for(d, "warm; the first step"))
    else:
        d.set(stable=d.seen.split.stable, last_canary_at=d.seen.now)
        enter_step(d, 0, f"warm after {d.seen.now - d.spec.created_at:.0f} s")


def _wait(d: Draft, reason: str) -> None:
    """Stay warm: it is probed again at the next look, and waiting for others is not its timeout."""
    d.set(reason=reason, phase_since=d.seen.now, next_look_at=d.seen.now + d.spec.look_s)


def _warm_timeout(d: Draft, what: str) -> None:
    if not d.status.paused and d.seen.now - d.status.phase_since > d.spec.warm_timeout_s:
        end(d, "aborted", f"{NOT_ITS_FAULT}: {what} within {d.spec.warm_timeout_s:g} s")


def _over(d: Draft) -> bool:
    """True when another student of its test became the stable arm before this one got traffic."""
    over = superseded(d.spec, d.status, d.seen.split)
    if over is not None:
        end(d, "aborted", over)
    return over is not None


def _commands(d: Draft) -> bool:
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
