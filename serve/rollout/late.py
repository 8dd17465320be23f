"""Late harm: every guardrail's e-detector over the concurrent counts of the watch, and their one alarm.

The mean of e-detectors is an e-detector, so one average run length holds for all guardrails together. Knows
nothing of phases; its windows have the student as canary already.
"""

from __future__ import annotations

import math

from contracts.metrics import Role
from contracts.rollout import MetricStatus, RolloutSpec, WatchStatus
from serve.rollout import evidence
from serve.rollout.observation import SeenWindow
from serve.rollout.stats import detector
from serve.rollout.stats.combine import log_mean_exp


def update(spec: RolloutSpec, watch: WatchStatus, window: SeenWindow) -> WatchStatus:
    """Fold one window of swapped arms into the detectors of the guardrails."""
    after = evidence.update(spec, watch.metrics, window)
    known = {m.name: m for m in watch.metrics}
    guards = {m.key for m in spec.metrics if m.role is Role.GUARDRAIL}
    states = dict(watch.detectors)
    for metric in after:
        if metric.name in guards:
            states.update(_advance(known[metric.name], metric, watch.detectors))
    values = {name: _value(name, states) for name in sorted(guards)}
    worst = max(values, key=lambda name: values[name], default="")
    strongest = log_mean_exp(list(values.values())) if values else 0.0
    return watch.model_copy(
        update={"metrics": after, "detectors": states, "log_alarm": strongest, "worst": worst}
    )


def alarmed(spec: RolloutSpec, watch: WatchStatus) -> bool:
    """True when late harm must be assumed."""
    return bool(watch.worst) and watch.log_alarm >= math.log(spec.watch_arl)


def _advance(
    before: MetricStatus, after: MetricStatus, states: dict[str, list[float]]
) -> dict[str, list[float]]:
    """One detector a test of the metric (a latency metric has one a threshold), each a row of logs."""
    found = {}
    for test, increments in _increments(before, after).items():
        key = f"{after.name}/{test}"
        logs = tuple(states[key][:-1]) if key in states else (0.0,) * len(increments)
        weights = detector.HARM_WEIGHTS if len(increments) == len(detector.HARM_WEIGHTS) else None
        now = detector.look(detector.State(logs, 0.0), increments, weights)
        found[key] = [*now.logs, now.log_value]
    return found


def _increments(before: MetricStatus, after: MetricStatus) -> dict[str, tuple[float, ...]]:
    """What a window multiplied into each test's harm alternatives; tests without any: into their mixture."""
    tests = {key: values for key, values in after.state.items() if key.startswith("harm:")}
    if not tests:
        return {"harm": (after.log_harm - before.log_harm,)}
    return {
        key: tuple(b - a for a, b in zip(before.state.get(key, [0.0] * len(values)), values, strict=True))
        for key, values in tests.items()
    }


def _value(name: str, states: dict[str, list[float]]) -> float:
    """Log of the metric's detector: the mean over its tests."""
    values = [state[-1] for key, state in states.items() if key.startswith(f"{name}/")]
    return log_mean_exp(values) if values else 0.0
