"""Fills the marked blocks of docs/guides/scaling.md from committed results; a test holds the page to them.

Usage: python -m benchmarks.scale.guide [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS
from benchmarks.scale.arithmetic import HEADROOM, Measured, need, size
from serve.router.config import RouterConfig

PAGE = Path(__file__).resolve().parents[2] / "docs/guides/scaling.md"
RATES, ROUTES = (10, 1000, 100_000), 20
HARDWARE = "intel-xeon-2c-24g"
"""Of the machine that all parts were measured on."""

_PENDING = "No result of `make bench BENCH=scale` is committed yet."

Rows = list[dict[str, Any]]


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.{HARDWARE}.json").read_text(encoding="utf-8"))
    return found


def _part(name: str) -> Rows:
    """A part's rows; none while no result of the scale benchmark is committed."""
    if not (RESULTS / f"scale.{HARDWARE}.json").exists():
        return []
    return [row for row in _result("scale")["rows"] if row["part"] == name]


def measured() -> Measured:
    """The figures that the arithmetic multiplies."""
    logs = {row["mode"]: row for row in _part("logs")}
    ledger = max(_part("ledger"), key=lambda row: row["routes"] * (row["store"] == "postgresql"))
    return Measured(
        replica_per_s=replica_per_s(),
        flush_s=float(RouterConfig.model_fields["flush_s"].default),
        poll_s=float(RouterConfig.model_fields["poll_s"].default),
        ledger_row_bytes=ledger["bytes_per_row"],
        log_bytes={mode: row["bytes_per_request"] for mode, row in logs.items()},
        redact_cpu_s=logs["redacted"]["cpu_ms_per_1000"] / 1e6,
        rotate_bytes=logs["full"]["rotate_bytes"],
        rotate_s=logs["full"]["rotate_s"],
        host_series=_part("scrape")[0]["series"],
    )


def replica_per_s() -> float:
    """Streaming requests a second of one router process: the gateway benchmark's, times its share on Ray."""
    result = _result("gateway")
    alone = next(row for row in result["rows"] if row["gateway"] == "Stillhouse router")
    on_ray = next(bar for bar in result["bars"] if bar["what"].startswith("on Ray Serve / alone, streaming"))
    return (
        float(alone["stream_requests_per_s"]) / int(result["hardware"]["cores"]) * min(1.0, on_ray["value"])
    )


def _needs() -> str:
    if not _part("ledger"):
        return _PENDING
    found = [need(rate, ROUTES, measured()) for rate in RATES]
    lines = {
        "router replicas (processes)": [f"{n.replicas:,}" for n in found],
        "ledger rows/s (20 routes in a rollout)": [f"{n.ledger_rows_per_s:,.0f}" for n in found],
        "ledger in the store: an hour of it": [size(n.ledger_bytes) for n in found],
        "store: queries/s of the routers": [f"{n.queries_per_s:,.0f}" for n in found],
        "store: connections of the routers": [f"{n.connections:,}" for n in found],
        "request log a day, mode full": [size(n.log_bytes_per_day["full"]) for n in found],
        "request log a day, mode redacted": [size(n.log_bytes_per_day["redacted"]) for n in found],
        "request log a day, mode metadata": [size(n.log_bytes_per_day["metadata"]) for n in found],
        "log segments an hour": [f"{n.segments_per_hour:,.0f}" for n in found],
        "cores for redacting": [f"{n.redact_cores:,.2g}" for n in found],
        "metrics series of the routers, 4 a host": [f"{n.series:,}" for n in found],
    }
    head = "| | " + " | ".join(f"{rate:,} req/s" for rate in RATES) + " |"
    return "\n".join(
        [head, "|---" * (len(RATES) + 1) + "|", *(f"| {k} | {' | '.join(v)} |" for k, v in lines.items())]
    )


def _router() -> str:
    one = replica_per_s()
    return (
        f"One router process carries {one:,.0f} streaming requests a second on Ray Serve; planned with "
        f"{HEADROOM:.0%} of that, {one * HEADROOM:,.0f}."
    )


def _controller() -> str:
    bars = _result("decisions")["bars"]
    tick = next(bar for bar in bars if bar["what"].startswith("decide() for 1,000 rollouts"))
    return (
        f"A tick in which 1,000 rollouts of five metrics are all due takes {tick['value']:.2g} s "
        "(`make bench BENCH=decisions`, on SQLite)."
    )


def _table(rows: Rows, columns: dict[str, str]) -> str:
    if not rows:
        return _PENDING
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def blocks() -> dict[str, str]:
    """Name of a block → its Markdown."""
    return {
        "router": _router(),
        "needs": _needs(),
        "scrape": _table(
            _part("scrape"),
            {"what": "one host's folder", "series": "series", "bytes": "bytes",
             "first_ms": "first scrape (ms)", "p50_ms": "p50 (ms)", "p99_ms": "p99 (ms)",
             "cpu_ms": "processor time (ms)",
             "load": "load of the machine",
             "library_ms": "prometheus_client's collector (ms)"},
        ),
        "ledger": _table(
            _part("ledger"),
            {"store": "store", "routes": "routes in a rollout", "rows_per_round": "rows a flush of all",
             "round_s": "the flush (s)", "round_cpu_s": "its processor time (s)",
             "tick_reading_s": "tick that only reads (s)", "tick_reading_cpu_s": "its processor time (s)",
             "tick_due_cpu_s": "tick, all due: processor time (s)",
             "bytes_per_row": "bytes a row", "load": "load of the machine"},
        ),
        "controller": _controller(),
        "splits": _table(
            _part("splits"),
            {"store": "store", "replicas": "router replicas", "p50_s": "p50 (s)", "p99_s": "p99 (s)",
             "max_s": "max (s)", "store_errors": "reads and writes refused",
             "unseen": "changes not seen", "went_back": "versions that went back",
             "queries_per_s": "queries/s", "load": "load of the machine"},
        ),
        "log": _table(
            _part("logs"),
            {"mode": "mode", "bytes_per_request": "bytes a request", "rows_per_s": "rows/s",
             "mb_per_s": "MB/s", "cpu_ms_per_1000": "processor time of 1,000 rows (ms)"},
        ),
        "registry": _table(
            _part("registry"),
            {"versions": "versions", "get_s": "get (s)", "get_alias_s": "get by alias (s)",
             "set_alias_s": "set an alias (s)", "history_s": "history (s)", "publish_s": "publish (s)"},
        ),
    }  # fmt: skip


def filled(text: str, made: dict[str, str]) -> str:
    """A page with its blocks as they should be. Raises ValueError for a block that the page lacks."""
    for name, block in made.items():
        start, end = f"<!-- scale:{name}:start -->", f"<!-- scale:{name}:end -->"
        if start not in text or end not in text:
            raise ValueError(f"the page has no block {name!r}")
        before, rest = text.split(start)
        text = f"{before}{start}\n{block}\n{end}{rest.split(end)[1]}"
    return text


def rendered() -> str:
    """The page as it should be."""
    return filled(PAGE.read_text(encoding="utf-8"), blocks())


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if rendered() == PAGE.read_text(encoding="utf-8") else "scaling.md is out of date: run me")
    PAGE.write_text(rendered(), encoding="utf-8")
