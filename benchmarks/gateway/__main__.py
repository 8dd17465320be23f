"""`make bench BENCH=gateway`: one instant backend, then each gateway in turn with everything on; one table.

Every round starts each gateway anew, in a rotated order, checks that its answers are right, and measures it
the same way; the table and the bars are medians over the rounds. `--quick` is one short round that writes
nothing. Knows nothing about how a gateway is started or measured.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gateway import report
from benchmarks.gateway.gateways import GATEWAYS, Gateway, prepare
from benchmarks.gateway.load import Door, machine_is_quiet, need_wrk
from benchmarks.gateway.measure import Measured, measure
from benchmarks.gateway.processes import Failed, Process
from benchmarks.peers import NotInstalled
from benchmarks.results import write


def main() -> int:
    """0 when every bar is met, 1 when one is missed, 2 when it could not be measured."""
    args = _arguments()
    need_wrk()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up like Ctrl-C
    chosen = [g for g in GATEWAYS if not args.only or any(word in g.name for word in args.only)]
    try:
        prepare(chosen)
        if not machine_is_quiet():
            print("note: something else keeps this machine busy; it will be measured too", flush=True)
        rounds = _rounds(chosen, 1 if args.quick else args.rounds, 2.0 if args.quick else args.seconds)
    except (Failed, NotInstalled) as err:
        print(f"benchmarks.gateway: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; everything it started has been ended", file=sys.stderr)
        return 130
    rows = report.rows(rounds)
    report.show(rows)
    bars = report.bars(rows)
    for bar in bars:
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")
    if not args.quick and chosen == GATEWAYS:
        print(f"written: {write('gateway', 'make bench BENCH=gateway', bars, rows)}")
    return 0 if all(b.ok for b in bars) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of short turns; writes no result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn")
    parser.add_argument("--only", nargs="+", help="words of the gateways' names; writes no result")
    return parser.parse_args()


def _rounds(gateways: list[Gateway], count: int, seconds: float) -> list[Measured]:
    found = []
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sh-bench-")))
        command = [sys.executable, "-m", "benchmarks.gateway.backend"]
        backend = ends.enter_context(Process(command, folder / "backend.txt"))
        url = backend.printed_url()
        found.append(measure("backend itself", "", Door(url), backend, Door(url), seconds))
        for number in range(count):
            at = number * max(1, len(gateways) // count) % len(gateways)
            for gateway in gateways[at:] + gateways[:at]:
                place = folder / f"{number}-{gateways.index(gateway)}"
                place.mkdir()
                found.append(_turn(gateway, url, place, seconds))
                print(f"round {number + 1}/{count}  {report.line(found[-1])}", flush=True)
    return found


def _turn(gateway: Gateway, backend: str, folder: Path, seconds: float) -> Measured:
    with ExitStack() as ends:
        running = gateway.start(backend, folder, ends)
        try:
            return measure(
                gateway.name,
                gateway.what,
                running.door,
                running.process,
                Door(backend),
                seconds,
                slow=gateway.slow,
                ours=gateway.ours,
            )
        except OSError as err:
            raise Failed(f"{gateway.name} broke off: {err}") from err


if __name__ == "__main__":
    sys.exit(main())
