"""Does serving need the machine? The machine's own figures, and a router's metrics.

A look that cannot be had (the router is down) says nothing. Knows nothing about runs but how much processor
time they took.
"""

from __future__ import annotations

import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from http.client import HTTPException
from typing import NamedTuple

import psutil

from contracts.config import Record
from distill_jobs.flywheel.config import PressureConfig

_TIMEOUT_S = 3.0
_MAX_REPLY = 16 << 20
_GB = 1e9


class Figures(NamedTuple):
    """One look. None: not known."""

    busy: float | None = None
    """Share of the processors that others than our runs keep busy."""
    free_gb: float | None = None
    p99_s: float | None = None
    queue: float | None = None


class Pressure(Record):
    """What looks have added up to."""

    over: int = 0
    """Looks in a row with a bound broken."""
    last_over_at: float | None = None
    active: bool = False
    why: str = ""


def over(config: PressureConfig, seen: Figures) -> list[str]:
    """The bounds that a look breaks, as sentences; what is not known breaks none."""
    found = []
    if config.busy is not None and seen.busy is not None and seen.busy > config.busy:
        found.append(f"others use {seen.busy:.0%} of the processors (bound {config.busy:.0%})")
    if (
        config.free_memory_gb is not None
        and seen.free_gb is not None
        and seen.free_gb < config.free_memory_gb
    ):
        found.append(f"{seen.free_gb:.1f} GB of memory are free (bound {config.free_memory_gb:g})")
    if config.p99_s is not None and seen.p99_s is not None and seen.p99_s > config.p99_s:
        found.append(f"p99 is {seen.p99_s:.3g} s (bound {config.p99_s:g})")
    if config.queue is not None and seen.queue is not None and seen.queue > config.queue:
        found.append(f"{config.queue_metric} is {seen.queue:g} (bound {config.queue:g})")
    return found


def judge(config: PressureConfig, before: Pressure, seen: Figures, now: float) -> Pressure:
    """Pressure begins after `looks` looks in a row over a bound and ends after `calm_s` without one."""
    broken = over(config, seen)
    if broken:
        count = before.over + 1
        return Pressure(
            over=count,
            last_over_at=now,
            active=before.active or count >= config.looks,
            why="; ".join(broken),
        )
    last = before.last_over_at
    still = before.active and last is not None and now - last < config.calm_s
    return Pressure(last_over_at=last, active=still, why=before.why if still else "")


class Gauge:
    """Takes looks; what is counted over time is counted since the last one."""

    def __init__(self, config: PressureConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._cpu: tuple[float, float, float] | None = None
        self._buckets: dict[float, float] = {}

    def look(self, ours_s: float) -> Figures:
        """`ours_s`: processor seconds that our runs' processes took so far."""
        p99, queue = self._router()
        busy = self._busy(ours_s)
        return Figures(busy, psutil.virtual_memory().available / _GB, p99, queue)

    def _busy(self, ours_s: float) -> float | None:
        times = psutil.cpu_times()
        worked = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        # Linux counts a guest's time in user time too.
        worked -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        before, self._cpu = self._cpu, (self._clock(), worked, ours_s)
        if before is None or self._cpu[0] - before[0] <= 0:
            return None
        room = (self._cpu[0] - before[0]) * (psutil.cpu_count() or 1)
        ours = max(0.0, ours_s - before[2])  # a run that ended takes its seconds with it
        return min(1.0, max(0.0, (worked - before[1] - ours) / room))

    def _router(self) -> tuple[float | None, float | None]:
        if self._config.metrics_url is None:
            return None, None
        try:
            with urllib.request.urlopen(self._config.metrics_url, timeout=_TIMEOUT_S) as reply:
                text = reply.read(_MAX_REPLY).decode("utf-8", "replace")
            buckets, queue = read_metrics(text, self._config.latency_metric, self._config.queue_metric)
        except (OSError, urllib.error.URLError, HTTPException, ValueError):
            return None, None  # a router that cannot be asked needs no room either
        before, self._buckets = self._buckets, buckets
        if not before:
            return None, queue
        return quantile(since(before, buckets), 0.99, self._config.min_requests), queue


def read_metrics(text: str, histogram: str, gauge: str) -> tuple[dict[float, float], float | None]:
    """(upper edge → cumulative count over all series, sum of a gauge's series) of Prometheus text.

    Raises: ValueError when it is not Prometheus text.
    """
    from prometheus_client.parser import text_string_to_metric_families

    buckets: dict[float, float] = {}
    total: float | None = None
    for family in text_string_to_metric_families(text):
        if family.name not in (histogram, gauge):
            continue
        for sample in family.samples:
            if sample.name == f"{histogram}_bucket":
                edge = float(sample.labels["le"])
                buckets[edge] = buckets.get(edge, 0.0) + sample.value
            elif sample.name == gauge:
                total = (total or 0.0) + sample.value
    return buckets, total


def since(before: dict[float, float], after: dict[float, float]) -> dict[float, float]:
    """What came between two looks; after a restart of the router, which counts from zero, everything."""
    if any(after.get(edge, 0.0) < count for edge, count in before.items()):
        return after
    return {edge: count - before.get(edge, 0.0) for edge, count in after.items()}


def quantile(buckets: dict[float, float], q: float, at_least: int) -> float | None:
    """Upper edge of the bucket that holds the quantile; infinity for the overflow, None with too few."""
    total = max(buckets.values(), default=0.0)
    if total < at_least:
        return None
    return next((edge for edge in sorted(buckets) if buckets[edge] >= q * total), math.inf)


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Processor seconds that processes, and their children that ended, took."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it ended meanwhile; its parent has its seconds
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
