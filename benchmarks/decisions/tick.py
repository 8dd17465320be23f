"""The arithmetic of one tick: 1,000 rollouts with 5 metrics each, all due, through the shipped decide().

One core, no storage. Errors, pass or fail and mean of a grader's scores, and both latencies at three
thresholds each: nine tests a rollout. Every rollout gets a window of its own.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.decisions.setting import MARGIN, PER_MINUTE, SEED, WEIGHT, spec
from contracts.metrics import MetricKind, MetricSpec
from contracts.rollout import RolloutSpec, RolloutStatus
from contracts.traffic import Split, Upstream
from serve.rollout.decide import decide, initial
from serve.rollout.observation import Observation, SeenWindow
from serve.rollout.simulate import ArmModel, draw_counts

ROLLOUTS, LOOKS = 1000, 3
FIVE = (
    MetricSpec(kind=MetricKind.ERRORS, margin=MARGIN),
    MetricSpec(kind=MetricKind.QUALITY, margin=0.05),
    MetricSpec(kind=MetricKind.SCORE, margin=0.05),
    MetricSpec(kind=MetricKind.TTFT, margin=0.05, thresholds_s=(0.4, 1.0, 3.0)),
    MetricSpec(kind=MetricKind.E2E, margin=0.05, thresholds_s=(2.0, 6.0, 15.0)),
)
_ARM = ArmModel(errors=0.01, wrong=0.05, ttft_s=0.3, e2e_s=2.0)


def seconds(rollouts: int = ROLLOUTS) -> float:
    """Seconds of one tick: the median over LOOKS ticks, after one that fills the tests' memories."""
    of = spec(metrics=FIVE, hold_final=True)
    status, split = _warm(of)
    rng = np.random.default_rng(SEED)
    active, taken = [status] * rollouts, []
    for look in range(LOOKS + 1):
        seen = [_observation(rng, split, (look + 1) * of.look_s) for _ in active]
        began = time.perf_counter()
        active = [decide(of, s, o).status for s, o in zip(active, seen, strict=True)]
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def _warm(of: RolloutSpec) -> tuple[RolloutStatus, Split]:
    stable = Upstream(name="teacher", model="teacher", url="http://teacher")
    split, status = Split(route=of.route, version=1, salt="s", stable=stable), initial(of)
    for _ in range(2):
        decision = decide(of, status, Observation(now=0.0, split=split, ready=True, warmed=True))
        status, split = decision.status, decision.split or split
    return status, split


def _observation(rng: np.random.Generator, split: Split, now: float) -> Observation:
    stable, canary = (
        draw_counts(rng, _ARM, int(rng.poisson(PER_MINUTE * share))) for share in (1.0 - WEIGHT, WEIGHT)
    )
    window = SeenWindow(split_version=split.version, stable=stable, canary=canary)
    return Observation(now=now, split=split, windows=(window,))
