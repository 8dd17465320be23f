"""Starting an A/B/n test: several students at once on one route, a rollout each, all against its stable arm.

Every check is made for every student before anything is stored, and all of them are stored or none. Knows
nothing about terminals, nor about how a test is decided: each rollout is judged like any other.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from contracts.errors import ConfigError, ConflictError
from contracts.metrics import FEEDBACK, GRADED_KINDS, MetricKind
from contracts.model import ModelRecord
from contracts.rollout import RolloutSpec
from registry.store import Registry
from serve.rollout.aliases import CHALLENGER
from serve.rollout.decide import initial
from serve.rollout.notices import started
from serve.rollout.policy import RolloutPolicy, ab_policy, make_spec
from serve.rollout.sources import Sources
from serve.rollout.start import check_model, check_route, downloaded, split_of, who
from serve.state.rollouts import RolloutState
from serve.state.traffic import TrafficState


def start_abn(
    rollouts: RolloutState,
    traffic: TrafficState,
    registry: Registry,
    policy: RolloutPolicy,
    route: str,
    models: Sequence[str],
    weight: float,
    *,
    by: str | None = None,
    reason: str = "",
    force: bool = False,
    force_quarantined: bool = False,
    sources: Sources | None = None,
) -> list[RolloutSpec]:
    """Check that the students may be tried on the route, and hand a rollout of each to the controller.

    Args:
        weight: each student's share; the stable arm keeps the rest, no less than one of them.

    Raises: as `start_rollout`; ConfigError also for shares or metrics that such a test cannot have, and for a
        student named twice.
    """
    policy = abn_policy(policy, len(models), weight)
    split = split_of(traffic, route)
    records = [registry.get(model) for model in models]
    _check_different(records)
    for record in records:
        check_model(rollouts, split, record, force_quarantined)
    check_route(rollouts, route, force)
    if sources is not None:
        policy, reason = sources.prepare(policy, split, reason, force)
    records = [downloaded(registry, record) for record in records]
    specs = _specs(policy, route, records, weight, who(by, reason))
    made = [(spec, initial(spec)) for spec in specs]
    rollouts.create_all(made, [notice for spec, status in made for notice in started(spec, status)])
    for spec, record in zip(specs, records, strict=True):
        why = reason or f"A/B/n test {spec.test} started"
        registry.set_alias(record.name, CHALLENGER, record.version, f"rollout {spec.id}", why)
    return specs


def abn_policy(policy: RolloutPolicy, students: int, weight: float) -> RolloutPolicy:
    """The policy of each student of a test: one step of a fixed weight, and its part of the error budgets.

    Each alpha is divided by the number of students (Bonferroni), so that it bounds the chance that any of
    them is thrown back, or shown non-inferior, wrongly.

    Raises: ConfigError naming what cannot be.
    """
    if students < 2:
        raise ConfigError("an A/B/n test needs two students at least; with one, start an A/B test.")
    if (students + 1) * weight > 1.0 + 1e-9:
        raise ConfigError(
            f"--ab: {students} students of {weight:g} leave the stable arm {1 - students * weight:.3g}, less "
            f"than each of them gets; the weight may be {1 / (students + 1):.3g} at most."
        )
    _check_metrics(policy)
    changes = {
        "alpha_harm": policy.alpha_harm / students,
        "alpha_promote": policy.alpha_promote / students,
        "watch_s": 0.0,
    }
    return ab_policy(policy, weight).model_copy(update=changes)


def _check_metrics(policy: RolloutPolicy) -> None:
    if policy.mirror > 0 or any(m.kind is MetricKind.PAIRS for m in policy.metrics):
        raise ConfigError(
            "mirror: an A/B/n test has no pairs, as only one student could be mirrored; name a policy "
            "without 'mirror' and metrics of kind 'pairs'."
        )
    for metric in policy.metrics:
        if metric.kind in GRADED_KINDS and metric.grader == FEEDBACK:
            raise ConfigError(
                f"metric {metric.key}: feedback on a stable answer counts for one rollout, so it cannot "
                "compare several students with the stable arm; name a policy without it."
            )


def _check_different(records: Sequence[ModelRecord]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        digest = record.artifact.digest
        if digest in seen:
            raise ConflictError(
                f"{record.ref} is the same artifact as {seen[digest]}; name each student once."
            )
        seen[digest] = record.ref


def _specs(
    policy: RolloutPolicy, route: str, records: Sequence[ModelRecord], weight: float, by: str
) -> list[RolloutSpec]:
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    test = f"{route[:60]}-test-{stamp}-{uuid.uuid4().hex[:4]}"
    return [
        as_student(make_spec(policy, route, record, now=now, by=by), test, slot, slot * weight)
        for slot, record in enumerate(records)
    ]


def as_student(spec: RolloutSpec, test: str, slot: int, start: float) -> RolloutSpec:
    """The spec as one of a test's students, with its place in the split; ids sort by place."""
    place = {"id": f"{test}-{slot:02d}", "test": test, "slot": slot, "start": start}
    return RolloutSpec(**{**dict(spec), **place})
