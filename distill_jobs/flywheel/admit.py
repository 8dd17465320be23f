"""Which runs may start, must stop, may go on or must end: one pure function of runs, budget and machine.

Serving comes first: under pressure nothing starts and what works is stopped. Knows nothing about processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from distill_jobs.flywheel.config import BudgetConfig, PressureConfig
from distill_jobs.flywheel.pressure import Pressure

_HOUR_S = 3600.0
_GB = 1e9


class State(StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    STOPPED = "stopped"
    """SIGSTOP: its processes hold their memory and do nothing."""
    ENDING = "ending"
    """SIGTERM was sent; what it becomes is decided."""
    PUBLISHED = "published"
    REFUSED = "refused"
    """A gate refused the student."""
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def active(self) -> bool:
        """True until its end; a route has one active run at most."""
        return self in ACTIVE

    @property
    def at_work(self) -> bool:
        """True while it has processes."""
        return self in (State.RUNNING, State.STOPPED, State.ENDING)


ACTIVE = (State.QUEUED, State.RUNNING, State.STOPPED, State.ENDING)


class Do(StrEnum):
    """What the daemon can do to a run."""

    START = "start"
    STOP = "stop"
    GO_ON = "go_on"
    YIELD = "yield"
    """End it now, and go on later in the same workdir."""
    CANCEL = "cancel"
    FAIL = "fail"


class Seen(NamedTuple):
    """A run as the decision needs it."""

    id: int
    state: State
    route_paused: bool = False
    cancel: str = ""
    """Why it must end for good: a person asked for it, or its route is no longer configured."""
    stopped_at: float | None = None
    stoppable: bool = True
    """False for a run whose work happens on somebody else's Ray cluster."""
    worked_s: float = 0.0
    memory: int = 0
    """Bytes."""
    last_tokens: int = 0
    """Teacher tokens of the route's last run: what this one is expected to take."""


class Spent(NamedTuple):
    """What all runs took in the last 24 hours."""

    seconds: float = 0.0
    tokens: int = 0


class Act(NamedTuple):
    """One thing to do, and why."""

    run: int
    do: Do
    why: str


def decide(
    runs: Sequence[Seen],
    budget: BudgetConfig,
    config: PressureConfig,
    pressure: Pressure,
    spent: Spent,
    now: float,
) -> list[Act]:
    """What to do now; runs in the order in which they were queued."""
    acts = [act for run in runs if (act := _one(run, budget, config, pressure, spent, now)) is not None]
    ended = {act.run for act in acts if act.do in (Do.YIELD, Do.CANCEL, Do.FAIL)}
    at_work = sum(run.state.at_work for run in runs)
    room = budget.runs - at_work
    return acts + list(_starts(runs, ended, room, budget, pressure, spent))


def blocked(run: Seen, budget: BudgetConfig, pressure: Pressure, spent: Spent) -> str | None:
    """Why a queued run may not start now, leaving aside how many are at work."""
    if run.route_paused:
        return "the route is paused"
    if pressure.active:
        return f"serving needs the machine: {pressure.why}"
    if _out_of_hours(budget, spent):
        return f"{spent.seconds / _HOUR_S:.1f} h worked in 24 h, hours_per_day is {budget.hours_per_day:g}"
    limit = budget.teacher_tokens_per_day
    if limit is not None and (spent.tokens >= limit or spent.tokens + run.last_tokens > limit):
        return (
            f"{spent.tokens} teacher tokens in 24 h, this run may take {run.last_tokens}: "
            f"teacher_tokens_per_day is {limit}"
        )
    return None


def _one(
    run: Seen, budget: BudgetConfig, config: PressureConfig, pressure: Pressure, spent: Spent, now: float
) -> Act | None:
    """What must be done to one run, whatever the others do."""
    if run.cancel and run.state in (State.QUEUED, State.RUNNING, State.STOPPED):
        return Act(run.id, Do.CANCEL, run.cancel)
    if run.state not in (State.RUNNING, State.STOPPED):
        return None
    if budget.memory_gb is not None and run.memory > budget.memory_gb * _GB:
        return Act(run.id, Do.FAIL, f"{run.memory / _GB:.1f} GB, memory_gb is {budget.memory_gb:g}")
    if budget.max_run_hours is not None and run.worked_s > budget.max_run_hours * _HOUR_S:
        return Act(run.id, Do.FAIL, f"worked longer than max_run_hours {budget.max_run_hours:g}")
    if run.route_paused:
        return Act(run.id, Do.YIELD, "the route is paused")
    if _out_of_hours(budget, spent):
        return Act(run.id, Do.YIELD, f"hours_per_day {budget.hours_per_day:g} are used up")
    return _pressed(run, config, pressure, now)


def _pressed(run: Seen, config: PressureConfig, pressure: Pressure, now: float) -> Act | None:
    if run.state is State.STOPPED:
        if not pressure.active:
            return Act(run.id, Do.GO_ON, "serving is calm")
        if run.stopped_at is not None and now - run.stopped_at >= config.yield_after_s:
            return Act(run.id, Do.YIELD, f"stopped for {config.yield_after_s:g} s: {pressure.why}")
        return None
    if not pressure.active:
        return None
    at_once = not run.stoppable or config.yield_after_s == 0
    return Act(run.id, Do.YIELD if at_once else Do.STOP, pressure.why)


def _starts(
    runs: Sequence[Seen], ended: set[int], room: int, budget: BudgetConfig, pressure: Pressure, spent: Spent
) -> Iterator[Act]:
    tokens = spent.tokens
    for run in runs:
        if run.state is not State.QUEUED or run.id in ended or room <= 0:
            continue
        if blocked(run, budget, pressure, spent._replace(tokens=tokens)) is None:
            tokens += run.last_tokens
            room -= 1
            yield Act(run.id, Do.START, "there is room")


def _out_of_hours(budget: BudgetConfig, spent: Spent) -> bool:
    return budget.hours_per_day is not None and spent.seconds >= budget.hours_per_day * _HOUR_S
