"""`make bench BENCH=compression`: what compression promises, every artifact as vLLM serves it.

A finished part is kept in a folder, and what a part finished when it was stopped is kept too; `--only PART`
measures it again, and the result is written when all parts that have bars are there, each row with the commit
it was measured at. Knows nothing about how a part measures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import Bar, head, write
from contracts.config import write_atomic

Found = tuple[list[dict[str, Any]], list[Bar]]

PARTS = ("formats", "mixed", "shrink", "qad", "speculative", "tune", "best", "early_exit")
"""Modules of this folder, each with `run(threads, folder, quick)` that returns rows and bars."""
STUDIES = ("early_exit",)
"""Parts without a bar: what is promised can be written without them."""


def main() -> int:
    """0 when every bar is met, 1 when one is missed."""
    args = _arguments()
    console = Console()
    missed = False
    for name in args.only or PARTS:
        run: Callable[..., Found] = importlib.import_module(f"benchmarks.compression.{name}").run
        rows, bars = run(args.threads, args.folder / ("quick" if args.quick else "full"), args.quick)
        _show(console, name, rows, bars)
        missed = missed or not all(bar.ok for bar in bars)
        if not args.quick:
            _keep(args.folder, name, rows, bars)
    if args.quick:
        return int(missed)
    rows, bars = _kept(args.folder)
    missing = [name for name in PARTS if not _file(args.folder, name).exists()]
    if missing:
        console.print(f"not measured: {', '.join(missing)} (the others are kept in {args.folder})")
    if set(missing) <= set(STUDIES):
        console.print(f"written: {write('compression', 'make bench BENCH=compression', bars, rows)}")
    return 0 if all(bar.ok for bar in bars) else 1


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def _keep(folder: Path, part: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """A part's result, until it is measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"rows": [{**row, "commit": head()} for row in rows], "bars": [bar.model_dump() for bar in bars]}
    write_atomic(_file(folder, part), json.dumps(found))


def _kept(folder: Path) -> Found:
    """What is known of all parts."""
    found = [json.loads(_file(folder, p).read_text()) for p in PARTS if _file(folder, p).exists()]
    rows = [row for one in found for row in one["rows"]]
    return rows, [Bar.model_validate(bar) for one in found for bar in one["bars"]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench-compression"), help="where finished parts are kept"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of compression and engine")
    parser.add_argument("--quick", action="store_true", help="few rows; shows that it runs, writes no result")
    return parser.parse_args()


def _show(console: Console, name: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """A part's rows as a table of what they share, then its bars."""
    columns = [key for key in rows[0] if key not in ("part", "refused")]
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console.print(table)
    for row in rows:
        if row.get("refused"):
            console.print(f"{row['name']} was refused: {row['refused']}", markup=False)
    for bar in bars:
        console.print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
