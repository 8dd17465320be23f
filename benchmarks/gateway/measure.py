"""One turn of one gateway: is it right, how much does it carry, what does it add, what does it cost.

Knows nothing about other gateways or about bars.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from statistics import median

from benchmarks.gateway.load import Door, check, latencies, paced, percentile, throughput
from benchmarks.gateway.processes import Failed, Process, get

CLIENTS = 32
RATE = 200.0
_LOG_S = 20.0


@dataclass(frozen=True)
class Load:
    """32 clients at once, and one alone."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    cpu_s_per_1000: float
    alone_per_s: float
    """One client, one request at a time."""
    added_p50_ms: float
    """One client: to the end of a whole answer, to a stream's first chunk; the backend's own taken off."""
    added_p99_ms: float


@dataclass(frozen=True)
class Measured:
    """One turn."""

    gateway: str
    what: str
    whole: Load
    stream: Load
    paced_p99_ms: float | None
    """Whole answers at 200 requests a second, nothing taken off. None: not asked, it cannot carry that."""
    rss_mib: float
    unlogged: float | None
    """Requests without a row in the request log; None where there is no log of ours."""


def measure(
    name: str,
    what: str,
    door: Door,
    process: Process,
    backend: Door,
    seconds: float,
    *,
    slow: bool = False,
    ours: bool = False,
) -> Measured:
    """Measure a gateway that is up. Raises Failed when its answers are wrong."""
    check(door)
    whole = _load(door, process, backend, False, seconds)
    stream = _load(door, process, backend, True, seconds)
    p99 = None if slow else percentile(paced(door, False, RATE, seconds), 99)
    rss = process.rss_mib()
    check(door)
    return Measured(name, what, whole, stream, p99, rss, _unlogged(door) if ours else None)


def _load(door: Door, process: Process, backend: Door, stream: bool, seconds: float) -> Load:
    throughput(door, stream, CLIENTS, 1)
    before = process.cpu_s()
    seen = throughput(door, stream, CLIENTS, seconds)
    cpu = process.cpu_s() - before
    # The backend's own latency right before, so that both saw the same minute of the machine.
    base = latencies(backend, stream, seconds / 4)
    alone = latencies(door, stream, seconds / 2)
    return Load(
        requests_per_s=seen.requests_per_s,
        p50_ms=seen.p50_ms,
        p99_ms=seen.p99_ms,
        failed=seen.errors,
        cpu_s_per_1000=cpu / max(1, seen.requests) * 1000,
        alone_per_s=len(alone) / (seconds / 2),
        added_p50_ms=median(alone) - median(base),
        added_p99_ms=percentile(alone, 99) - percentile(base, 99),
    )


def _unlogged(door: Door) -> float:
    """Requests that have no row in the log; waits until the log has written what it holds."""
    deadline = time.monotonic() + _LOG_S
    while time.monotonic() < deadline:
        scrape = get(f"{door.url}/metrics")
        requests, rows = (
            _total(scrape, "stillhouse_requests_total"),
            _total(scrape, "stillhouse_log_rows_total"),
        )
        if requests == rows or _total(scrape, "stillhouse_log_dropped_total"):
            return requests - rows
        time.sleep(0.2)
    raise Failed(f"{door.url}: {requests:.0f} requests but {rows:.0f} rows in the log after {_LOG_S:.0f} s")


def _total(scrape: str, metric: str) -> float:
    return sum(float(v) for v in re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", scrape, re.MULTILINE))
