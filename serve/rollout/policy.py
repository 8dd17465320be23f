"""Rollout policies: the reusable, named defaults of a team, and the spec made from one of them.

Read from the stack's configuration (`policies:`). Knows nothing about a running rollout.
"""

from __future__ import annotations

import itertools
import time
import uuid

from pydantic import Field, model_validator

from contracts.config import StrictConfig
from contracts.errors import ConfigError
from contracts.hooks import HookSpec
from contracts.metrics import MetricKind, MetricSpec
from contracts.model import ModelRecord
from contracts.rollout import RolloutSpec, SrmRule, Step
from contracts.traffic import Upstream
from serve.rollout.schedule import parse_window

DEFAULT_STEPS = (
    Step(weight=0.01, min_samples=20, min_dwell_s=120),
    Step(weight=0.05, min_samples=50, min_dwell_s=120),
    Step(weight=0.10, min_samples=100, min_dwell_s=180),
    Step(weight=0.25, min_samples=100, min_dwell_s=180),
    Step(weight=0.50, min_samples=100, min_dwell_s=180),
)
DEFAULT_METRICS = (
    MetricSpec(kind=MetricKind.ERRORS, margin=0.02),
    MetricSpec(kind=MetricKind.TTFT, margin=0.05, thresholds_s=(0.4, 1.0, 3.0)),
    MetricSpec(kind=MetricKind.E2E, margin=0.05, thresholds_s=(2.0, 6.0, 15.0)),
)


class RolloutPolicy(StrictConfig):
    """How a rollout of this team goes: ramp, guardrails, patience. 100 % is the promotion, not a step.

    Rates are shares of requests (0.02 = 2 percentage points), times are seconds.
    """

    steps: tuple[Step, ...] = DEFAULT_STEPS
    """The ramp: rising weights below 1, each with the canary requests and the time it takes at least."""
    metrics: tuple[MetricSpec, ...] = DEFAULT_METRICS
    """Guardrails; every one must be shown non-inferior. 'quality' needs a grader on the route."""
    mirror: float = Field(default=0.0, ge=0, le=1)
    """Share of the stable arm's conversations that the canary is asked too, for metrics of kind 'pairs'."""
    alpha_harm: float = Field(default=0.05, gt=0, lt=1)
    """Chance at most that a harmless student is rolled back by the tests."""
    alpha_promote: float = Field(default=0.05, gt=0, lt=1)
    """Chance at most that a student worse than a margin is promoted."""
    look_s: float = Field(default=60.0, gt=0, le=3600)
    """Seconds between looks at the evidence."""
    no_data_deadline_s: float = Field(default=3600.0, gt=0)
    """Roll back when the canary got no counted request for this long."""
    kill_switch_errors: float = Field(default=0.5, gt=0, le=1)
    """Roll back at once when this share of at least 20 canary requests failed."""
    warm_timeout_s: float = Field(default=900.0, gt=0)
    """Give up when the student's application is not up and answering after this."""
    drain_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for the loser's last requests."""
    hold_final: bool = False
    """An A/B test: stay on the last step until a person promotes or aborts."""
    windows: tuple[str, ...] = ()
    """When a step may begin and a promotion happen, e.g. 'Mon-Fri 09:00-17:00 Europe/Berlin'; several may be
    given, empty is always. A rollback needs no window."""
    cooldown_s: float = Field(default=600.0, ge=0)
    """Seconds after a rollback in which the route takes no new rollout (unless --force)."""
    srm: SrmRule = SrmRule.HOLD
    """What to do when the canary does not get the share of requests that it was given."""
    alpha_srm: float = Field(default=0.001, gt=0, lt=1)
    """Chance at most that a step with a sound split is said to have a mismatch."""
    srm_unit_requests: float = Field(default=10.0, ge=1)
    """Requests that count as one in the sample-ratio check, as conversations are assigned whole: E[s²]/E[s]
    of a conversation's requests s, from their mean (all alike) to about twice that; 1: assigned alone."""
    watch_s: float = Field(default=0.0, ge=0)
    """Seconds after the promotion in which late harm restores the former stable; 0 is off. The built-in
    policy, which is used where the configuration has none, says four hours."""
    holdback: float = Field(default=0.05, gt=0, le=0.5)
    """Share of requests that the former stable keeps during the watch, as the control arm."""
    watch_arl: float = Field(default=28_800.0, gt=1)
    """Looks between false alarms of the watch, on average at least."""
    hooks: tuple[HookSpec, ...] = ()
    """Webhooks: told of events (`on`), or asked before a move (`confirm`)."""

    @model_validator(mode="after")
    def _check(self) -> RolloutPolicy:
        weights = [s.weight for s in self.steps]
        if not weights or any(b <= a for a, b in itertools.pairwise(weights)):
            raise ValueError(f"steps: weights must rise strictly, as in 0.01, 0.05, 0.1, 0.25; got {weights}")
        if weights[-1] >= 1.0:
            raise ValueError("steps: leave out the step of weight 1; the promotion itself moves all traffic")
        if not self.metrics:
            raise ValueError(
                "metrics: give one at least, e.g. {kind: errors, margin: 0.02}; no data, no promotion"
            )
        keys = [m.key for m in self.metrics]
        twice = sorted({k for k in keys if keys.count(k) > 1})
        if twice:
            raise ValueError(f"metrics: two are called {', '.join(twice)}; give one of them another name")
        for window in self.windows:
            parse_window(window)
        if 0 < self.watch_s < 2 * self.look_s:
            raise ValueError(f"watch_s: must be 0 (off) or at least two looks, {2 * self.look_s:g} s")
        if self.no_data_deadline_s < 2 * self.look_s:
            least = f"{2 * self.look_s:g} s, two looks"
            raise ValueError(
                f"no_data_deadline_s: must be at least {least}; got {self.no_data_deadline_s:g} s"
            )
        return self


BUILT_IN = RolloutPolicy(watch_s=4 * 3600.0)
"""Used where a configuration has no policy: the defaults, and a watch of four hours with 5 % held back."""


def student_upstream(record: ModelRecord) -> Upstream:
    """The Ray Serve application of one model version: each version has its own, named after it."""
    name = f"{record.name}-v{record.version}"
    return Upstream(name=name, model=name, app=name, digest=record.artifact.digest)


def make_spec(
    policy: RolloutPolicy,
    route: str,
    record: ModelRecord,
    upstream: Upstream | None = None,
    now: float | None = None,
    by: str = "cli",
) -> RolloutSpec:
    """The immutable spec of one rollout of a registered model on a route.

    Args:
        upstream: where the candidate runs; None deploys the record's artifact as an application of its own.
        now: Unix seconds.
    """
    at = time.time() if now is None else now
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(at))
    shared = {name: getattr(policy, name) for name in RolloutPolicy.model_fields}
    return RolloutSpec(
        id=f"{route[:60]}-{stamp}-{uuid.uuid4().hex[:4]}",
        route=route,
        model_ref=record.ref,
        candidate=upstream or student_upstream(record),
        artifact_uri=record.artifact.uri if upstream is None else None,
        digest=record.artifact.digest,
        created_at=at,
        created_by=by,
        **shared,
    )


def ab_policy(policy: RolloutPolicy, weight: float) -> RolloutPolicy:
    """The policy as an A/B test: one step of a fixed weight that holds until a person decides.

    Raises: ConfigError for a weight outside (0, 1).
    """
    if not 0 < weight < 1:
        raise ConfigError(f"--ab: the weight must be between 0 and 1, as in 0.5; got {weight:g}")
    return policy.model_copy(update={"steps": (Step(weight=weight),), "hold_final": True})
