"""`make bench BENCH=decisions`: simulated traffic through the shipped decide(), beside the peers' rules.

Thousands of rollouts a row in setting S1, in two processes; about 15 minutes. `--quick` is 200 runs a row and
writes nothing. Knows nothing about what a row is made of.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import pickle
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.decisions import tick
from benchmarks.decisions.rows import BATCHES, COST, MULTIPLE, SCENARIOS, Found, Row, bars, rows
from benchmarks.decisions.setting import RUNS, SEED
from benchmarks.results import write

QUICK = 200
_PLAIN_COST = 10
_CHUNK_COST = 2000


class Work(NamedTuple):
    """Some runs of one scenario."""

    scenario: str
    seeds: range


def main() -> int:
    """0 when every bar is met, 1 when one is missed."""
    args = _arguments()
    runs = QUICK if args.quick else args.runs
    console = Console()
    tick_s = tick.seconds()
    console.print(f"one tick of 1,000 rollouts x 5 metrics: {tick_s:.3f} s, all due, on SQLite")
    if args.reuse:
        found = pickle.loads(args.reuse.read_bytes())
    else:
        found = _simulate(runs, args.processes, console)
    if args.keep:
        args.keep.write_bytes(pickle.dumps(found))
    table = rows(found, runs)
    console.print(_table(table))
    met = bars(found, tick_s)
    for bar in met:
        console.print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")
    if runs >= RUNS:
        console.print(f"written: {write('decisions', 'make bench BENCH=decisions', met, table)}")
    return 0 if all(b.ok for b in met) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} runs a row; writes no result")
    parser.add_argument(
        "--runs", type=int, default=RUNS, help=f"runs a row; fewer than {RUNS} write no result"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep every run's outcome in this file")
    parser.add_argument("--reuse", type=Path, help="outcomes kept before: only sum up, and time the tick")
    return parser.parse_args()


def _simulate(runs: int, processes: int, console: Console) -> Found:
    """Every scenario's outcomes, in the order of their seeds whichever process was faster."""
    work = list(_work(runs))
    done: dict[str, dict[int, list[Any]]] = defaultdict(dict)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, multiprocessing.Pool(processes, gc.disable) as pool:
        total = progress.add_task("simulating", total=sum(_cost(w) for w in work))
        for item, ends in pool.imap_unordered(_run, work):
            done[item.scenario][item.seeds.start] = ends
            progress.update(total, advance=_cost(item), description=item.scenario)
    return {
        name: [e for start in sorted(done[name]) for e in done[name][start]]
        for name in (*BATCHES, *SCENARIOS)
    }


def _work(runs: int) -> Iterator[Work]:
    """The longest first, so that no process is left with one at the end."""
    for name in sorted((*BATCHES, *SCENARIOS), key=lambda n: -COST.get(n, _PLAIN_COST)):
        count = math.ceil(runs * MULTIPLE.get(name, 1))
        size = 200 if name in BATCHES else max(1, _CHUNK_COST // COST.get(name, _PLAIN_COST))
        for first in range(0, count, size):
            yield Work(name, range(SEED + first, SEED + min(first + size, count)))


def _run(work: Work) -> tuple[Work, list[Any]]:
    if work.scenario in BATCHES:
        return work, BATCHES[work.scenario](work.seeds)
    return work, [SCENARIOS[work.scenario](seed) for seed in work.seeds]


def _cost(work: Work) -> int:
    return len(work.seeds) * COST.get(work.scenario, _PLAIN_COST)


def _table(table: list[Row]) -> Table:
    made = Table(
        "controller", "what", "runs", "%", "± MC", "median", "p90", title=f"setting S1, seeds from {SEED}"
    )
    for row in table:
        share = (f"{row['percent']:.1f}", f"{row['mc_error']:.1f}")
        ends = ("-" if row[k] is None else f"{row[k]:g}" for k in ("median", "p90"))
        made.add_row(row["controller"], row["what"], str(row["runs"]), *share, *ends)
    return made


if __name__ == "__main__":
    sys.exit(main())
