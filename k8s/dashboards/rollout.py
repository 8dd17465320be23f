"""Rollout / A-B: where a rollout is, why it is there, and the arms that it compares."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.dashboards import promql as q
from k8s.dashboards.frame import Section, Variable, dashboard
from k8s.dashboards.panels import (
    ERROR_RATIO,
    GREEN,
    RED,
    YELLOW,
    Panel,
    Query,
    bars,
    lines,
    number,
    signed,
    states,
)

PLACE = 'route="$place"'
ROUTE = 'route="$route"'
ARMS = (ROUTE, 'arm=~"stable|canary"')


def build() -> Dashboard:
    """The dashboard."""
    return dashboard(
        "stillhouse-rollout",
        "One rollout or A/B test: phase, weight, evidence against thresholds, decisions, and the arms.",
        (
            Variable("route", "Route", "label_values(stillhouse_split_weight, route)", many=False),
            Variable(
                "place",
                "Rollout of (route, or route#slot of an A/B/n test)",
                'label_values(stillhouse_rollout_phase{route=~"$route(#[0-9]+)?"}, route)',
                many=False,
            ),
        ),
        (_now(), _evidence(), _samples(), _arms()),
    )


def _now() -> Section:
    share = q.ratio(
        q.largest("stillhouse_rollout_samples", "", PLACE, 'arm="canary"'),
        f"sum (max by (arm) ({q.select('stillhouse_rollout_samples', PLACE)}))",
    )
    return Section(
        "Where it is",
        (
            states(
                "Phase",
                "The phase that the rollout of this place is in.",
                Query(q.largest("stillhouse_rollout_phase", "phase", PLACE), "{{phase}}"),
                width=12,
            ),
            number(
                "Step",
                "Step of the ramp, from 1; 0 before the first.",
                "short",
                Query(q.largest("stillhouse_rollout_step", "", PLACE), "step"),
                width=3,
            ),
            number(
                "Weight",
                "The canary's share of the route's traffic, as the controller wants it.",
                "percentunit",
                Query(q.largest("stillhouse_rollout_weight", "", PLACE), "weight"),
                width=3,
            ),
            number(
                "Canary's share of the evidence",
                "Of all requests counted since the rollout began, earlier steps included.",
                "percentunit",
                Query(share, "share"),
                width=3,
            ),
            number(
                "Controller",
                "1 while a controller holds the lease; without one nothing advances and nothing rolls back.",
                "short",
                Query(q.largest("stillhouse_rollout_controller_leader", ""), "leader"),
                width=3,
                thresholds=((1.0, GREEN),),
                base=RED,
            ),
        ),
    )


def _evidence() -> Section:
    return Section(
        "Evidence (natural logarithms of e-values; a test decides where its line meets the threshold)",
        (_test("harm", "Harm: rolls back"), _test("noninferior", "No worse: advances, then promotes")),
    )


def _test(test: str, title: str) -> Panel:
    which = f'test="{test}"'
    return signed(
        title,
        "Log e-value of each metric, and the threshold at which the test decides. Valid at every look.",
        "short",
        Query(q.largest("stillhouse_rollout_log_evalue", "metric", PLACE, which), "{{metric}}"),
        Query(q.largest("stillhouse_rollout_log_threshold", "", PLACE, which), "threshold"),
        width=12,
    )


def _samples() -> Section:
    return Section(
        "Samples and decisions",
        (
            lines(
                "Samples by arm",
                "Requests counted as evidence since the rollout began.",
                "short",
                Query(q.largest("stillhouse_rollout_samples", "arm", PLACE), "{{arm}}"),
                width=6,
            ),
            bars(
                "Decisions",
                "What controllers decided for this place since they started, by word.",
                "short",
                Query(q.total("stillhouse_rollout_decisions_total", "decision", PLACE), "{{decision}}"),
                width=6,
            ),
            lines(
                "Weight: wanted, in force, seen",
                "The controller's weight, the split's, and the canary's share of requests. Apart for long: "
                "routers lag, or traffic is not split as it was told.",
                "percentunit",
                Query(q.largest("stillhouse_rollout_weight", "", PLACE), "wanted"),
                Query(q.largest("stillhouse_split_weight", "", ROUTE), "in force"),
                Query(
                    q.ratio(
                        q.rate("stillhouse_requests_total", "", ROUTE, 'arm="canary"'),
                        q.rate("stillhouse_requests_total", "", *ARMS),
                    ),
                    "seen",
                ),
                width=6,
                top=1,
            ),
            number(
                "Sample-ratio mismatch",
                "1 once traffic is shown not to be split as told: its evidence cannot be trusted.",
                "short",
                Query(q.largest("stillhouse_rollout_sample_ratio_mismatch", "", PLACE), "mismatch"),
                width=3,
                thresholds=((1.0, RED),),
            ),
            number(
                "Time in this phase",
                "Since the rollout came into its phase.",
                "s",
                Query(
                    f"time() - {q.largest('stillhouse_rollout_phase_since_timestamp_seconds', '', PLACE)}",
                    "since",
                ),
                width=3,
                thresholds=((86400.0, YELLOW), (604800.0, RED)),
            ),
        ),
    )


def _arms() -> Section:
    graded = q.rate("stillhouse_grades_total", "arm, grader", *ARMS)
    passed = q.rate("stillhouse_grades_total", "arm, grader", *ARMS, 'verdict="pass"')
    return Section(
        "The arms compared (concurrent traffic)",
        (
            lines(
                "Errors",
                "Share of counted requests that the arm failed.",
                "percentunit",
                Query(q.errors("arm", *ARMS), "{{arm}}"),
                width=6,
                thresholds=ERROR_RATIO,
            ),
            _quantiles("TTFT", "Arrival to the first byte, streaming requests.", "stillhouse_ttft_seconds"),
            _quantiles("Whole answer", "Arrival to the end of the answer.", "stillhouse_e2e_seconds"),
            lines(
                "Grades passed",
                "Share of graded answers that passed, by arm and grader.",
                "percentunit",
                Query(q.ratio(passed, graded), "{{arm}} {{grader}}"),
                width=6,
                top=1,
            ),
        ),
    )


def _quantiles(title: str, description: str, metric: str) -> Panel:
    series = (Query(q.quantile(p, metric, "arm", *ARMS), f"{{{{arm}}}} p{p * 100:g}") for p in (0.5, 0.95))
    return lines(f"{title} p50 / p95", description, "s", *series, width=6)
