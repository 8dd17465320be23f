"""Setting S1 of the research: 300 requests a minute, 10 % canary, 1 % errors, a look a minute, alpha 0.05.

What every controller of this benchmark is told, as constants, and the policies ours runs with. Knows nothing
about how a controller decides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from contracts.metrics import MetricKind, MetricSpec
from contracts.rollout import RolloutSpec, Step
from contracts.traffic import Upstream

SEED = 20261120
RUNS = 2000
PER_MINUTE = 300.0
WEIGHT = 0.10
BASE = 0.01
MARGIN = 0.02
HOUR, DAY = 60, 1440
"""Looks in an hour, in a day."""

RAMP = ((0.01, 3), (0.05, 30), (0.10, 60), (0.25, 100), (0.50, 100))
"""(weight, canary requests needed), each for at least DWELL looks."""
DWELL = 3
INCIDENT_FROM, INCIDENT_FOR, INCIDENT_EXTRA = 6, 10, 0.04
"""Minutes, and what is added to both arms' error rates: in the middle of the ramp, 1 % becomes 5 %."""


class Ended(NamedTuple):
    """How one run ended: 'rolled_back', 'promoted' or '' (undecided), and after how many minutes."""

    decision: str
    minutes: float
    blamed: bool = True
    """False for a rollback that only a silent canary caused."""


def errors_only(tolerance: float = 0.0) -> tuple[MetricSpec, ...]:
    """The one guardrail of S1. Tolerance 0: any excess is harm, as every peer here reads it."""
    return (MetricSpec(kind=MetricKind.ERRORS, margin=MARGIN, tolerance=tolerance),)


def spec(
    steps: tuple[Step, ...] = (Step(weight=WEIGHT),),
    metrics: tuple[MetricSpec, ...] = errors_only(),
    **changes: object,
) -> RolloutSpec:
    """A rollout of one step at 10 %, with changes."""
    made = {
        "id": "r",
        "route": "support",
        "model_ref": "student:1",
        "candidate": Upstream(name="student", model="student", url="http://student"),
        "digest": "sha256:" + "0" * 64,
        "steps": steps,
        "metrics": metrics,
        "look_s": 60.0,
        "created_at": 0.0,
    }
    return RolloutSpec(**{**made, **changes})  # type: ignore[arg-type]


def ramp_steps(evidence: float | None = 0.0) -> tuple[Step, ...]:
    """The ramp as our policy says it: samples and dwell open a step, full evidence only the promotion.

    `evidence` None is the policy's default, a ladder of evidence for every step.
    """
    return tuple(Step(weight=w, min_samples=n, min_dwell_s=60.0 * DWELL, evidence=evidence) for w, n in RAMP)


def in_incident(minute: float) -> bool:
    """Whether the shared incident is on."""
    return INCIDENT_FROM <= minute < INCIDENT_FROM + INCIDENT_FOR


def standard_error(share: float, runs: int) -> float:
    """Monte-Carlo standard error of a share of runs; of 'none' and 'all' that of half a run more or less."""
    p = min(max(share, 0.5 / runs), 1.0 - 0.5 / runs)
    return math.sqrt(p * (1.0 - p) / runs)
