"""`make bench BENCH=compression`: what compression promises, every artifact as vLLM serves it.

Hours on two cores. What a part finished when it was stopped is kept in a folder; `--only PART` measures it
alone, and its rows take their place in the result. Knows nothing about how a part measures.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks.parts import Found, record, show

PARTS = ("formats", "mixed", "shrink", "qad", "speculative", "tune", "best", "early_exit")
"""Modules of this folder, each with `run(threads, folder, quick)` that returns rows and bars."""


def main() -> int:
    """0 when every bar is met, 1 when one is missed."""
    args = _arguments()
    console = Console()
    missed = False
    for name in args.only or PARTS:
        run: Callable[..., Found] = importlib.import_module(f"benchmarks.compression.{name}").run
        found = run(args.threads, args.folder / ("quick" if args.quick else "full"), args.quick)
        show(console, name, found)
        missed = missed or not all(bar.ok for bar in found[1])
        if not args.quick and (lacking := record("compression", name, found, PARTS)):
            console.print(f"not measured on this hardware: {', '.join(lacking)}")
    return int(missed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench-compression"), help="where a stopped part goes on"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of compression and engine")
    parser.add_argument("--quick", action="store_true", help="few rows; shows that it runs, writes no result")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
