"""Simulated traffic through the shipped decide(): how long would this policy take, and would it catch this?

Poisson arrivals, Bernoulli outcomes, no engines and no storage; used by tests, benchmarks and to plan a
policy. Knows nothing about real routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from contracts.metrics import GRADE, LATENCY_BUCKETS_S, LATENCY_KINDS, ArmCounts, pass_fail
from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from contracts.traffic import Split, Upstream
from serve.rollout.decide import decide, initial
from serve.rollout.observation import Observation, SeenWindow

_EDGES = np.array(LATENCY_BUCKETS_S)


@dataclass(frozen=True)
class ArmModel:
    """How an arm behaves: error and wrong-answer rates, and lognormal latencies in seconds."""

    errors: float = 0.0
    wrong: float = 0.0
    ttft_s: float = 0.05
    e2e_s: float = 0.5
    spread: float = 0.4
    """Sigma of the log of both latencies."""


@dataclass(frozen=True)
class World:
    """Traffic and both arms. `incident(t)` is added to both arms' error rates t seconds into the ramp."""

    per_s: float
    stable: ArmModel
    canary: ArmModel
    graded: float = 1.0
    """Share of answers that get a grade."""
    incident: Callable[[float], float] = field(default=lambda t: 0.0)


@dataclass(frozen=True)
class Run:
    """How one simulated rollout ended."""

    status: RolloutStatus
    seconds: float
    """Simulated seconds from the first step to the decision (or to the end of the simulation)."""


def simulate(spec: RolloutSpec, world: World, seed: int, max_s: float) -> Run:
    """One rollout from its first step until decided or `max_s` simulated seconds; one tick a look."""
    rng = np.random.default_rng(seed)
    timed = any(m.kind in LATENCY_KINDS for m in spec.metrics)
    return follow(spec, lambda split, t: draw_window(rng, world, split, spec.look_s, t, timed), max_s)


def follow(spec: RolloutSpec, window: Callable[[Split, float], SeenWindow], max_s: float) -> Run:
    """One rollout through decide(): `window` gives a look's counts, from the split and the seconds passed."""
    status, split, start = _warm(spec)
    now = start
    while now - start < max_s and status.decision is None:
        now += spec.look_s
        seen = Observation(now=now, split=split, windows=(window(split, now - start),))
        decision = decide(spec, status, seen)
        status, split = decision.status, decision.split or split
    return Run(status, now - start)


def _warm(spec: RolloutSpec) -> tuple[RolloutStatus, Split, float]:
    """Through pending and warming to the first step."""
    stable = Upstream(name="stable-before", model="stable", url="http://stable")
    split, status = Split(route=spec.route, version=1, salt="s", stable=stable), initial(spec)
    for _ in range(2):
        seen = Observation(now=spec.created_at, split=split, ready=True, warmed=True)
        decision = decide(spec, status, seen)
        status, split = decision.status, decision.split or split
    assert status.phase is Phase.RAMPING
    return status, split, spec.created_at


def draw_window(
    rng: np.random.Generator, world: World, split: Split, seconds: float, t: float, timed: bool
) -> SeenWindow:
    """Both arms' counts of `seconds` under a split, beginning `t` seconds into the ramp."""
    extra = world.incident(t)
    n = int(rng.poisson(world.per_s * seconds))
    n_canary = int(rng.binomial(n, split.weight))
    return SeenWindow(
        split_version=split.version,
        stable=draw_counts(rng, world.stable, n - n_canary, extra, world.graded, timed),
        canary=draw_counts(rng, world.canary, n_canary, extra, world.graded, timed),
    )


def draw_counts(
    rng: np.random.Generator,
    arm: ArmModel,
    n: int,
    extra: float = 0.0,
    share: float = 1.0,
    timed: bool = True,
) -> ArmCounts:
    """Outcomes of `n` requests of an arm. `extra` errors come on top, `share` of the answers get a grade.

    Drawing latencies takes most of the time: not `timed` leaves them out.
    """
    errors = int(rng.binomial(n, min(1.0, arm.errors + extra)))
    answered = n - errors
    graded = int(rng.binomial(answered, share))
    wrong = int(rng.binomial(graded, arm.wrong))
    return ArmCounts(
        n=n,
        errors=errors,
        scores={GRADE: pass_fail(graded - wrong, wrong)} if graded else {},
        ttft=_latencies(rng, arm.ttft_s, arm.spread, answered) if timed else (),
        e2e=_latencies(rng, arm.e2e_s, arm.spread, answered) if timed else (),
    )


def _latencies(rng: np.random.Generator, median_s: float, spread: float, n: int) -> tuple[int, ...]:
    drawn = rng.lognormal(math.log(median_s), spread, n)
    found = np.bincount(np.searchsorted(_EDGES, drawn, side="left"), minlength=len(_EDGES) + 1)
    return tuple(int(v) for v in found)
