"""`make bench BENCH=adapters`: eight adapters on one engine, against eight engines of merged students.

Both stand side by side; turns of the same load (the same clients, each asking for one student) alternate. Of
every engine's whole process family the memory is counted as PSS: pages that several processes share are
divided among them, so that code shared by eight engines is counted once. The one engine is measured before
the others start, when it shares with nobody, which is to its disadvantage. At last adapters are loaded and
unloaded under load. Knows nothing about routers or Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.adapters.load import Seen, Target, drive, drive_while
from benchmarks.adapters.make import RANK, make_adapter
from benchmarks.gateway.processes import ROOT, Failed
from benchmarks.results import at_least, at_most, write
from contracts.errors import StillhouseError
from distill_jobs.flywheel.processes import memory_of
from serve.engine.adapters import load, unload
from serve.engine.config import EngineOptions
from serve.engine.lora import LoraOptions
from serve.engine.process import VllmProcess

MODEL = ROOT / "demo" / "models" / "student-base"
STUDENTS, CLIENTS = 8, 4
HOT_LOADS = 12


def main() -> int:
    """0 when every bar is met, 1 when one is missed, 2 when it could not be measured."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up like Ctrl-C
    try:
        with ExitStack() as ends:
            rows, memory, speed, failed = _measure(args, ends)
    except (Failed, StillhouseError) as err:
        print(f"benchmarks.adapters: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; everything it started has been ended", file=sys.stderr)
        return 130
    many = f"{args.students} engines"
    bars = [
        at_most(f"memory (PSS) of one engine / {many}", memory, 0.25, " ×"),
        at_least(f"req/s of one engine / {many}", speed, 0.8, " ×"),
        at_most("requests failed, hot loads included", failed, 0),
    ]
    for bar in bars:
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")
    if args.students == STUDENTS and not args.quick:
        print(f"written: {write('adapters', 'make bench BENCH=adapters', bars, rows)}")
    return 0 if all(b.ok for b in bars) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--students", type=int, default=STUDENTS, help="not 8: writes no result")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="of every student")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a turn")
    parser.add_argument("--quick", action="store_true", help="one round of short turns; writes no result")
    return parser.parse_args()


def _measure(args: argparse.Namespace, ends: ExitStack) -> tuple[list[dict[str, Any]], float, float, int]:
    """The rows, one engine's share of the memory, its share of the speed, failed requests."""
    folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sh-bench-")))
    names = [f"student-{number}" for number in range(args.students)]
    adapters = [make_adapter(MODEL, folder / name, seed) for seed, name in enumerate([*names, "guest"])]
    one = _engine(folder, "base", ends, LoraOptions(max_loras=args.students, max_lora_rank=RANK))
    for name, adapter in zip(names, adapters, strict=False):
        load(one.url, name, adapter)
    shared = [Target(one.url, name) for name in names]
    asyncio.run(drive(shared, args.clients, 3))
    small = _memory(one)
    print(f"one engine with {len(names)} adapters: {small / 2**20:.0f} MiB", flush=True)
    engines = [_engine(folder, name, ends, None) for name in names]
    own = [Target(engine.url, name) for engine, name in zip(engines, names, strict=True)]
    asyncio.run(drive(own, args.clients, 3))
    large = sum(_memory(engine) for engine in engines)
    print(f"{len(names)} engines: {large / 2**20:.0f} MiB", flush=True)
    turns = _turns(args, {"one engine": shared, "an engine each": own})
    hot = asyncio.run(drive_while(shared, args.clients, lambda: _hot_loads(one.url, adapters[-1])))
    print(f"{HOT_LOADS} hot loads: {hot.answered} answered, {len(hot.failures)} failed {hot.failures[:1]}")
    rows = [
        {"what": what, "memory_mib": round(memory / 2**20), "requests_per_s": _rates(seen)}
        for (what, seen), memory in zip(turns.items(), (small, large), strict=True)
    ]
    rows.append({"what": "hot loads", "answered": hot.answered, "loads": HOT_LOADS})
    every = [*turns["one engine"], *turns["an engine each"], hot]
    speed = median(_rates(turns["one engine"])) / median(_rates(turns["an engine each"]))
    return rows, small / large, speed, sum(len(seen.failures) for seen in every)


def _turns(args: argparse.Namespace, sides: dict[str, list[Target]]) -> dict[str, list[Seen]]:
    found: dict[str, list[Seen]] = {name: [] for name in sides}
    for number in range(1 if args.quick else args.rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            seen = asyncio.run(drive(sides[name], args.clients, 5.0 if args.quick else args.seconds))
            found[name].append(seen)
            print(f"round {number + 1}  {name}: {seen.per_s:.1f} req/s, {len(seen.failures)} failed")
    return found


def _rates(turns: list[Seen]) -> list[float]:
    return [round(seen.per_s, 3) for seen in turns]


def _hot_loads(url: str, adapter: Path) -> None:
    for number in range(HOT_LOADS):
        load(url, f"guest-{number}", adapter)
        unload(url, f"guest-{number}")


def _engine(folder: Path, name: str, ends: ExitStack, lora: LoraOptions | None) -> VllmProcess:
    """A running engine of the base; started one after the other, as a machine of two cores must."""
    options = EngineOptions(
        max_model_len=512, kv_cache_bytes=64 << 20, dtype="bfloat16", enforce_eager=True, lora=lora
    )
    engine = VllmProcess(str(MODEL), name, options, "127.0.0.1", folder / f"{name}.log")
    ends.callback(engine.stop)
    engine.start()
    engine.wait_ready()
    return engine


def _memory(engine: VllmProcess) -> int:
    """Bytes of an engine's processes, as PSS."""
    keeper = psutil.Process(engine.pid)
    return memory_of([keeper, *keeper.children(recursive=True)])


if __name__ == "__main__":
    sys.exit(main())
