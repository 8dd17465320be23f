"""Which students this cluster must run, by the state store: missing ones are deployed, idle ones deleted.

Every cluster does this for itself, whoever leads the rollouts: a new one beside the old (KubeRay's switch)
has its students up before it gets traffic, and one that was lost comes back with all of them. Knows nothing
about statistics or about how a rollout is decided.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from contracts.errors import EngineError, StateError, StillhouseError
from contracts.rollout import Phase
from contracts.traffic import Upstream
from serve.config import ServeConfig
from serve.state.rollouts import RolloutState, StoredRollout
from serve.state.traffic import TrafficState

log = logging.getLogger(__name__)

LOOK_S = 5.0
RETRY_S = 60.0
"""Before an application that could not be deployed is tried again: what it lacked may have come back."""
_DRAINING = (Phase.PROMOTING, Phase.ROLLING_BACK)


class Student(NamedTuple):
    """An application that some rollout deployed."""

    upstream: Upstream
    artifact_uri: str


class Applications(Protocol):
    """What runs in this cluster (serve.engine.deployer.ServeDeployer)."""

    def running(self) -> dict[str, str]:
        """Application → its status in Ray Serve's words."""
        ...

    def deploy(self, upstream: Upstream, artifact_uri: str) -> None:
        """Start creating it, or do nothing when it exists."""
        ...

    def delete(self, app: str) -> None:
        """Start deleting it."""
        ...


class Needs(NamedTuple):
    """What the store says about students at one moment."""

    deploy: dict[str, Student]
    """Must run."""
    keep: frozenset[str]
    """Applications that stay if they run: an active rollout has not finished with them."""
    unknown: dict[str, str]
    """Application → route that points to it, although no rollout says what it is."""


class Students:
    """One cluster's view. `look` and `settled` may be called from different threads."""

    def __init__(self, config: ServeConfig, engine: Engine, applications: Applications) -> None:
        self._rollouts, self._traffic = RolloutState(engine), TrafficState(engine)
        self._declared = {str(u.app) for u in config.upstream_nouns() if u.app is not None}
        self._applications = applications
        self._known: dict[str, Student] = {}
        self._strangers: set[str] = set()
        """Applications that no rollout deployed; a student is in its rollout's spec before it runs."""
        self._failed_at: dict[str, float] = {}

    def needs(self) -> Needs:
        """Read the store. Splits come first: what a rollout hands over to its split is in one of the two."""
        splits = self._traffic.splits()
        active = self._rollouts.active()
        wanted = {u.app: route for route, split in splits.items() for u in split.upstreams if u.app}
        asked = {u.app: r.spec.route for r in active if _has_traffic(r) for u in _students_of(r) if u.app}
        wanted = {app: route for app, route in (asked | wanted).items() if app not in self._declared}
        known = self._look_up(wanted)
        return Needs(
            {app: known[app] for app in wanted if app in known},
            frozenset(u.app for r in active for u in _students_of(r) if u.app),
            {app: route for app, route in wanted.items() if app not in known},
        )

    def look(self) -> None:
        """Deploy what is missing, delete what nobody needs. Raises: what Ray Serve or the store does."""
        running = self._applications.running()
        needs = self.needs()
        for app, route in needs.unknown.items():
            log.error("route %r points to application %r, which no rollout knows", route, app)
        for app, student in needs.deploy.items():
            self._see_to(app, student, running.get(app))
        present = {app for app, status in running.items() if status != "DELETING"}
        idle = present - self._declared - self._strangers - needs.deploy.keys() - needs.keep
        students = idle & self._look_up(idle).keys()
        self._strangers |= idle - students
        for app in sorted(students):
            log.info("deleting student %s: no split and no rollout needs it", app)
            self._applications.delete(app)

    def settled(self) -> bool:
        """True when every student that must run does, or cannot."""
        running = self._applications.running()
        return all(running.get(app) in ("RUNNING", "DEPLOY_FAILED") for app in self.needs().deploy)

    def run_forever(self, stop: threading.Event) -> None:
        """Look every five seconds until `stop` is set."""
        while not stop.is_set():
            try:
                self.look()
            except (StillhouseError, SQLAlchemyError, OSError) as err:
                log.warning("students not looked after this time: %s", err)
            except Exception:
                # Ray has errors of many kinds while its head is busy; the students need somebody still.
                log.exception("students not looked after this time")
            stop.wait(LOOK_S)

    def wait_settled(self, timeout_s: float, stop: threading.Event) -> bool:
        """Until `settled`; False when the time is over or `stop` was set."""
        deadline = time.monotonic() + timeout_s
        while not stop.is_set() and time.monotonic() < deadline:
            try:
                if self.settled():
                    return True
            except (StillhouseError, SQLAlchemyError) as err:
                log.warning("cannot say which students run: %s", err)
            stop.wait(0.5)
        return False

    def _see_to(self, app: str, student: Student, status: str | None) -> None:
        if status is None:
            log.info("deploying student %s, which this cluster must run", app)
            try:
                self._applications.deploy(*student)
            except EngineError as err:  # the others need somebody, too
                log.warning("student %s is deployed at the next look: %s", app, err)
        elif status != "DEPLOY_FAILED":
            self._failed_at.pop(app, None)
        elif time.monotonic() - self._failed_at.setdefault(app, time.monotonic()) > RETRY_S:
            log.warning("student %s could not be deployed; trying again from the beginning", app)
            del self._failed_at[app]
            self._applications.delete(app)

    def _look_up(self, apps: Iterable[str]) -> dict[str, Student]:
        """What rollouts say about applications; their history is only read for one not met before."""
        if set(apps) - self._known.keys():
            specs = (r.spec for r in self._rollouts.history())
            self._known = {
                s.candidate.app: Student(s.candidate, s.artifact_uri)
                for s in specs
                if s.candidate.app and s.artifact_uri
            }
        return self._known


def check_students(students: Students) -> list[str]:
    """The students that must run. Raises: StateError when a split needs one that nobody can deploy."""
    needs = students.needs()
    for app, route in needs.unknown.items():
        raise StateError(
            f"route {route!r} points to application {app!r}, which neither the configuration nor any rollout "
            "knows. 'stillhouse up --reset-routes' puts all routes back on their configured upstreams."
        )
    return list(needs.deploy)


def _students_of(stored: StoredRollout) -> list[Upstream]:
    """Its candidate, and the champion it would give the route back to."""
    spec, stable = stored.spec, stored.status.stable
    return [spec.candidate] if stable is None else [spec.candidate, stable]


def _has_traffic(stored: StoredRollout) -> bool:
    """True from warming until it was decided: before, its controller deploys; after, the split says all."""
    return stored.status.phase is not Phase.PENDING and stored.status.phase not in _DRAINING
