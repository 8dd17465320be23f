"""`make bench BENCH=soak`: an hour at 50 requests a second while everything around the router changes.

Two router processes before a real vLLM student; meanwhile 20 split changes, key changes and log rotation.
Bars: nothing failed, memory grew by less than 5 %, the request log holds exactly what was sent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.results import Bar, at_most, write
from benchmarks.soak.crowd import Crowd
from benchmarks.soak.rig import Rig

RATE = 50.0
SPLIT_CHANGES = 20
WARM_SHARE = 0.05
"""Memory is compared with what it was after this share of the time: the first minutes fill caches."""


def main() -> int:
    """0 when every bar is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second")
    args = parser.parse_args()
    seconds = args.minutes * 60
    console = Console()
    with tempfile.TemporaryDirectory(prefix="sh-soak-") as folder, Rig(Path(folder)) as rig:
        crowd = Crowd(rig.urls, rig.secret, args.rate)
        crowd.start()
        memory = _soak(rig, crowd, seconds)
        seen = crowd.stop()
        rig.stop_routers()
        rows = rig.log_rows()
    bars, facts = (
        _bars(seen.sent, seen.failed, rows, memory),
        {
            "seconds": round(seconds),
            "rate": args.rate,
            "requests": seen.sent,
            "failed": seen.failed,
            "errors": seen.errors,
            "log_rows": rows,
            "segments": rig.segments,
            "split_changes": rig.version - 1,
            "key_changes": rig.key_changes,
            "rss_mib": memory,
            "p99_ms": round(seen.p99_s() * 1000, 1),
        },
    )
    console.print_json(json.dumps(facts))
    for bar in bars:
        console.print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")
    command = "make bench BENCH=soak" + (f" ({args.minutes:g} minutes)" if args.minutes != 60 else "")
    console.print(f"written: {write('soak', command, bars, [facts])}")
    return 0 if all(b.ok for b in bars) else 1


def _soak(rig: Rig, crowd: Crowd, seconds: float) -> dict[str, list[float]]:
    """Let time pass and change things; MiB of every router after warming up and at the end."""
    every = seconds / (SPLIT_CHANGES + 1)
    began, next_change = time.monotonic(), every
    memory: dict[str, list[float]] = {}
    with Progress() as progress:
        task = progress.add_task("soak", total=seconds)
        while (passed := time.monotonic() - began) < seconds:
            time.sleep(0.5)
            progress.update(
                task, completed=passed, description=f"{crowd.seen.sent} sent, {crowd.seen.failed} failed"
            )
            if not memory and passed >= seconds * WARM_SHARE:
                memory = {name: [mib] for name, mib in rig.memory().items()}
            if passed >= next_change:
                rig.change_split()
                rig.change_keys()
                next_change += every
    for name, mib in rig.memory().items():
        memory[name].append(mib)
    return memory


def _bars(sent: int, failed: int, rows: int, memory: dict[str, list[float]]) -> list[Bar]:
    growth = max((after - before) / before for before, after in memory.values())
    return [
        at_most("requests failed", failed, 0),
        at_most("log rows missing or too many", abs(sent - rows), 0),
        at_most("router memory growth", round(growth, 4), 0.05),
    ]


if __name__ == "__main__":
    sys.exit(main())
