"""Route: one route's arms side by side, from traffic to the quality of their answers."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.dashboards import promql as q
from k8s.dashboards.frame import Section, Variable, dashboard
from k8s.dashboards.panels import (
    ANY_IS_BAD,
    E2E_S,
    ERROR_RATIO,
    OVERHEAD_S,
    TPOT_S,
    TTFT_S,
    Panel,
    Query,
    Thresholds,
    lines,
    number,
)

ROUTE = 'route="$route"'
ARMS = (ROUTE, 'arm=~"$arm"')


def build() -> Dashboard:
    """The dashboard."""
    return dashboard(
        "stillhouse-route",
        "One route: its arms side by side, from traffic to the quality of their answers.",
        (
            Variable("route", "Route", "label_values(stillhouse_split_weight, route)", many=False),
            Variable("arm", "Arm", f"label_values(stillhouse_in_flight{{{ROUTE}}}, arm)"),
        ),
        (_now(), _traffic(), _latency(), _tokens(), _refusals(), _quality()),
    )


def _now() -> Section:
    return Section(
        "Now",
        (
            number(
                "Requests",
                "Requests a second of the chosen arms.",
                "reqps",
                Query(q.rate("stillhouse_requests_total", "", *ARMS), "requests"),
            ),
            number(
                "Errors",
                "Share of counted requests that the chosen arms failed.",
                "percentunit",
                Query(q.errors("", *ARMS), "errors"),
                thresholds=ERROR_RATIO,
            ),
            _figure(
                "TTFT p95",
                "Arrival to the first byte, streaming requests.",
                "stillhouse_ttft_seconds",
                TTFT_S,
            ),
            _figure("TPOT p95", "Time per output token after the first.", "stillhouse_tpot_seconds", TPOT_S),
            _figure("Whole answer p95", "Arrival to the end of the answer.", "stillhouse_e2e_seconds", E2E_S),
            number(
                "Canary's share",
                "The weight of the split in force.",
                "percentunit",
                Query(q.largest("stillhouse_split_weight", "", ROUTE), "share"),
            ),
        ),
        height=4,
    )


def _traffic() -> Section:
    return Section(
        "Traffic",
        (
            lines(
                "Requests by arm",
                "Requests a second by the arm and upstream they were assigned to.",
                "reqps",
                Query(q.rate("stillhouse_requests_total", "arm, upstream", *ARMS), "{{arm}} {{upstream}}"),
                stacked=True,
            ),
            lines(
                "Errors by arm",
                "Share of counted requests that the arm failed, whoever helped out.",
                "percentunit",
                Query(q.errors("arm", *ARMS), "{{arm}}"),
                thresholds=ERROR_RATIO,
            ),
            lines(
                "How requests ended",
                "Requests a second by arm and outcome; client_closed and client_error are nobody's fault.",
                "reqps",
                Query(q.rate("stillhouse_requests_total", "arm, outcome", *ARMS), "{{arm}} {{outcome}}"),
            ),
        ),
    )


def _latency() -> Section:
    return Section(
        "Latency, p50 / p95 / p99 by arm",
        (
            _quantiles(
                "TTFT", "Streaming requests: arrival to the first byte.", "stillhouse_ttft_seconds", TTFT_S
            ),
            _quantiles(
                "TPOT", "Streaming: time per output token after the first.", "stillhouse_tpot_seconds", TPOT_S
            ),
            _quantiles("Whole answer", "Arrival to the end of the answer.", "stillhouse_e2e_seconds", E2E_S),
        ),
    )


def _tokens() -> Section:
    return Section(
        "Tokens and load",
        (
            lines(
                "Tokens by arm",
                "Tokens a second, by the arm that made them (after a fallback: the one that helped).",
                "short",
                Query(q.rate("stillhouse_prompt_tokens_total", "arm", *ARMS), "{{arm}} prompt"),
                Query(q.rate("stillhouse_completion_tokens_total", "arm", *ARMS), "{{arm}} completion"),
            ),
            lines(
                "Completion tokens a request",
                "Mean length of the answers: a canary that says much less or more is not the same product.",
                "short",
                Query(
                    q.ratio(
                        q.rate("stillhouse_completion_tokens_total", "arm", *ARMS),
                        q.rate("stillhouse_e2e_seconds_count", "arm", *ARMS),
                    ),
                    "{{arm}}",
                ),
            ),
            lines(
                "In flight and waiting",
                "Requests assigned and not ended, by arm; requests that wait for a place in the route.",
                "short",
                Query(q.total("stillhouse_in_flight", "arm", *ARMS), "{{arm}}"),
                Query(q.total("stillhouse_queued", "", ROUTE), "waiting"),
            ),
        ),
    )


def _refusals() -> Section:
    return Section(
        "Help, refusals and keys",
        (
            lines(
                "Fallbacks and retries",
                "Requests a second that another arm was asked for, or that were tried again.",
                "reqps",
                Query(q.rate("stillhouse_fallbacks_total", "", ROUTE), "fallback"),
                Query(q.rate("stillhouse_retries_total", "arm", *ARMS), "{{arm}} retry"),
                width=6,
                thresholds=ANY_IS_BAD,
            ),
            lines(
                "Refused",
                "Replies of 400 and above a second: 429 is a limit, 5xx nobody could answer.",
                "reqps",
                Query(q.rate("stillhouse_responses_total", "code", ROUTE, 'code=~"[45].."'), "{{code}}"),
                width=6,
            ),
            lines(
                "Requests by key",
                "Requests a second of the ten busiest API keys, by id, over all routes they may ask.",
                "reqps",
                Query("topk(10, " + q.rate("stillhouse_key_requests_total", "key") + ")", "{{key}}"),
                width=6,
            ),
            lines(
                "Keys refused",
                "Requests a second refused because of their key, by reason, over all routes.",
                "reqps",
                Query(q.rate("stillhouse_key_refused_total", "reason"), "{{reason}}"),
                width=6,
            ),
            lines(
                "Router's own time",
                "Between a request's last byte and asking the upstream, waiting for a place included.",
                "s",
                *(
                    Query(q.quantile(p, "stillhouse_router_overhead_seconds", "", ROUTE), f"p{p * 100:g}")
                    for p in q.QUANTILES
                ),
                width=12,
                thresholds=OVERHEAD_S,
            ),
            lines(
                "Shadows not sent",
                "Shadow and mirrored requests that a budget or a bound on their number held back.",
                "reqps",
                Query(q.rate("stillhouse_shadows_dropped_total", "reason", ROUTE), "{{reason}}"),
                width=12,
            ),
        ),
    )


def _quality() -> Section:
    passed = q.rate("stillhouse_grades_total", "arm, grader", *ARMS, 'verdict="pass"')
    up = q.rate("stillhouse_feedback_total", "arm", *ARMS, 'verdict="good"')
    thumbs = q.rate("stillhouse_feedback_total", "arm", *ARMS, 'verdict=~"good|bad"')
    return Section(
        "Quality",
        (
            lines(
                "Grades passed",
                "Share of graded answers that passed, by arm and grader.",
                "percentunit",
                Query(
                    q.ratio(passed, q.rate("stillhouse_grades_total", "arm, grader", *ARMS)),
                    "{{arm}} {{grader}}",
                ),
                top=1,
            ),
            lines(
                "Users' verdicts",
                "Share of users' judgements that were good, by arm.",
                "percentunit",
                Query(q.ratio(up, thumbs), "{{arm}}"),
                top=1,
            ),
            lines(
                "Graders in trouble",
                "Answers a second that a grader gave no score, and its exceptions, over all routes.",
                "short",
                Query(q.rate("stillhouse_ungraded_total", "grader, reason"), "{{grader}} {{reason}}"),
                Query(q.rate("stillhouse_grader_errors_total", "grader"), "{{grader}} exceptions"),
            ),
        ),
    )


def _figure(title: str, description: str, metric: str, thresholds: Thresholds) -> Panel:
    return number(
        title, description, "s", Query(q.quantile(0.95, metric, "", *ARMS), "p95"), thresholds=thresholds
    )


def _quantiles(title: str, description: str, metric: str, thresholds: Thresholds) -> Panel:
    series = (Query(q.quantile(p, metric, "arm", *ARMS), f"{{{{arm}}}} p{p * 100:g}") for p in q.QUANTILES)
    return lines(title, description, "s", *series, thresholds=thresholds)
