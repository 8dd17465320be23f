"""The gateway benchmark's rows, table and bars. Measures nothing."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gateway.gateways import BARE, BARE_ON_RAY, LITELLM, OURS, OURS_ON_RAY, VLLM_ROUTER
from benchmarks.gateway.measure import Measured
from benchmarks.results import Bar, at_least, at_most


def line(turn: Measured) -> str:
    """One turn in one line."""
    paced = "–" if turn.paced_p99_ms is None else f"{turn.paced_p99_ms:.2f}"
    return (
        f"{turn.gateway}: {turn.whole.requests_per_s:,.0f} req/s whole, {turn.stream.requests_per_s:,.0f} "
        f"streaming; adds {turn.whole.added_p50_ms:.2f} / {turn.stream.added_p50_ms:.2f} ms; "
        f"p99 at 200/s {paced} ms"
    )


def rows(turns: list[Measured]) -> list[dict[str, Any]]:
    """One row a gateway: medians over its turns, and the range of what varies most."""
    found = []
    for name in dict.fromkeys(t.gateway for t in turns):
        mine = [asdict(t) for t in turns if t.gateway == name]
        row: dict[str, Any] = {"gateway": name, "what": mine[0]["what"], "rounds": len(mine)}
        for kind in ("whole", "stream"):
            for field in mine[0][kind]:
                row[f"{kind}_{field}"] = _middle([m[kind][field] for m in mine])
            speeds = [m[kind]["requests_per_s"] for m in mine]
            row[f"{kind}_requests_per_s_range"] = [min(speeds), max(speeds)]
            row[f"{kind}_failed"] = sum(m[kind]["failed"] for m in mine)
        for field in ("paced_p99_ms", "rss_mib"):
            row[field] = _middle([m[field] for m in mine])
        row["unlogged"] = None if mine[0]["unlogged"] is None else sum(m["unlogged"] for m in mine)
        found.append(row)
    return found


def _middle(values: list[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return median(there) if there else None


_COLUMNS = (
    "gateway", "whole req/s", "×", "streaming req/s", "×", "1 client adds, ms p50", "p99 at 200/s",
    "CPU s / 1000", "RSS MiB",
)  # fmt: skip


def show(found: list[dict[str, Any]]) -> None:
    """The table of ratios: everything against vllm-router, which has 1.00."""
    console = Console(width=150)
    table = Table(
        title="32 clients, 34-chunk streams and whole answers; medians (range)", title_justify="left"
    )
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "gateway" else "right")
    peer = next((r for r in found if r["gateway"] == VLLM_ROUTER), None)
    for row in found:
        cells = [row["gateway"]]
        for kind in ("whole", "stream"):
            low, high = row[f"{kind}_requests_per_s_range"]
            speed = row[f"{kind}_requests_per_s"]
            cells.append(f"{speed:,.0f} ({low:,.0f}–{high:,.0f})")
            cells.append("" if peer is None else f"{speed / peer[f'{kind}_requests_per_s']:.2f}")
        paced = row["paced_p99_ms"]
        cells += [
            f"{row['whole_added_p50_ms']:.2f} / {row['stream_added_p50_ms']:.2f}",
            "–" if paced is None else f"{paced:.2f} ms",
            f"{row['whole_cpu_s_per_1000']:.3f} / {row['stream_cpu_s_per_1000']:.3f}",
            f"{row['rss_mib']:,.0f}",
        ]
        table.add_row(*cells)
    console.print(table)
    console.print(
        "Two values: whole answers / streams (to the first chunk). On Ray, Ray's processes count too."
    )


def bars(found: list[dict[str, Any]]) -> list[Bar]:
    """What was promised, as far as the gateways it speaks of were measured."""
    by = {r["gateway"]: r for r in found}

    def ratio(kind: str, one: str, other: str) -> float:
        return float(by[one][f"{kind}_requests_per_s"] / by[other][f"{kind}_requests_per_s"])

    made: list[Bar] = []
    if {OURS, VLLM_ROUTER} <= by.keys():
        made.append(
            at_least(
                "streaming req/s, 32 clients, / vllm-router", ratio("stream", OURS, VLLM_ROUTER), 1.2, " ×"
            )
        )
        made.append(
            at_least("whole req/s, 32 clients, / vllm-router", ratio("whole", OURS, VLLM_ROUTER), 0.4, " ×")
        )
    if {OURS, LITELLM} <= by.keys():
        made.append(at_least("whole req/s, 32 clients, / LiteLLM", ratio("whole", OURS, LITELLM), 25, " ×"))
    if OURS in by:
        ours = by[OURS]
        made += [
            at_most("added p50, 1 client, whole answer", ours["whole_added_p50_ms"], 0.35, " ms"),
            at_most("added p50, 1 client, first chunk", ours["stream_added_p50_ms"], 0.5, " ms"),
            at_most("p99 at 200 req/s", ours["paced_p99_ms"], 5, " ms"),
            at_most("requests failed", ours["whole_failed"] + ours["stream_failed"], 0),
            at_most("requests without a row in the log", ours["unlogged"], 0),
        ]
    if {OURS, OURS_ON_RAY} <= by.keys():
        for kind, name in (("stream", "streaming"), ("whole", "whole")):
            what = f"on Ray Serve / alone, {name} req/s"
            if {BARE, BARE_ON_RAY} <= by.keys():
                what += f" (a bare proxy: {ratio(kind, BARE_ON_RAY, BARE):.2f})"
            made.append(at_least(what, ratio(kind, OURS_ON_RAY, OURS), 0.5, " ×"))
    return made
