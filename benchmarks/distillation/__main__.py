"""`make bench BENCH=distillation`: what the distillation jobs promise, measured beside TRL and ModelOpt.

Half an hour on two cores. A finished part is kept in a folder; `--only PART` measures it again, and the
result is written when all parts are there, each row with the commit it was measured at. Knows nothing about
how a part measures.
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

from benchmarks.peers import NotInstalled
from benchmarks.results import Bar, head, write
from contracts.config import write_atomic

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
    try:
        for name in args.only or PARTS:
            rows, bars = measure(name, args.threads)
            _show(console, name, rows, bars)
            _keep(args.folder, name, rows, bars)
    except NotInstalled as err:
        print(f"benchmarks.distillation: {err}", file=sys.stderr)
        return 2
    rows, bars = _kept(args.folder)
    if missing := [name for name in PARTS if not _file(args.folder, name).exists()]:
        console.print(f"no result yet: {', '.join(missing)} not measured (kept in {args.folder})")
    else:
        console.print(f"written: {write('distillation', 'make bench BENCH=distillation', bars, rows)}")
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench-distillation"), help="where finished parts are kept"
    )
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
