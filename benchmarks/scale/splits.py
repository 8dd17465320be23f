"""How long a new split takes to reach 200 router replicas, each polling the store with the router's own code.

Every replica is a real `StateSync` with a table, pools and a ledger of its own, all on one event loop; 200 of
them share this machine's cores with the store, so what is seen is an upper bound of what 200 machines see.
On SQLite each has its own connections, as router processes have; on PostgreSQL they share a pool, as behind
a connection pooler: 200 replicas of two connections each are more than a server takes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import OperationalError

from benchmarks.results import Bar, at_most
from benchmarks.scale.stores import STORES, stores
from contracts.routes import RouteSettings
from contracts.traffic import Split, Upstream
from serve.router import sync
from serve.router.config import RouterConfig
from serve.router.ledger import Ledger
from serve.router.metrics import Metrics
from serve.router.pool import Pools
from serve.router.table import RouteTable
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

REPLICAS, ROUTES, CHANGES, EVERY_S = (16, 50, 200), 20, 10, 0.7
ROUTE = "route-00"
_ERRORS = "stillhouse_state_errors_total"
_POOL, _PATIENCE_S = 40, 30.0


def run() -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row for each store and number of replicas."""
    logging.getLogger("stillhouse.router").setLevel(logging.CRITICAL)  # its errors are counted instead
    rows = []
    for kind in STORES:
        with stores(kind) as new_url:
            for replicas in REPLICAS:
                found = asyncio.run(_propagate(new_url(), replicas))
                rows.append({"part": "splits", "store": kind, "replicas": replicas, **found})
    backwards = sum(row["went_back"] for row in rows)
    unseen = sum(row["unseen"] for row in rows)
    errors = sum(row["store_errors"] for row in rows if row["store"] == "postgresql")
    bars = [
        at_most("split versions that went back in a router", backwards, 0),
        at_most("split changes that a router did not see", unseen, 0),
        at_most("reads and writes that PostgreSQL refused up to 200 router replicas", errors, 0),
    ]
    return rows, bars


class Watched(RouteTable):
    """A route table that notes when it took over which version."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(metrics)
        self._clock = clock
        self.seen: list[tuple[float, int]] = []

    def apply(self, splits: dict[str, Split], settings: dict[str, RouteSettings] | None = None) -> bool:
        """Take over, and note what is in force afterwards."""
        changed = super().apply(splits, settings)
        route = self.get(ROUTE)
        if changed and route is not None:
            self.seen.append((self._clock(), route.split.version))
        return changed


def delays(put: dict[int, float], seen: list[tuple[float, int]]) -> list[float]:
    """Seconds from each version's writing until a router had it or a later one; one it never had has none."""
    found = []
    for version, at in put.items():
        had = [when for when, what in seen if what >= version]
        if had:
            found.append(max(0.0, min(had) - at))
    return found


def went_back(seen: list[tuple[float, int]]) -> int:
    """How often a router went to an older version."""
    return sum(after < before for (_, before), (_, after) in itertools.pairwise(seen))


async def _propagate(url: str, replicas: int) -> dict[str, Any]:
    engine = open_state(url)
    state = TrafficState(engine)
    for n in range(ROUTES):
        state.put_split(_split(f"route-{n:02d}", 1))
    shared = None if url.startswith("sqlite") else create_engine(url, pool_size=_POOL, max_overflow=0)
    asked = [0]

    def count(*_: object) -> None:
        asked[0] += 1

    def opened(state_url: str) -> Engine:
        made = shared or open_state(state_url)
        if made is not shared or not event.contains(made, "before_cursor_execute", count):
            event.listen(made, "before_cursor_execute", count)
        return made

    metrics = Metrics()
    tables = [Watched(metrics) for _ in range(replicas)]
    with patch.object(sync, "open_state", opened):
        syncs = [_replica(url, n, table, metrics) for n, table in enumerate(tables)]
        await asyncio.gather(*(one.start() for one in syncs))
        before, began = asked[0], time.perf_counter()
        put, refused = await _change(state)
        queries_per_s = (asked[0] - before) / (time.perf_counter() - began)
        await _settled(tables, max(put, default=1))
        await asyncio.gather(*(one.stop() for one in syncs))
    for made in (engine, shared):
        if made is not None:
            made.dispose()
    took = sorted(d for table in tables for d in delays(put, table.seen))
    return {
        "routes": ROUTES,
        "changes": CHANGES,
        "poll_s": RouterConfig(state_url=url).poll_s,
        **_spread(took),
        "changes_refused": refused,
        "store_errors": _errors(await metrics.scrape()),
        "unseen": replicas * len(put) - len(took),
        "went_back": sum(went_back(table.seen) for table in tables),
        "queries_per_s": round(queries_per_s),
    }


def _spread(took: list[float]) -> dict[str, float | None]:
    """Median, p99 and the longest; nothing where nothing arrived."""
    if not took:
        return {"p50_s": None, "p99_s": None, "max_s": None}
    at = {"p50_s": len(took) // 2, "p99_s": int(len(took) * 0.99), "max_s": -1}
    return {name: round(took[n], 3) for name, n in at.items()}


def _replica(url: str, number: int, table: RouteTable, metrics: Metrics) -> sync.StateSync:
    config, name = RouterConfig(state_url=url), f"router-{number:03d}"
    return sync.StateSync(config, name, table, Pools(config), Ledger(name), metrics)


async def _change(state: TrafficState) -> tuple[dict[int, float], int]:
    """Write new versions, one after the other: when each was in the store, and how often it was refused."""
    put, refused = {}, 0
    version, until = 2, time.perf_counter() + 2 * _PATIENCE_S
    while version < CHANGES + 2 and time.perf_counter() < until:
        await asyncio.sleep(EVERY_S)
        try:
            await asyncio.to_thread(state.put_split, _split(ROUTE, version))
        except OperationalError:  # SQLite, when its lock was not to be had for ten seconds
            refused += 1
            continue
        put[version] = time.perf_counter()
        version += 1
    return put, refused


def _errors(scrape: bytes) -> int:
    """Failed reads and writes of all routers."""
    lines = scrape.decode().splitlines()
    return int(float(next(line for line in lines if line.startswith(f"{_ERRORS} ")).split()[1]))


async def _settled(tables: list[Watched], version: int) -> None:
    """Until every router has the last version, or half a minute has passed."""
    until = time.perf_counter() + _PATIENCE_S
    while time.perf_counter() < until and any(_newest(t) < version for t in tables):
        await asyncio.sleep(0.1)


def _newest(table: Watched) -> int:
    return table.seen[-1][1] if table.seen else 0


def _split(route: str, version: int) -> Split:
    stable = Upstream(name="teacher", model="teacher", url="http://127.0.0.1:9000")
    student = Upstream(name="student", model="student", url="http://127.0.0.1:9001")
    return Split(
        route=route, version=version, salt="s", stable=stable, canary=student, weight=version / (CHANGES + 2)
    )
