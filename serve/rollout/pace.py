"""When would it be done, at the pace of the last looks: a guess for whoever watches, never a rule.

Evidence of being no worse grows about evenly with canary requests while things stay as they are, so each step
left takes the longest of its dwell, its samples and its weakest metric's missing evidence. Pure. Decides
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from contracts.metrics import Role
from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from serve.rollout.decide import step_evidence
from serve.state.rollouts import AuditEntry

RECENT = 12
"""Looks that the pace is taken from."""


@dataclass(frozen=True)
class Pace:
    """A guess, or why there is none."""

    seconds: float | None
    """Until every step is left; None when that cannot be said."""
    said: str
    """The metric that takes longest, or the reason why there is no guess."""


@dataclass(frozen=True)
class _Growth:
    canary_n: int
    per_s: float
    """Requests of both arms a second."""
    each: dict[str, float]
    """Metric → log e-value gained a canary request."""


def pace(spec: RolloutSpec, status: RolloutStatus, trail: Sequence[AuditEntry], now: float) -> Pace:
    """How long the rest of the ramp takes if the canary goes on as in the last looks."""
    if status.phase not in (Phase.RAMPING, Phase.HELD):
        return Pace(None, "not ramping")
    growth = _growth([e for e in trail if e.kind == "look"][-RECENT:])
    if growth is None or growth.canary_n == 0:
        return Pace(None, "too few canary requests to tell")
    total, slowest = 0.0, ""
    deciding = {m.key for m in spec.metrics if m.role is not Role.INFO}
    have = {m.name: m.log_noninferior for m in status.metrics if m.name in deciding}
    for index in range(status.step, len(spec.steps)):
        step = spec.steps[index]
        rate = step.weight * growth.per_s
        first = index == status.step
        samples = step.min_samples - (_seen(status) if first else 0)
        dwell = step.min_dwell_s - (now - status.step_since if first else 0.0)
        waits = {"dwell": dwell, "samples": samples / rate}
        needed = step_evidence(spec, index)
        for name, log_e in have.items():
            missing = (math.log(needed) if needed > 0 else -math.inf) - log_e
            if missing > 0.0:
                gained = growth.each.get(name, 0.0) * rate
                if gained <= 0.0:
                    return Pace(None, f"evidence on {name} does not grow")
                waits[name] = missing / gained
        slowest = max(waits, key=lambda k: waits[k])
        took = math.ceil(max(0.0, waits[slowest]) / spec.look_s - 1e-9) * spec.look_s
        have = {name: e + growth.each.get(name, 0.0) * rate * took for name, e in have.items()}
        total += took
    return Pace(total, slowest)


def _growth(looks: Sequence[AuditEntry]) -> _Growth | None:
    if len(looks) < 2:
        return None
    first, last = looks[0], looks[-1]
    requests = [
        {arm: int(look.body["counts"].get(arm, {}).get("n", 0)) for arm in ("stable", "canary")}
        for look in (first, last)
    ]
    canary = requests[1]["canary"] - requests[0]["canary"]
    seconds = last.at - first.at
    if seconds <= 0 or canary <= 0:
        return None
    logs = [
        {m["metric"]: float(m["log_noninferior"]) for m in look.body["metrics"]} for look in (first, last)
    ]
    return _Growth(
        canary_n=canary,
        per_s=(sum(requests[1].values()) - sum(requests[0].values())) / seconds,
        each={name: (logs[1][name] - logs[0].get(name, 0.0)) / canary for name in logs[1]},
    )


def _seen(status: RolloutStatus) -> int:
    counts = status.step_counts.get("canary")
    return 0 if counts is None else counts.n
