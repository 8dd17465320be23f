"""`make bench BENCH=distillation`: what the distillation jobs promise, measured beside TRL and ModelOpt.

Half an hour on two cores; minutes on a CUDA device, which is asked for the op and the trainers alone.
`--only PART` measures a part, and its rows take their place in the result. Knows nothing about how a part
measures.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

import torch
from rich.console import Console

from benchmarks.parts import Found, record, show
from benchmarks.peers import NotInstalled

PARTS = ("parity", "op", "trainers", "cache", "collect_rows")
"""Modules of this folder, each with a `run` that returns rows and bars."""
ON_CUDA = ("op", "trainers")


def main() -> int:
    """0 when every bar is met, 1 when one is missed, 2 when it could not be measured."""
    args = _arguments()
    console = Console()
    parts = ON_CUDA if torch.cuda.is_available() else PARTS
    missed = False
    for name in args.only or parts:
        try:
            found = measure(name, args.threads)
        except NotInstalled as err:
            print(f"benchmarks.distillation: {err}", file=sys.stderr)
            return 2
        show(console, name, found)
        missed = missed or not all(bar.ok for bar in found[1])
        if lacking := record("distillation", name, found, parts):
            console.print(f"not measured on this hardware: {', '.join(lacking)}")
    return int(missed)


def measure(name: str, threads: int) -> Found:
    """A part's rows and bars; imported late, because each needs other libraries."""
    run: Callable[..., Found] = importlib.import_module(f"benchmarks.distillation.{name}").run
    return run() if name == "collect_rows" else run(threads)  # Ray Data takes the whole machine


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of every side")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
