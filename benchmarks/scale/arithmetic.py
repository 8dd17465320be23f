"""From measured figures to what a rate of requests needs: replicas, writes, log volume, series. Pure.

Each figure is a product of what one request, replica or host was measured to need; where two bounds hold, the
smaller counts. Knows nothing about where the figures come from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from serve.rollout.sweep import KEPT_S

DAY_S, HOUR_S = 86_400, 3600.0
HEADROOM = 0.5
"""Share of its measured throughput that a replica is planned with."""
SPARE = 2
"""Fewest router replicas: one may be lost or replaced."""
ARMS = 2
"""Ledger rows of a route in a rollout and a flush: one for each arm that is compared."""
POLL_QUERIES = 3
"""Splits, settings, endpoints."""
FLUSH_QUERIES = 2
"""Evidence and report."""
CONNECTIONS = 2
"""Of one router process: it reads and writes in two threads."""


class Measured(NamedTuple):
    """What the benchmarks say."""

    replica_per_s: float
    """Streaming requests a second of one router process on Ray Serve."""
    flush_s: float
    poll_s: float
    ledger_row_bytes: float
    log_bytes: dict[str, float]
    """Policy → bytes a request."""
    redact_cpu_s: float
    """Processor seconds to redact and write one request's row."""
    rotate_bytes: float
    rotate_s: float
    host_series: int
    """Series of one host with 20 routes of 3 arms."""


class Need(NamedTuple):
    """What a rate needs."""

    rate: float
    replicas: int
    ledger_rows_per_s: float
    ledger_bytes: float
    """In the store at any time: the controller sweeps what is older than `KEPT_S`."""
    queries_per_s: float
    connections: int
    log_bytes_per_day: dict[str, float]
    segments_per_hour: float
    redact_cores: float
    series: int


def need(rate: float, routes: int, measured: Measured, per_host: int = 4) -> Need:
    """What `rate` requests a second over `routes` routes need, all of them in a rollout.

    Args:
        per_host: router replicas that share a host, and with it one scrape target.
    """
    replicas = max(SPARE, math.ceil(rate / (measured.replica_per_s * HEADROOM)))
    rows = ledger_rows(rate, replicas, routes, measured.flush_s)
    each = rate / replicas * measured.log_bytes["full"]
    return Need(
        rate=rate,
        replicas=replicas,
        ledger_rows_per_s=rows,
        ledger_bytes=rows * measured.ledger_row_bytes * KEPT_S,
        queries_per_s=replicas * (POLL_QUERIES / measured.poll_s + FLUSH_QUERIES / measured.flush_s),
        connections=replicas * CONNECTIONS,
        log_bytes_per_day={mode: rate * size * DAY_S for mode, size in measured.log_bytes.items()},
        segments_per_hour=replicas * segments(each, measured.rotate_bytes, measured.rotate_s),
        redact_cores=rate * measured.redact_cpu_s,
        series=math.ceil(replicas / per_host) * measured.host_series,
    )


def ledger_rows(rate: float, replicas: int, routes: int, flush_s: float) -> float:
    """Rows a second: no more than requests, and no more than one a replica, route, arm and flush."""
    return min(rate, replicas * routes * ARMS / flush_s)


def segments(bytes_per_s: float, rotate_bytes: float, rotate_s: float) -> float:
    """Segments an hour of one replica: cut by age, or by size where that comes first."""
    return (
        HOUR_S / rotate_s if bytes_per_s * rotate_s <= rotate_bytes else bytes_per_s * HOUR_S / rotate_bytes
    )


def size(bytes_: float) -> str:
    """Bytes as people say them, in steps of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if bytes_ < 1000:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.3g} PB"
