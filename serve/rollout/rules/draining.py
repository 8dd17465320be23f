"""Rules of `promoting` and `rolling back`: wait until nobody uses the loser, then clean up and finish."""

from __future__ import annotations

from contracts.rollout import Phase, RolloutStatus
from serve.rollout.draft import Draft
from serve.rollout.observation import Action
from serve.rollout.rules.budgets import said_error, spend
from serve.rollout.rules.looking import add_totals


def draining(d: Draft) -> None:
    """Actions come before the terminal status; the former champion's alias comes back before all others."""
    for command in d.seen.commands:
        d.done.append(command.id)
        d.notes.append(f"{command.verb} by {command.by} came too late: it is {d.status.phase.value}")
    due, restore = d.seen.now >= d.status.retry_at, _must_restore(d.status)
    if d.seen.engine_error is not None:
        _failed(d, restore)
    elif restore and due:
        d.actions = (Action.NOTIFY_RESTORED,)
        d.set(champion="restored", engine_errors=0)
    elif not restore and due:
        _finish_when_drained(d)


def _must_restore(status: RolloutStatus) -> bool:
    return status.champion == "promoted" and status.decision != "promoted"


def _failed(d: Draft, restore: bool) -> None:
    """What could not be cleaned up is left to people, and said; the route itself is in order."""
    if spend(d):
        d.notes.append(said_error(d))
    elif restore:
        d.notes.append(f"the registry still names the student champion, see to it: {d.seen.engine_error}")
        d.set(champion="restored", engine_errors=0, retry_at=d.seen.now)
    else:
        _finish(d, (), f"{d.status.reason}; cleaning up failed, see to it: {d.seen.engine_error}")


def _finish_when_drained(d: Draft) -> None:
    drained = d.seen.acknowledged and d.seen.in_flight == 0
    late = d.seen.now - d.status.phase_since >= d.spec.drain_timeout_s
    if drained or late:
        left = f"; {d.seen.in_flight} requests still ran after {d.spec.drain_timeout_s:g} s of drain"
        _finish(d, _closing_actions(d.status), d.status.reason + ("" if drained else left))


def _finish(d: Draft, actions: tuple[Action, ...], reason: str) -> None:
    if d.seen.windows and d.status.watch is None:
        add_totals(d)
    ends = {"promoted": Phase.PROMOTED, "rolled_back": Phase.ROLLED_BACK}
    d.actions = actions
    d.go(ends.get(d.status.decision or "", Phase.ABORTED), reason)


def _closing_actions(status: RolloutStatus) -> tuple[Action, ...]:
    if status.decision == "promoted":
        told = status.champion == "promoted"
        return (Action.RETIRE_STABLE,) if told else (Action.NOTIFY_PROMOTED, Action.RETIRE_STABLE)
    if status.decision == "rolled_back":
        return (Action.NOTIFY_ROLLED_BACK, Action.RETIRE_CANDIDATE)
    return (Action.RETIRE_CANDIDATE,)
