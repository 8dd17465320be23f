"""Is a run of this route due? One pure function of what is known of the route, its triggers and the clock.

Knows nothing about logs, processes or the machine; whether there is room for a run is admit.py's.
"""

from __future__ import annotations

from typing import NamedTuple
from zoneinfo import ZoneInfo

from contracts.config import Record
from distill_jobs.flywheel.config import RouteConfig
from distill_jobs.flywheel.drift import Look
from distill_jobs.flywheel.schedule import is_due, parse_schedule, quiet_until

HOUR_S = 3600.0
_LONGEST_COOLDOWN_H = 168.0

MANUAL = "manual"
TRIGGER_OF = {"words": "drift", "length": "drift", "grades": "grades", "feedback": "feedback"}
"""Kind of a look → name of the trigger that it is."""


class Observation(Record):
    """What the logs say since the last run that did not fail."""

    rows: int = 0
    """Usable rows."""
    looks: tuple[Look, ...] = ()
    """Tests that fired and were not answered by a run yet."""
    judged: int = 0
    """Judgements of users."""
    bad: int = 0
    """Of them, bad ones."""


class RouteState(Record):
    """What the flywheel remembers of a route."""

    watching_since: float
    paused: bool = False
    active: bool = False
    """A run is queued, at work or ending."""
    requested_by: str | None = None
    """A person asked for a run."""
    last_queued_at: float | None = None
    last_ended_at: float | None = None
    failures: int = 0
    """Runs that failed since one that did not."""


class Decision(NamedTuple):
    """What to do, why, and what stands in the way of a trigger that has fired."""

    start: bool
    trigger: str | None
    reason: str
    waits: tuple[str, ...] = ()


def due(route: RouteConfig, state: RouteState, seen: Observation, now: float, zone: ZoneInfo) -> Decision:
    """Whether to queue a run. A person's request waits for nothing but a run that is active."""
    if state.active:
        return Decision(False, None, "a run is active")
    if state.requested_by is not None:
        return Decision(True, MANUAL, f"asked for by {state.requested_by}")
    fired = _fired(route, state, seen, now, zone)
    if fired is None:
        return Decision(False, None, _nothing(route, seen))
    trigger, reason = fired
    waits = _waits(route, state, seen, now, zone)
    return Decision(not waits, trigger, reason, waits)


def cooldown_s(route: RouteConfig, failures: int) -> float:
    """Seconds that must pass after a run; doubled with every failure in a row."""
    hours = route.cooldown_h * 2.0 ** min(failures, 30)
    return HOUR_S * (min(hours, _LONGEST_COOLDOWN_H) if failures else route.cooldown_h)


def _fired(
    route: RouteConfig, state: RouteState, seen: Observation, now: float, zone: ZoneInfo
) -> tuple[str, str] | None:
    """The first trigger that has fired, with its sentence: the evidence before the clock."""
    triggers = route.triggers
    for look in seen.looks:
        if look.fired:
            return TRIGGER_OF[look.kind], look.sentence
    if triggers.rows is not None and seen.rows >= triggers.rows:
        return "rows", f"{seen.rows} usable rows since the last run (bound {triggers.rows})"
    if triggers.schedule is not None:
        since = state.watching_since if state.last_queued_at is None else state.last_queued_at
        if is_due(parse_schedule(triggers.schedule), since, now, zone):
            return "schedule", triggers.schedule
    return None


def _waits(
    route: RouteConfig, state: RouteState, seen: Observation, now: float, zone: ZoneInfo
) -> tuple[str, ...]:
    waits = []
    if state.paused:
        waits.append("the route is paused")
    if seen.rows < route.min_rows:
        waits.append(f"{seen.rows} new rows, min_rows is {route.min_rows}")
    if state.last_ended_at is not None:
        left = state.last_ended_at + cooldown_s(route, state.failures) - now
        if left > 0:
            waits.append(f"cooldown: {left / HOUR_S:.1f} h to go")
    until = quiet_until(route.quiet_hours, now, zone)
    if until is not None:
        waits.append(f"quiet hours until {until}")
    return tuple(waits)


def _nothing(route: RouteConfig, seen: Observation) -> str:
    rows = f"{seen.rows}" + (f" of {route.triggers.rows}" if route.triggers.rows else "")
    judged = f", {seen.bad} of {seen.judged} judgements bad" if seen.judged else ""
    return f"{rows} new rows{judged}; nothing fired"
