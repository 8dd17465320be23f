"""The flywheel in Prometheus' terms: a textfile that is always whole, and a port when one is configured.

Knows the stored state; decides nothing.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server, write_to_textfile

from distill_jobs.flywheel.admit import State
from distill_jobs.flywheel.config import FlywheelConfig
from distill_jobs.flywheel.pressure import Pressure
from distill_jobs.flywheel.store import Store
from distill_jobs.flywheel.work_metrics import WorkMetrics

TEXTFILE = "flywheel.prom"


class FlywheelMetrics:
    """Every figure is read from the store, so a restart of the daemon resets none."""

    def __init__(self, config: FlywheelConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._registry = reg = CollectorRegistry()
        self._work = WorkMetrics(reg)
        run = ["route", "state"]
        self._runs = Gauge(
            "stillhouse_flywheel_runs", "Runs by state, ended ones included.", run, registry=reg
        )
        route = ["route"]
        self._rows = Gauge(
            "stillhouse_flywheel_new_rows", "Usable rows logged since the last run.", route, registry=reg
        )
        self._paused = Gauge("stillhouse_flywheel_paused", "1 while a route is paused.", route, registry=reg)
        self._failures = Gauge(
            "stillhouse_flywheel_failures_in_a_row",
            "Runs that failed since one that did not.",
            route,
            registry=reg,
        )
        self._looks = Gauge(
            "stillhouse_flywheel_look",
            "The latest look: bits beyond chance, fall of the mean grade, lower bound of the bad share.",
            ["route", "kind"],
            registry=reg,
        )
        self._pressure = Gauge(
            "stillhouse_flywheel_pressure", "1 while serving needs the machine.", registry=reg
        )
        self._hours = Gauge(
            "stillhouse_flywheel_hours_in_24h", "Working hours of all runs in 24 hours.", registry=reg
        )
        self._tokens = Gauge(
            "stillhouse_flywheel_teacher_tokens_in_24h",
            "Teacher tokens of all runs in 24 hours.",
            registry=reg,
        )
        self._age = Gauge(
            "stillhouse_flywheel_run_age_seconds",
            "Time since the route's active run was queued; 0 without one.",
            route,
            registry=reg,
        )
        self._budget = Gauge(
            "stillhouse_flywheel_budget",
            "What all runs may take in 24 hours (hours, teacher_tokens); no series where no bound is set.",
            ["resource"],
            registry=reg,
        )
        self._beats = Counter("stillhouse_flywheel_ticks", "Ticks of this daemon.", registry=reg)

    def serve(self) -> None:
        """Open the port, when there is one. Raises: OSError when it is taken."""
        if self._config.metrics_port is not None:
            start_http_server(self._config.metrics_port, addr="127.0.0.1", registry=self._registry)

    def write(self, now: float, pressure: Pressure) -> None:
        """Bring every figure up to date, and the textfile with them."""
        counts = self._store.counts()
        for name, route in self._store.routes().items():
            for state in State:
                self._runs.labels(name, state.value).set(counts.get((name, state.value), 0))
            self._rows.labels(name).set(route.watch.now.usable - route.watch.base.usable)
            self._paused.labels(name).set(route.paused_by is not None)
            self._failures.labels(name).set(route.failures)
            for look in route.watch.last:
                self._looks.labels(name, look.kind).set(look.value)
            active = self._store.active_of(name)
            self._age.labels(name).set(0.0 if active is None else max(0.0, now - active.queued_at))
        budget = self._config.budget
        for resource, bound in (
            ("hours", budget.hours_per_day),
            ("teacher_tokens", budget.teacher_tokens_per_day),
        ):
            if bound is not None:
                self._budget.labels(resource).set(bound)
        spent = self._store.spent(now)
        self._pressure.set(pressure.active)
        self._hours.set(spent.seconds / 3600)
        self._tokens.set(spent.tokens)
        self._beats.inc()
        self._work.write(self._store)
        write_to_textfile(str(self._config.dir / TEXTFILE), self._registry)
