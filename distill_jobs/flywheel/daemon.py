"""The flywheel's loop: read logs, queue what is due, notice what ended, give and take room, tell.

One daemon a folder (a lock that dies with it). A tick may be cut short at any line; the next one, or the next
daemon, goes on from the stored state. Knows only the order of things.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import threading
import time
from types import FrameType
from zoneinfo import ZoneInfo

from contracts.errors import ConfigError, StillhouseError
from distill_jobs.flywheel import job, processes
from distill_jobs.flywheel.admit import Seen, decide
from distill_jobs.flywheel.config import FlywheelConfig
from distill_jobs.flywheel.due import Decision, RouteState, due
from distill_jobs.flywheel.hooks import Hooks
from distill_jobs.flywheel.metrics import FlywheelMetrics
from distill_jobs.flywheel.pressure import Gauge, Pressure, cpu_seconds, judge
from distill_jobs.flywheel.runner import Runner
from distill_jobs.flywheel.store import Run, Store
from distill_jobs.flywheel.watch import Watcher
from distill_jobs.locks import GLANCE_S, held

log = logging.getLogger("stillhouse.flywheel")

LOCK = ".daemon.lock"
_MB = 1 << 20


class Daemon:
    """The flywheel over one folder. Making it reads every route's configuration, so that mistakes are told at
    the start and not at night.
    """

    def __init__(self, config: FlywheelConfig) -> None:
        """Raises: ConfigError when a route's distillation cannot be what it says."""
        self._config = config
        self._zone = ZoneInfo(config.timezone)
        self.store = Store(config.dir)
        self._watchers = {name: _watcher(self.store, config, name) for name in config.routes}
        self._runner = Runner(config, self.store, self._watchers)
        self._hooks = Hooks(config, self.store)
        self._gauge = Gauge(config.pressure)
        self._pressure = Pressure()
        self._metrics = FlywheelMetrics(config, self.store)
        self._leave = threading.Event()

    def run(self) -> None:
        """Until SIGTERM or SIGINT; runs at work then yield, and go on when the next daemon starts.

        Raises: ConflictError when another daemon works on the folder.
        """
        where = self._config.dir
        with held(
            where / LOCK,
            lambda holder: (
                f"Another flywheel (process {holder}) works in {where}."
                " Stop it, or give this one another dir."
            ),
            GLANCE_S,
        ):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._asked_to_leave)
            now = time.time()
            self.store.know_routes(list(self._config.routes), now)
            self._runner.adopt(now)
            self._metrics.serve()
            while not self._leave.is_set():
                self.tick_safely()
                self._leave.wait(self._config.poll_s)
            self._end()

    def tick_safely(self) -> None:
        """A tick; what it could not do is logged and tried again at the next."""
        try:
            self.tick(time.time())
        except (StillhouseError, sqlite3.Error, OSError) as err:
            log.error("tick: %s: %s", type(err).__name__, err)

    def tick(self, now: float) -> None:
        """One look at everything."""
        self._runner.check(now)
        for route in self._config.routes:
            self._route(route, now)
        self._admit(now)
        self._hooks.check()
        self.store.beat(os.getpid(), now, self._pressure.why if self._pressure.active else "")
        self._metrics.write(now, self._pressure)

    def _route(self, name: str, now: float) -> None:
        """Read a route's log, and queue a run that is due. An unreadable log concerns its route only."""
        watcher, stored = self._watchers[name], self.store.route(name)
        try:
            watch = watcher.read(int(self._config.read_mb * _MB))
        except (StillhouseError, OSError) as err:
            log.warning("route %s: its log cannot be read: %s", name, err)
            self.store.say(name, f"the log cannot be read: {err}")
            return
        if not watch.caught_up and stored.requested_by is None:
            self.store.say(name, f"reading the log: {watch.now.seen} rows so far")
            return
        state = RouteState(
            watching_since=stored.watching_since,
            paused=stored.paused_by is not None,
            active=self.store.active_of(name) is not None,
            requested_by=stored.requested_by,
            last_queued_at=stored.last_queued_at,
            last_ended_at=stored.last_ended_at,
            failures=stored.failures,
        )
        decision = due(self._config.routes[name], state, watcher.look(), now, self._zone)
        self.store.say(name, _in_words(decision))
        if decision.start:
            self._runner.queue(name, decision, now)

    def _admit(self, now: float) -> None:
        runs = self.store.active()
        trees = {
            run.id: processes.tree(group) for run in runs if (group := self._runner.group(run)) is not None
        }
        ours = cpu_seconds(p for tree in trees.values() for p in tree)
        self._pressure = judge(self._config.pressure, self._pressure, self._gauge.look(ours), now)
        memory = (
            {run: processes.memory_of(tree) for run, tree in trees.items()} if self._limits_memory else {}
        )
        seen = [self._seen(run, memory.get(run.id, 0)) for run in runs]
        acts = decide(
            seen, self._config.budget, self._config.pressure, self._pressure, self.store.spent(now), now
        )
        for act in acts:
            self._runner.act(act, now)

    @property
    def _limits_memory(self) -> bool:
        return self._config.budget.memory_gb is not None

    def _seen(self, run: Run, memory: int) -> Seen:
        cancel = f"cancelled by {run.cancel_by}" if run.cancel_by else ""
        if run.route not in self._config.routes:
            cancel = cancel or "its route is no longer configured"
        return Seen(
            id=run.id,
            state=run.state,
            route_paused=self.store.route(run.route).paused_by is not None,
            cancel=cancel,
            stopped_at=run.stopped_at,
            stoppable=job.on_own_ray(run.workdir),
            worked_s=run.worked_s,
            memory=memory,
            last_tokens=0 if run.tokens else self.store.last_tokens(run.route),
        )

    def _end(self) -> None:
        """Nobody works on without somebody who looks after serving."""
        deadline = time.monotonic() + self._config.grace_s + 10
        while not self._runner.end_all("the flywheel was stopped", time.time()):
            if time.monotonic() > deadline:
                log.error("a run does not end; the next daemon will find it")
                break
            self._runner.check(time.time())
            time.sleep(0.2)
        self._hooks.end()
        self._metrics.write(time.time(), self._pressure)
        self.store.close()

    def _asked_to_leave(self, number: int, frame: FrameType | None) -> None:
        self._leave.set()


def _watcher(store: Store, config: FlywheelConfig, name: str) -> Watcher:
    route = config.routes[name]
    try:
        collect = job.resolve(name, route).collect
    except ConfigError as err:
        raise ConfigError(f"routes.{name}.distill: {err}") from err
    if route.triggers == type(route.triggers)():
        log.warning(
            "route %s has no triggers: only `stillhouse flywheel trigger %s` starts a run", name, name
        )
    if collect.log_dir is None:
        raise ConfigError(f"routes.{name}.distill: collect.log_dir is needed: it is what is watched.")
    return Watcher(store, name, route, collect.log_dir, collect.model_dump(mode="json"))


def _in_words(decision: Decision) -> str:
    if decision.trigger is None or decision.start:
        return decision.reason
    return f"{decision.trigger}: {decision.reason}; waits: {', '.join(decision.waits)}"
