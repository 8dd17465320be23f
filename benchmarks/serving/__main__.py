"""`make bench BENCH=serving`: clients → router on Ray Serve → vLLM, against the same vLLM asked directly.

One stack is started as `stillhouse up` starts it, with one engine. Turns with 32 streaming clients alternate
between the public URL and the engine's own port; one client alone measures the time to the first chunk. Knows
nothing about how a stack works.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.gateway.load import Door, OneClient, latencies, need_wrk, throughput
from benchmarks.gateway.processes import ROOT, Failed, Process
from benchmarks.results import at_least, at_most, write
from serve.config import load_serve_config
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

CLIENTS = 32
ROUTE = "student"
_MORE = {"ignore_eos": True}  # every answer has its 32 tokens


def main() -> int:
    """0 when both bars are met, 1 when one is missed, 2 when it could not be measured."""
    args = _arguments()
    need_wrk()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up like Ctrl-C
    try:
        with ExitStack() as ends:
            routed, direct = _stack(Path(args.model).resolve(), ends)
            turns = _turns(
                routed, direct, 1 if args.quick else args.rounds, 5.0 if args.quick else args.seconds
            )
    except Failed as err:
        print(f"benchmarks.serving: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; everything it started has been ended", file=sys.stderr)
        return 130
    rows = [_row(name, turns[name]) for name in turns]
    plain, ours = rows
    ratio = ours["requests_per_s"] / plain["requests_per_s"]
    added = ours["first_chunk_ms"] - plain["first_chunk_ms"]
    bars = [
        at_least("streaming req/s, 32 clients, / plain vLLM", ratio, 0.85, " ×"),
        at_most("time to first chunk, 1 client, added", added, 3, " ms"),
        at_most("requests failed", ours["failed"], 0),
    ]
    for bar in bars:
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")
    if not args.quick:
        print(f"written: {write('serving', 'make bench BENCH=serving', bars, rows)}")
    return 0 if all(b.ok for b in bars) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument(
        "--model", default=str(ROOT / "demo" / "models" / "student-base"), help="folder of a model"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a turn")
    parser.add_argument("--quick", action="store_true", help="one round of short turns; writes no result")
    return parser.parse_args()


def _stack(model: Path, ends: ExitStack) -> tuple[Door, Door]:
    """Start a stack with one engine; the door of the router and that of the engine."""
    folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sh-bench-")))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine = {"model": str(model), "max_model_len": 512, "kv_cache_bytes": 256 * 2**20, "dtype": "bfloat16",
              "enforce_eager": True}  # fmt: skip
    config = folder / "stack.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(folder / "run"),
                "http": {"port": port},
                "upstreams": {"student": {"engine": engine}},
                "routes": {ROUTE: "student"},
                "router": {"replicas": 1},
            }
        )
    )
    command = [sys.executable, "-m", "cli.main", "up", "--config", str(config)]
    print("starting a stack with one engine (about a minute) …", flush=True)
    process = ends.enter_context(Process(command, folder / "log.txt", start_s=600))
    process.wait_ready(f"http://127.0.0.1:{port}/ready")
    settings = load_serve_config(config)
    upstream = settings.upstream("student")
    state = open_state(settings.state_url)
    endpoints = TrafficState(state).endpoints()[str(upstream.app)]
    state.dispose()
    return (
        Door(f"http://127.0.0.1:{port}", ROUTE, more=_MORE),
        Door(endpoints[0].url.removesuffix("/v1"), upstream.model, more=_MORE),
    )


def _turns(routed: Door, direct: Door, rounds: int, seconds: float) -> dict[str, list[dict[str, Any]]]:
    doors = {"plain vLLM": direct, "router on Ray Serve → vLLM": routed}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in doors}
    for door in doors.values():
        _check(door)
        throughput(door, True, CLIENTS, 3)
    for number in range(rounds):
        order = list(doors) if number % 2 == 0 else list(reversed(doors))
        for name in order:
            seen = throughput(doors[name], True, CLIENTS, seconds)
            time.sleep(0.5)  # what wrk left behind at its end is cancelled by now
            first = latencies(doors[name], True, seconds / 2)
            turn = {
                "requests_per_s": seen.requests_per_s,
                "p50_ms": seen.p50_ms,
                "p99_ms": seen.p99_ms,
                "first_chunk_ms": median(first),
                "failed": seen.errors,
            }
            found[name].append(turn)
            print(
                f"round {number + 1}/{rounds}  {name}: {turn['requests_per_s']:.1f} req/s, "
                f"first chunk after {turn['first_chunk_ms']:.2f} ms",
                flush=True,
            )
    return found


def _check(door: Door) -> None:
    """The answer is a whole stream of 32 tokens."""
    client = OneClient(door)
    try:
        client.ask(door.request(True))
        events = client.answer.body.split(b"\n\n")
        if not client.answer.body.endswith(b"data: [DONE]\n\n") or len(events) < 30:
            raise Failed(f"{door.url} gave an odd stream: {client.answer.body[-300:]!r}")
    finally:
        client.close()


def _row(name: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [t["requests_per_s"] for t in turns]
    middle = {key: median(t[key] for t in turns) for key in turns[0]}
    return {
        "what": name,
        "rounds": len(turns),
        **middle,
        "failed": sum(t["failed"] for t in turns),
        "requests_per_s_range": [min(speeds), max(speeds)],
    }


if __name__ == "__main__":
    sys.exit(main())
