"""The evidence each step of a ramp needs. A pure function of the spec; knows nothing of what was seen."""

from __future__ import annotations

import math

from contracts.rollout import RolloutSpec


def step_evidence(spec: RolloutSpec, index: int) -> float:
    """The non-inferiority e-value every metric needs to leave a step: its own, or a geometric ladder.

    The ladder rises from 1 (nothing speaks against the canary) to 1/alpha_promote at the last step; the last
    step never needs less than that, whatever the step says.
    """
    full = 1.0 / spec.alpha_promote
    last = len(spec.steps) - 1
    asked = spec.steps[index].evidence
    if index == last:
        return max(full, asked or 0.0)
    return asked if asked is not None else math.pow(full, index / last)
