"""Where a policy's metrics get their evidence from, checked and pinned before a rollout starts.

A metric that could never have data is refused here, with the field and the fix, instead of waiting for its
deadline. A judge is pinned to its version: one that is changed under way counts under another name, so the
two are never pooled. Knows nothing about phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from contracts.errors import ConfigError, GateError
from contracts.grading import Grader, JudgeCheck, JudgeGrader, Mode, PrometheusConfig
from contracts.metrics import FEEDBACK, GRADED_KINDS, MetricKind, MetricSpec, Role
from contracts.traffic import Split, Upstream
from serve.grading.judge import evidence_name
from serve.rollout.policy import RolloutPolicy
from serve.rollout.queries import check_queries

_DAY_S = 86400.0


@dataclass(frozen=True)
class Sources:
    """What the stack's configuration says of graders, judges and Prometheus."""

    graders: dict[str, Grader] = field(default_factory=dict)
    upstreams: dict[str, Upstream] = field(default_factory=dict)
    """Every declared upstream."""
    prometheus: PrometheusConfig | None = None
    latest_check: Callable[[str], JudgeCheck | None] = lambda _name: None
    """The last check of a judge, by its name with its version."""
    clock: Callable[[], float] = time.time

    def prepare(
        self, policy: RolloutPolicy, split: Split, reason: str = "", force: bool = False
    ) -> tuple[RolloutPolicy, str]:
        """The policy with its judges pinned, and the reason of the start with what `force` went over.

        Raises:
            ConfigError: a metric's grader or query does not exist, or can have no data on this route.
            GateError: a judge that decides was not checked against people, or did not agree with them.
        """
        for metric in policy.metrics:
            if metric.kind in GRADED_KINDS:
                self._check_grader(metric, policy, split.route)
        check_queries(policy.metrics, self.prometheus, split, self.clock())
        if not force:
            self.require_checked_judges(policy.metrics)
        elif skipped := self.unchecked_judges(policy.metrics):
            forced = f"forced past the check of judge {', '.join(skipped)}"
            reason = f"{reason}; {forced}" if reason else forced
        pinned = policy.model_copy(update={"metrics": tuple(self._pinned(m) for m in policy.metrics)})
        return pinned, reason

    def require_checked_judges(self, metrics: tuple[MetricSpec, ...]) -> None:
        """Raises GateError naming the command unless every judge that decides agreed with people lately."""
        for metric in metrics:
            judge = self._judge(metric)
            if judge is not None and metric.role is not Role.INFO:
                why = self._unchecked(metric.grader, judge)
                if why is not None:
                    raise GateError(
                        f"metric {metric.key}: judge {metric.grader!r} {why}. Run 'stillhouse judge check "
                        f"{metric.grader} --anchors FILE.jsonl', give the metric the role 'info', or say "
                        "--force to start all the same."
                    )

    def unchecked_judges(self, metrics: tuple[MetricSpec, ...]) -> list[str]:
        """The judges that decide without a passing check: what `--force` went over, for the audit."""
        found = []
        for metric in metrics:
            judge = self._judge(metric)
            if judge is not None and metric.role is not Role.INFO and self._unchecked(metric.grader, judge):
                found.append(metric.grader)
        return list(dict.fromkeys(found))

    def _unchecked(self, name: str, judge: JudgeGrader) -> str | None:
        """Why a judge may not decide, None when it may."""
        check = self.latest_check(evidence_name(name, judge, self.upstreams[judge.upstream]))
        if check is None:
            return "was never checked against people's judgements, as it is configured now"
        days = (self.clock() - check.at) / _DAY_S
        if days > judge.check_max_age_days:
            return f"was last checked {days:.0f} days ago, at most {judge.check_max_age_days:g} are allowed"
        if check.anchors < judge.min_anchors:
            return f"was checked on {check.anchors} anchors, at least {judge.min_anchors} are needed"
        if check.agreement < judge.min_agreement:
            return (
                f"agreed with people on {100 * check.agreement:.0f} % of {check.anchors} anchors, at least "
                f"{100 * judge.min_agreement:g} % are needed"
            )
        return None

    def _judge(self, metric: MetricSpec) -> JudgeGrader | None:
        found = self.graders.get(metric.grader) if metric.kind in GRADED_KINDS else None
        return found if isinstance(found, JudgeGrader) else None

    def _check_grader(self, metric: MetricSpec, policy: RolloutPolicy, route: str) -> None:
        pairs = metric.kind is MetricKind.PAIRS
        if pairs and policy.mirror == 0:
            raise ConfigError(
                f"metric {metric.key}: pairs come from mirrored requests; give the policy 'mirror', e.g. 0.1."
            )
        if metric.grader == FEEDBACK and not pairs:
            return
        grader = self.graders.get(metric.grader)
        if grader is None:
            known = ", ".join(sorted(self.graders)) or "none"
            raise ConfigError(
                f"metric {metric.key}: there is no grader {metric.grader!r}; there are: {known}."
            )
        if not grader.grades(route):
            raise ConfigError(f"metric {metric.key}: grader {metric.grader!r} is not for route {route!r}.")
        if pairs and grader.against is None:
            raise ConfigError(
                f"metric {metric.key}: grader {metric.grader!r} grades no pairs ('against: null')."
            )
        if not pairs and grader.mode is Mode.PAIRWISE:
            raise ConfigError(
                f"metric {metric.key}: grader {metric.grader!r} only compares pairs; use kind 'pairs'."
            )

    def _pinned(self, metric: MetricSpec) -> MetricSpec:
        judge = self._judge(metric)
        if judge is None:
            return metric
        name = evidence_name(metric.grader, judge, self.upstreams[judge.upstream])
        return metric.model_copy(update={"grader": name, "name": metric.key})
