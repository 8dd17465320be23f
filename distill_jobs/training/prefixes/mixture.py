"""Which source writes which row of a step: logs, teacher, student or replay, by schedule.

A pure function of (configuration, seed, step): every worker, and every resumed run, decides the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill_jobs.training.method_config import PrefixConfig, share_at


@dataclass(frozen=True, slots=True)
class Plan:
    """Places (of a step's rows) by source; what is in none of them stays as logged."""

    teacher: np.ndarray
    student: np.ndarray
    replay: np.ndarray


def _whole(expected: float, number: float) -> int:
    """An integer whose mean is `expected`: the fraction is a coin toss."""
    return math.floor(expected) + int(number < expected - math.floor(expected))


def _writes_anew(replay: float, step: int) -> bool:
    """Whether the student writes in this step, spread evenly: a step replays or writes, as DistiLLM's do.

    Decoding takes about as long for a few rows as for a whole batch, so a fifth of each step's rows costs
    twice as much as every fifth step's all.
    """
    fresh = 1 - replay
    return math.floor((step + 1) * fresh + 1e-9) > math.floor(step * fresh + 1e-9)


def plan(config: PrefixConfig, seed: int, step: int, steps: int, rows: int, stored: int) -> Plan:
    """Divide `rows` places among the sources; the student writes anew what the buffer (`stored`) lacks."""
    rng = np.random.default_rng([seed, step, 1])
    progress = step / max(1, steps - 1)
    places = rng.permutation(rows)
    by_teacher = min(rows, _whole(rows * share_at(config.teacher, progress), rng.random()))
    by_student = min(rows - by_teacher, _whole(rows * share_at(config.student, progress), rng.random()))
    again = 0 if _writes_anew(config.replay, step) else min(by_student, stored)
    written = places[by_teacher : by_teacher + by_student]
    return Plan(np.sort(places[:by_teacher]), np.sort(written[again:]), np.sort(written[:again]))
