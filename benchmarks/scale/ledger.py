"""The evidence ledger with 200 router replicas: what they write, and what a controller reads of it.

Each replica is a real `Ledger` whose entries go the way of `StateSync._write`: cut, append, report. All 200
flushes of a second are a round, run by a few threads. A store keeps up while a round needs less of a core
than the flush interval: processor time of writers and server together, because the machine may be shared.
After each round the shipped Controller ticks: once with nothing due (it reads what was appended), at the end
with every rollout due.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import psutil

from benchmarks.decisions.tick import LOOK_S, TickWorld, build_in
from benchmarks.results import Bar, at_least
from benchmarks.scale.stores import STORES, ledger_bytes, stores
from serve.rollout.sweep import AT_ONCE
from serve.router.config import RouterConfig
from serve.router.ledger import EvidenceKey, Ledger
from serve.state.traffic import RouterReport, TrafficState

REPLICAS, ROUTES, ROUNDS, THREADS, BAR = 200, (1, 5, 20, 60), 2, 4, 5
FLUSH_S = float(RouterConfig.model_fields["flush_s"].default)


def run() -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row for each store and number of routes in a rollout."""
    rows = []
    for kind in STORES:
        with stores(kind) as new_url:
            rows += [{"part": "ledger", "store": kind, **_measure(new_url(), routes)} for routes in ROUTES]
    bars = [
        at_least(
            f"routes in a rollout whose evidence, of 200 router replicas, a core stores in time, {kind}",
            knee([row for row in rows if row["store"] == kind], FLUSH_S),
            BAR,
        )
        for kind in STORES
    ]
    return rows, bars


def knee(rows: list[dict[str, Any]], flush_s: float) -> int:
    """The most routes (of those measured) whose rounds need no more of a core than the interval."""
    return max((row["routes"] for row in rows if row["round_cpu_s"] <= flush_s), default=0)


class Writers:
    """The router replicas of a simulation."""

    def __init__(self, world: TickWorld, replicas: int) -> None:
        self._traffic = TrafficState(world.engine)
        versions = {route: split.version for route, split in self._traffic.splits().items()}
        self._keys = [
            EvidenceKey(route, rollout_id, arm, versions[route])
            for route, rollout_id in world.ids.items()
            for arm in ("stable", "canary")
        ]
        self._ledgers = {f"router-{n:03d}": Ledger(f"router-{n:03d}") for n in range(replicas)}
        self._versions = versions

    def count(self) -> None:
        """Every replica answers a request of every arm of every route."""
        for ledger in self._ledgers.values():
            for key in self._keys:
                ledger.count(key, failed=False, ttft_s=0.12, e2e_s=0.9)

    def flush(self, pool: ThreadPoolExecutor) -> int:
        """All replicas write; returns the ledger's new rows."""
        return sum(pool.map(self._write, self._ledgers))

    def _write(self, replica: str) -> int:
        ledger = self._ledgers[replica]
        entries = ledger.cut()
        self._traffic.append_ledger(entries)
        ledger.stored(entries)
        self._traffic.report_router(RouterReport(replica=replica, versions=self._versions))
        return len(entries)


def _measure(url: str, routes: int) -> dict[str, Any]:
    """One empty store, one number of routes."""
    with ThreadPoolExecutor(THREADS) as pool:
        world = build_in(url, routes)
        try:
            return _rounds(world, Writers(world, REPLICAS), pool)
        finally:
            world.engine.dispose()


def _rounds(world: TickWorld, writers: Writers, pool: ThreadPoolExecutor) -> dict[str, Any]:
    assert world.controller.tick()
    before, rows, took, cpu, read = ledger_bytes(world.engine), 0, [], [], []
    for _ in range(ROUNDS):
        writers.count()
        began, used = time.perf_counter(), _cpu_s()
        rows += writers.flush(pool)
        took.append(time.perf_counter() - began)
        cpu.append(_cpu_s() - used)
        read.append(_tick_s(world))
    grown = ledger_bytes(world.engine) - before
    world.clock.now += LOOK_S + 1.0
    due_s, due_cpu_s = _tick_s(world)
    traffic, pruned, began = TrafficState(world.engine), 0, time.perf_counter()
    while gone := traffic.prune_ledger(time.time() + 1, {}, AT_ONCE):
        pruned += gone
    return {
        "replicas": REPLICAS,
        "routes": len(world.ids),
        "rows_per_round": rows // ROUNDS,
        "round_s": round(median(took), 4),
        "round_cpu_s": round(median(cpu), 4),
        "rows_per_s": round(rows / sum(took)),
        "flush_ms": round(1000 * median(took) / REPLICAS, 3),
        "tick_reading_s": round(median(wall for wall, _ in read), 4),
        "tick_reading_cpu_s": round(median(cpu for _, cpu in read), 4),
        "tick_due_s": round(due_s, 4),
        "tick_due_cpu_s": round(due_cpu_s, 4),
        "bytes_per_row": round(grown / rows),
        "pruned_rows_per_s": round(pruned / (time.perf_counter() - began)),
    }


def _tick_s(world: TickWorld) -> tuple[float, float]:
    """Seconds of a tick: wall, and this process's processor time."""
    began, used = time.perf_counter(), _cpu_s()
    assert world.controller.tick()
    return time.perf_counter() - began, _cpu_s() - used


def _cpu_s() -> float:
    """Processor seconds of this process and of the store's server, when it has one."""
    mine = psutil.Process()
    times = [one.cpu_times() for one in (mine, *mine.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))
