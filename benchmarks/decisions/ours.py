"""Our rows: simulated traffic through the shipped decide(), and the late detector on the shipped evidence.

Each scenario is a function of a seed. Knows nothing about the other controllers or about bars.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.decisions.setting import (
    BASE,
    DAY,
    HOUR,
    INCIDENT_EXTRA,
    MARGIN,
    PER_MINUTE,
    WEIGHT,
    Ended,
    errors_only,
    in_incident,
    ramp_steps,
    spec,
)
from contracts.rollout import RolloutSpec, Step
from serve.rollout.policy import DEFAULT_STEPS
from serve.rollout.simulate import ArmModel, World, simulate
from serve.rollout.stats import detector, two_sample

NI_LOOKS = 240
LATE_HEALTHY, LATE_WATCHED = 240, 180
"""Looks before the late regression, and the longest it is waited for."""
_NEVER = 1e-12
"""An alpha that switches a test off."""


def world(extra: float = 0.0, per_minute: float = PER_MINUTE, base: float = BASE) -> World:
    """Both arms of S1; the canary has `extra` errors on top."""
    stable, canary = ArmModel(errors=base), ArmModel(errors=base + extra)
    return World(per_s=per_minute / 60.0, stable=stable, canary=canary, graded=0.0)


def ended(of: RolloutSpec, at: World, seed: int, looks: int) -> Ended:
    """One run through decide()."""
    run = simulate(of, at, seed, looks * of.look_s)
    silent = run.status.decision == "rolled_back" and run.status.reason.startswith("no data")
    return Ended(run.status.decision or "", run.seconds / 60.0, not silent)


def harm(extra: float, tolerance: float = 0.0) -> Callable[[int], Ended]:
    """At 10 % for an hour, as an A/B test: nothing promotes, so every look of the hour is one."""
    held = spec(metrics=errors_only(tolerance), hold_final=True)
    at = world(extra)
    return lambda seed: ended(held, at, seed, HOUR)


def promotion(extra: float) -> Callable[[int], Ended]:
    """At 10 % until the tests promote (or throw back)."""
    at, of = world(extra), spec()
    return lambda seed: ended(of, at, seed, NI_LOOKS)


def boundary(seed: int) -> Ended:
    """Exactly at the margin with the harm test switched off: the promotion test on its own, 240 looks."""
    return ended(spec(alpha_harm=_NEVER), world(0.02), seed, NI_LOOKS)


def on_the_ramp(extra: float, evidence: float | None = 0.0) -> Callable[[int], Ended]:
    """The whole ramp 1-5-10-25-50 %."""
    at, of = world(extra), spec(steps=ramp_steps(evidence))
    return lambda seed: ended(of, at, seed, NI_LOOKS)


def incident(seed: int) -> Ended:
    """Equal arms on the ramp, watched for an hour, with ten minutes of five times the errors on both."""
    plain = world()
    at = World(
        per_s=plain.per_s,
        stable=plain.stable,
        canary=plain.canary,
        graded=0.0,
        incident=lambda t: INCIDENT_EXTRA if in_incident(t / 60.0) else 0.0,
    )
    return ended(spec(steps=ramp_steps(), hold_final=True), at, seed, HOUR)


def silent(seed: int) -> Ended:
    """A canary that nobody asks: two hours without one request, deadline one hour."""
    return ended(spec(no_data_deadline_s=3600.0), world(per_minute=0.0), seed, 2 * HOUR)


def low_traffic(steps: tuple[Step, ...], base: float = 0.0) -> Callable[[int], Ended]:
    """Three requests a minute on the route for a day, a look every five minutes."""
    at, of = world(per_minute=3.0, base=base), spec(steps=steps, look_s=300.0)
    return lambda seed: ended(of, at, seed, DAY // 5)


def late(seed: int) -> float:
    """Minutes from a +2 pp regression, after four healthy hours, to the detector's alarm; inf when not found.

    A false alarm before it began is not a find: those runs start anew with another seed.
    """
    for attempt in range(100):
        watch, rng = _Detector(), np.random.default_rng([seed, 2, attempt])
        while watch.looks < LATE_HEALTHY and not watch.alarm_at:
            watch.draw(rng, BASE)
        if not watch.alarm_at:
            break
    while watch.looks < LATE_HEALTHY + LATE_WATCHED and not watch.alarm_at:
        watch.draw(rng, BASE + 0.02)
    return watch.alarm_at - LATE_HEALTHY if watch.alarm_at else float("inf")


class _Detector:
    """The shipped e-detector over the increments of the shipped harm test, on looks of S1."""

    def __init__(self) -> None:
        self.looks, self.alarm_at = 0, 0.0
        self._test, self._state = two_sample.start(BASE), detector.start()

    def draw(self, rng: np.random.Generator, canary_errors: float) -> None:
        """One look."""
        n_c = int(rng.poisson(PER_MINUTE * WEIGHT))
        n_b = int(rng.poisson(PER_MINUTE * (1.0 - WEIGHT)))
        k_b, k_c = int(rng.binomial(n_b, BASE)), int(rng.binomial(n_c, canary_errors))
        after = two_sample.look(self._test, two_sample.Window(n_b, k_b, n_c, k_c), 0.0, MARGIN)
        self.looks += 1
        self._state = detector.look(self._state, detector.harm_increments(self._test, after))
        self._test = after
        if not self.alarm_at and detector.alarmed(self._state):
            self.alarm_at = float(self.looks)


SCENARIOS: dict[str, Callable[[int], object]] = {
    "+0.5": harm(0.005),
    "+1": harm(0.01),
    "+2": harm(0.02),
    "+5": harm(0.05),
    "+0 tolerant": harm(0.0, 0.005),
    "+1 tolerant": harm(0.01, 0.005),
    "+2 tolerant": harm(0.02, 0.005),
    "+5 tolerant": harm(0.05, 0.005),
    "promote +0": promotion(0.0),
    "promote +0.5": promotion(0.005),
    "promote +1": promotion(0.01),
    "boundary": boundary,
    "boundary, both tests": promotion(0.02),
    "ramp +0": on_the_ramp(0.0),
    "ramp +2": on_the_ramp(0.02),
    "ramp +5": on_the_ramp(0.05),
    "ramp +0, evidence ladder": on_the_ramp(0.0, None),
    "ramp +2, evidence ladder": on_the_ramp(0.02, None),
    "incident": incident,
    "silent": silent,
    "low": low_traffic((Step(weight=WEIGHT, min_samples=30),)),
    "low, 1 % errors": low_traffic((Step(weight=WEIGHT, min_samples=30),), BASE),
    "low, default ramp": low_traffic(DEFAULT_STEPS),
    "late": late,
}
