"""`make bench BENCH=scale`: what grows with routes, arms, router replicas and versions, and where it breaks.

About five minutes on two idle cores. `--only PART` measures a part, and its rows take their place in the
result, each with the load of the machine: above its number of cores others were working, and wall-clock
times are upper bounds. What a router replica carries is not measured here: the gateway, serving and soak
results say so. Knows nothing about how a part measures.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable

from rich.console import Console

from benchmarks.parts import Found, record, show

PARTS = ("scrape", "ledger", "splits", "logs", "registry")
"""Modules of this folder, each with a `run` that returns rows and bars."""


def main() -> int:
    """0 when every bar is met, 1 when one is missed."""
    args = _arguments()
    console = Console()
    missed = False
    for name in args.only or PARTS:
        run: Callable[[], Found] = importlib.import_module(f"benchmarks.scale.{name}").run
        rows, bars = run()
        found = [{**row, "load": round(os.getloadavg()[0], 1)} for row in rows], bars
        show(console, name, found)
        missed = missed or not all(bar.ok for bar in bars)
        if lacking := record("scale", name, found, PARTS):
            console.print(f"not measured on this hardware: {', '.join(lacking)}")
    return int(missed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
