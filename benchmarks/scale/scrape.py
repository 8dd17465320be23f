"""Scrape cost and series: 20 routes of 3 arms, counted by 4 router processes and a controller in one folder.

The processes are real ones with the router's own `Metrics` and the controller's `ControllerMetrics`; every
series that such a host can show, short of further endpoints, is there. One scrape is what `GET /metrics` of
one process answers for the whole host, its 20 ms of waiting for the other processes included. Beside it, the
same folder read by prometheus_client's own collector.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results import Bar, at_most
from serve.router.batch import FLUSH_S

MODELS, PROCESSES, SCRAPES, DEAD = 20, 4, 30, 50
MAX_SERIES, MAX_MS = 5000, 100.0
WAIT_MS = 2000 * FLUSH_S
"""A scrape waits so long for what the other processes gathered."""
GRADERS = ("grade", "helpful")
CODES = (200, 400, 429, 502, 504)
KEYS = 40
_NO_PID = 2**22 + 1
"""Above Linux's highest process number."""
_MODULE = "benchmarks.scale.scrape"


def run() -> tuple[list[dict[str, Any]], list[Bar]]:
    """The rows and the two bars of the issue."""
    with tempfile.TemporaryDirectory(prefix="sh-scrape-") as folder:
        routers = [_Child("router", Path(folder)) for _ in range(PROCESSES)]
        try:
            alone = routers[0].ask("scrape")
            controller = _Child("controller", Path(folder))
            try:
                host, library = routers[0].ask("scrape"), routers[0].ask("library")
                _bury(_Child("router", Path(folder)), Path(folder))
                after_deaths = routers[0].ask("scrape")
            finally:
                controller.close()
        finally:
            for child in routers:
                child.close()
    rows = [
        _row("routers", alone),
        _row("routers and controller in one folder", {**host, **library}),
        _row(f"the same after {DEAD} router processes died", after_deaths),
    ]
    bars = [
        at_most("series of a host: 20 models x 3 arms x 4 router replicas", alone["series"], MAX_SERIES),
        at_most("a scrape, median", host["p50_ms"], MAX_MS, " ms"),
        at_most("a scrape, processor time and waiting, p99", host["cpu_p99_ms"] + WAIT_MS, MAX_MS, " ms"),
    ]
    return rows, bars


def _row(what: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"part": "scrape", "what": what, "models": MODELS, "arms": 3, "processes": PROCESSES, **found}


class _Child:
    """A process that counts in the folder until it is closed."""

    def __init__(self, role: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, role],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.ask("ready?")

    def ask(self, what: str) -> dict[str, Any]:
        """One line there, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it; its counts stay in the folder."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def _bury(child: _Child, folder: Path) -> None:
    """Leave the files of many dead processes: those of this one under numbers that no process can have."""
    child.close()
    for kind in ("counter", "histogram"):
        file = folder / f"{kind}_{child.pid}.db"
        for n in range(DEAD):
            shutil.copyfile(file, folder / f"{kind}_{_NO_PID + n}.db")


# in the child ----------------------------------------------------------------------------------------------


def busy_metrics() -> Any:
    """A router's metrics with graders, and a price of tokens for every upstream."""
    from contracts.price import Price
    from serve.router.metrics import Metrics

    price = Price(currency="EUR", prompt_per_million=1.0, completion_per_million=2.0)
    return Metrics(GRADERS, {f"teacher-{n:02d}": price for n in range(MODELS)}, price)


