"""`make bench BENCH=distillation`: what the distillation jobs promise, measured beside TRL and ModelOpt.

About ten minutes on two cores. `--only PART` measures one part and writes nothing. Knows nothing about how a
part measures.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import NotInstalled
from benchmarks.results import Bar, write

Found = tuple[list[dict[str, Any]], list[Bar]]

PARTS = ("parity", "op", "trainers", "cache", "collect_rows")
"""Modules of this folder, each with a `run` that returns rows and bars."""


def measure(name: str, threads: int) -> Found:
    """A part's rows and bars; imported late, because each needs other libraries."""
    run: Callable[..., Found] = importlib.import_module(f"benchmarks.distillation.{name}").run
    return run() if name == "collect_rows" else run(threads)  # Ray Data takes the whole machine


def main() -> int:
    """0 when every bar is met, 1 when one is missed, 2 when it could not be measured."""
    args = _arguments()
    console = Console()
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    try:
        for name in args.only or PARTS:
            some, met = measure(name, args.threads)
            _show(console, name, some, met)
            rows += some
            bars += met
    except NotInstalled as err:
        print(f"benchmarks.distillation: {err}", file=sys.stderr)
        return 2
    if not args.only:
        console.print(f"written: {write('distillation', 'make bench BENCH=distillation', bars, rows)}")
    return 0 if all(bar.ok for bar in bars) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; writes no result")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of every side")
    return parser.parse_args()


def _show(console: Console, name: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """A part's rows as a table of what they share, then its bars."""
    columns = [key for key in rows[0] if key != "part"]
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console.print(table)
    for bar in bars:
        console.print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_cell(one) for one in value[:4])
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
