"""`stillhouse tune` against the default settings on logged traffic of the demo's world, for its teacher.

The target is the default settings' own p95 at the log's concurrency. The search keeps what it measured, so a
run that was stopped goes on. Knows nothing of other parts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.compression.student_runs import FOLDER
from benchmarks.compression.traffic import ROUTE, write_log
from benchmarks.recipes.data import TEACHER
from benchmarks.results import Bar, at_least
from serve.engine.config import EngineOptions
from serve.tuning import engines, report
from serve.tuning.load import turn
from serve.tuning.search import Trial, Tuner, singles
from serve.tuning.traffic import traffic_of

ROWS, REQUESTS, ROUNDS = 400, 48, 3
BETTER = 1.3
DEFAULT = EngineOptions(max_model_len=512, kv_cache_bytes=64 << 20, dtype="bfloat16")
"""What every engine section starts from; memory and length are the user's to say, not defaults."""


def run(
    threads: int = 1, folder: Path = FOLDER, quick: bool = False
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row a trial, the last one the final comparison; the bar is on its gain."""
    at, log = folder / "tune", folder / "tune-log"
    write_log(log, 32 if quick else ROWS, system=True)
    traffic = traffic_of(log, ROUTE, ROWS)
    base = DEFAULT.model_copy(update={"enforce_eager": quick, "threads": threads})
    told = (at, "e2e", None, engines_of, ask, print)
    target = report.target_of(base, traffic, *told)
    requests, rounds = (8, 1) if quick else (REQUESTS, ROUNDS)
    tuner = Tuner(base, traffic.work, target, at, engines_of, ask, requests, rounds, print)
    tried = singles(base, os.cpu_count() or 1, DEFAULT.max_model_len or 0)
    if quick:
        tried, tuner.ladder = [{"block_size": 32}], (4, 8)
    final, trials = tuner.search(tried)
    report.write(at, target, final, trials)
    what = "stillhouse tune against the default settings, req/s at the same p95"
    return [_row(one, one is final) for one in trials], [at_least(what, final.gain, BETTER, " ×")]


def engines_of(options: EngineOptions, log: Path) -> Any:
    """An engine of the teacher."""
    return engines.running(TEACHER, options, log)


def ask(url: str, work: Any, at_once: int) -> Any:
    """A turn on it."""
    return turn(url, engines.MODEL, work, at_once)


def _row(one: Trial, final: bool) -> dict[str, Any]:
    return {
        "part": "tune",
        "name": one.name,
        "final": final,
        "requests": one.requests,
        "rounds": one.rounds,
        "requests_per_s": round(one.rate, 3),
        "default_requests_per_s": round(one.base_rate, 3),
        "gain": round(one.gain, 3),
        "error": one.error and one.error.splitlines()[0],
    }