def count_everything(metrics: Any) -> None:
    """Show what a busy router's metrics show: every outcome, verdict and code, on every arm."""
    from contracts.traffic import Arm, Outcome, Split, Upstream

    for n in range(MODELS):
        route = f"route-{n:02d}"
        stable = Upstream(name=f"teacher-{n:02d}", model="teacher", url="http://127.0.0.1:9000")
        student = Upstream(name=f"student-{n:02d}", model="student", url="http://127.0.0.1:9001", digest="d")
        metrics.know(Split(route=route, version=1, salt="s", stable=stable, canary=student, weight=0.1))
        for arm, upstream in ((Arm.STABLE, stable), (Arm.CANARY, student), (Arm.SHADOW, student)):
            counted = metrics.arm(route, arm.value, upstream.name)
            for outcome, endpoint in itertools.product(Outcome, ("/v1/chat/completions", "/v1/completions")):
                counted.ended(outcome, endpoint)
            for histogram in (counted.ttft, counted.tpot, counted.e2e, counted.overhead):
                histogram.observe(0.05)
            counted.prompt_tokens.inc(50)
            counted.completion_tokens.inc(100)
            for grader, score in itertools.product(GRADERS, (0.0, 0.5, 1.0)):
                metrics.graded(route, arm.value, grader, score)
            metrics.retries.labels(route, arm.value).inc()
        for arm, verdict in itertools.product((Arm.STABLE, Arm.CANARY), ("good", "bad")):
            metrics.feedback.labels(route, arm.value, verdict).inc()
        for upstream in (stable, student):
            metrics.ejections.labels(upstream.name).inc()
        for code in CODES:
            metrics.response(route, code)
        metrics.refused(429, "/v1/chat/completions", route)
        metrics.fallbacks.labels(route).inc()
        metrics.shadows_dropped.labels(route, "mirror_busy").inc()
        metrics.splits.count({stable.name: 2, student.name: 2}, {route: 0})
    for n in range(KEYS):
        metrics.key_requests.labels(f"key-{n}").inc()
    for grader, result in itertools.product(GRADERS, ("ok", "unparsed", "failed")):
        metrics.judge_calls.labels(grader, result).inc()


def series_of(text: bytes) -> list[str]:
    """The exposition's lines that are series."""
    return [line for line in text.decode().splitlines() if line and not line.startswith("#")]


async def _router(lines: Any) -> None:
    metrics = busy_metrics()
    count_everything(metrics)
    metrics.batch.flush()
    for line in lines:
        answer = {}
        if line == "scrape":
            answer = await _scraped(metrics)
        elif line == "library":
            answer = _by_the_library()
        print(json.dumps(answer), flush=True)


async def _scraped(metrics: Any) -> dict[str, Any]:
    """Series, and milliseconds of a scrape; the first one parses the keys and is told apart."""
    took, cpu, text = [], [], b""
    for _ in range(SCRAPES + 1):
        count_everything(metrics)  # traffic goes on between two scrapes
        began, used = time.perf_counter(), time.process_time()
        text = await metrics.scrape()
        took.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - used))
    first, rest = took[0], sorted(took[1:])
    return {
        "series": len(series_of(text)),
        "bytes": len(text),
        "first_ms": round(first, 2),
        "p50_ms": round(median(rest), 2),
        "p99_ms": round(rest[-1], 2),
        "cpu_ms": round(median(cpu[1:]), 2),
        "cpu_p99_ms": round(max(cpu[1:]), 2),
        "largest": Counter(line.split("{")[0] for line in series_of(text)).most_common(6),
    }


def _by_the_library() -> dict[str, float]:
    """Milliseconds that prometheus_client's own collector takes for the same folder."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    took = []
    for _ in range(3):
        began = time.perf_counter()
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        generate_latest(registry)
        took.append(1000 * (time.perf_counter() - began))
    return {"library_ms": round(median(took), 2)}


def _controller(lines: Any) -> None:
    import numpy as np

    from benchmarks.decisions import tick
    from serve.rollout.controller import Controller
    from serve.rollout.deployer import FakeDeployer
    from serve.rollout.metrics import ControllerMetrics

    with tempfile.TemporaryDirectory() as folder:
        world = tick.build(Path(folder), MODELS)
        metrics = ControllerMetrics()
        world.controller = Controller(
            world.engine, FakeDeployer(), holder="bench", clock=world.clock, metrics=metrics
        )
        world.serve(np.random.default_rng(0), tick.LOOK_S, weight=0.1)
        world.clock.now += tick.LOOK_S + 1.0
        assert world.controller.tick()
        for _ in lines:
            print("{}", flush=True)


def main() -> None:
    """Count, then answer each line until there are no more."""
    lines = iter(lambda: sys.stdin.readline().strip(), "")
    if sys.argv[1] == "router":
        asyncio.run(_router(lines))
    else:
        _controller(lines)


if __name__ == "__main__":
    main()
