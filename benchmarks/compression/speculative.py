"""The demo's teacher with a student as its draft, and with n-grams, against plain decoding, through vLLM.

The student is the demo's base after a short distillation, one that no gate would let through. Greedy, one
request at a time, turns of both engines alternating. Knows nothing of other parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.compression.student_runs import FOLDER, QUICK, settings, train, world
from benchmarks.compression.traffic import ROUTE, write_log
from benchmarks.recipes.data import STUDENT, TEACHER
from benchmarks.results import Bar, at_least
from contracts.speculative import Speculative
from distill_jobs.training.models import load_model, save_model
from distill_jobs.training.optim import cast_parameters
from serve.engine.config import EngineOptions
from serve.tuning.speculate import Drafted, measure, name_of
from serve.tuning.traffic import traffic_of

STEPS, REQUESTS = 200, 64
COUNTS = (2, 4, 6)
FASTER = 1.3
ENGINE = EngineOptions(max_model_len=512, kv_cache_bytes=64 << 20, dtype="bfloat16")


def run(
    threads: int = 1, folder: Path = FOLDER, quick: bool = False
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row for each way to draft and task; bars on the best draft's speed-up and on the tokens."""
    torch.set_num_threads(threads)
    draft = student(folder, QUICK if quick else 1.0)
    log = folder / "speculative-log"
    count = 8 if quick else REQUESTS
    write_log(log, count)
    counts = (4,) if quick else COUNTS
    ways = [Speculative(draft=str(draft), tokens=n) for n in counts]
    ways += [Speculative(method="ngram", tokens=n) for n in counts]
    options = ENGINE.model_copy(update={"threads": threads, "enforce_eager": quick})
    work = traffic_of(log, ROUTE, count, "metadata.task").work

    def measured(some: list[Speculative]) -> list[Drafted]:
        logs, rounds = folder / "speculative-logs", 1 if quick else 3
        return measure(TEACHER, options, some, work, logs, rounds=rounds, say=print)

    found = measured(ways)
    first = max((one for one in found if one.task == "all" and one.speculative.draft), key=_gain)
    again = measured([first.speculative])  # the best of several is flattered by its own turns
    best, found = again[0], [*found, *again]
    same = min(one.same / one.requests for one in found if one.task == "all")
    return [_row(one) for one in found], [
        at_least(
            "speculative decoding with the student, greedy, tokens/s against plain", _gain(best), FASTER, " ×"
        ),
        at_least("greedy answers that are plain decoding's, every way to draft", same, 1.0),
    ]


def student(folder: Path, budget: float) -> Path:
    """The draft, trained once in `folder`."""
    steps = max(2, round(STEPS * budget))
    place = folder / f"draft-{steps}"
    if not (place / "config.json").exists():
        model = load_model(STUDENT, None, 0)
        train(model, settings(steps), world(folder, budget).rows)
        cast_parameters(model, torch.bfloat16)
        save_model(model, STUDENT, place)
    return place


def _gain(one: Drafted) -> float:
    return one.speed_up


def _row(one: Drafted) -> dict[str, Any]:
    told = one.model_dump(exclude={"speculative"})
    figures = {name: round(v, 4) if isinstance(v, float) else v for name, v in told.items()}
    return {"part": "speculative", "name": name_of(one.speculative), **figures}
