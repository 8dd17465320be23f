"""`make bench BENCH=scale`: what grows with routes, arms, router replicas and versions, and where it breaks.

About five minutes on two idle cores. A finished part is kept in a folder; `--only PART` measures it again,
and the result is written when all parts are there, each row with its commit and the load of the machine:
above its number of cores others were working, and wall-clock times are upper bounds. What a router replica
carries is not measured here: the gateway, serving and soak results say so. Knows nothing about how a part
measures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import Bar, head, write
from contracts.config import write_atomic

Found = tuple[list[dict[str, Any]], list[Bar]]

PARTS = ("scrape", "ledger", "splits", "logs", "registry")
"""Modules of this folder, each with a `run` that returns rows and bars."""


def main() -> int:
    """0 when every bar is met, 1 when one is missed."""
    args = _arguments()
    console = Console()
    for name in args.only or PARTS:
        run: Callable[[], Found] = importlib.import_module(f"benchmarks.scale.{name}").run
        rows, bars = run()
        _show(console, name, rows, bars)
        _keep(args.folder, name, rows, bars)
    rows, bars = _kept(args.folder)
    if missing := [name for name in PARTS if not _file(args.folder, name).exists()]:
        console.print(f"no result yet: {', '.join(missing)} not measured (kept in {args.folder})")
    else:
        console.print(f"written: {write('scale', 'make bench BENCH=scale', bars, rows)}")
    return 0 if all(bar.ok for bar in bars) else 1


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def _keep(folder: Path, part: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """A part's result, until it is measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"load": round(os.getloadavg()[0], 1), "commit": head()}
    found = {"rows": [{**row, **facts} for row in rows], "bars": [bar.model_dump() for bar in bars]}
    write_atomic(_file(folder, part), json.dumps(found))


def _kept(folder: Path) -> Found:
    """What is known of all parts."""
    found = [json.loads(_file(folder, p).read_text()) for p in PARTS if _file(folder, p).exists()]
    rows = [row for one in found for row in one["rows"]]
    return rows, [Bar.model_validate(bar) for one in found for bar in one["bars"]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench-scale"), help="where finished parts are kept"
    )
    return parser.parse_args()


def _show(console: Console, name: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """A part's rows as a table, then its bars."""
    columns = [key for key in rows[0] if key not in ("part", "largest")]
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(str(row.get(key)) for key in columns))
    console.print(table)
    for bar in bars:
        console.print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")


if __name__ == "__main__":
    sys.exit(main())
