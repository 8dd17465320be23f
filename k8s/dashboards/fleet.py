"""Fleet: is anything wrong anywhere, who serves what, and what was dropped; all routes on one screen."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.dashboards import promql as q
from k8s.dashboards.frame import Section, Variable, dashboard
from k8s.dashboards.panels import (
    ANY_IS_BAD,
    E2E_S,
    ERROR_RATIO,
    NONE_IS_BAD,
    OVERHEAD_S,
    RED,
    TO_ENGINE,
    TO_ROUTE,
    TTFT_S,
    Query,
    lines,
    listing,
    number,
)

ROUTES = 'route=~"$route"'
ANSWERED = 'arm!="none"'


def build() -> Dashboard:
    """The dashboard."""
    return dashboard(
        "stillhouse-fleet",
        "All routes: traffic, errors, latency, who is on which arm, replicas and drops. Start here.",
        (Variable("route", "Route", "label_values(stillhouse_split_weight, route)"),),
        (_now(), _traffic(), _latency(), _serving(), _drops()),
    )


def _now() -> Section:
    return Section(
        "Now",
        (
            number(
                "Requests",
                "Requests a second that an arm was assigned, all chosen routes.",
                "reqps",
                Query(q.rate("stillhouse_requests_total", "", ROUTES, ANSWERED), "requests"),
            ),
            number(
                "Errors",
                "Share of requests that their arm failed, helped out by a fallback or not.",
                "percentunit",
                Query(q.errors("", ROUTES), "errors"),
                thresholds=ERROR_RATIO,
            ),
            number(
                "TTFT p95",
                "Streaming requests: 95 % got their first byte within this.",
                "s",
                Query(q.quantile(0.95, "stillhouse_ttft_seconds", "", ROUTES), "p95"),
                thresholds=TTFT_S,
            ),
            number(
                "In flight",
                "Requests assigned and not ended.",
                "short",
                Query(q.total("stillhouse_in_flight", "", ROUTES), "in flight"),
            ),
            number(
                "Routers",
                "Living router processes.",
                "short",
                Query(q.total("stillhouse_router_processes", ""), "routers"),
                thresholds=NONE_IS_BAD,
                base=RED,
            ),
            number(
                "Log rows lost",
                "Rows of the request log lost before they were written, in the time range.",
                "short",
                Query(q.increase("stillhouse_log_dropped_total", ""), "lost"),
                thresholds=ANY_IS_BAD,
            ),
        ),
        height=4,
    )


def _traffic() -> Section:
    return Section(
        "Traffic and errors",
        (
            lines(
                "Requests by route",
                "Requests a second that an arm was assigned. Click a series to open its route.",
                "reqps",
                Query(q.rate("stillhouse_requests_total", "route", ROUTES, ANSWERED), "{{route}}"),
                stacked=True,
                link=TO_ROUTE,
            ),
            lines(
                "Errors by route",
                "Share of requests that the arm failed: upstream error, timeout, broken stream.",
                "percentunit",
                Query(q.errors("route", ROUTES), "{{route}}"),
                thresholds=ERROR_RATIO,
                link=TO_ROUTE,
            ),
            lines(
                "Replies by status",
                "What clients got, after fallbacks: 429 is a limit, 5xx nobody could answer.",
                "reqps",
                Query(q.rate("stillhouse_responses_total", "code", ROUTES), "{{code}}"),
                stacked=True,
            ),
        ),
    )


def _latency() -> Section:
    return Section(
        "Latency and load",
        (
            lines(
                "TTFT p95 by route",
                "Streaming requests: arrival to first byte of the answer.",
                "s",
                Query(q.quantile(0.95, "stillhouse_ttft_seconds", "route", ROUTES), "{{route}}"),
                thresholds=TTFT_S,
                link=TO_ROUTE,
            ),
            lines(
                "Whole answer p95 by route",
                "Arrival to the end of the answer, streaming or not.",
                "s",
                Query(q.quantile(0.95, "stillhouse_e2e_seconds", "route", ROUTES), "{{route}}"),
                thresholds=E2E_S,
                link=TO_ROUTE,
            ),
            lines(
                "Router's own time p99",
                "Between a request's last byte and asking the upstream, waiting for a place included.",
                "s",
                Query(q.quantile(0.99, "stillhouse_router_overhead_seconds", "route", ROUTES), "{{route}}"),
                thresholds=OVERHEAD_S,
            ),
            lines(
                "In flight by route",
                "Requests assigned and not ended.",
                "short",
                Query(q.total("stillhouse_in_flight", "route", ROUTES), "{{route}}"),
                stacked=True,
                link=TO_ROUTE,
            ),
            lines(
                "Waiting for a place",
                "Requests in the queue of a route with limits; beyond the queue they get 429.",
                "short",
                Query(q.total("stillhouse_queued", "route", ROUTES), "{{route}}"),
                thresholds=ANY_IS_BAD,
            ),
            lines(
                "Tokens by route",
                "Prompt and completion tokens a second, by the arm that made them.",
                "short",
                Query(q.rate("stillhouse_prompt_tokens_total", "route", ROUTES), "{{route}} prompt"),
                Query(q.rate("stillhouse_completion_tokens_total", "route", ROUTES), "{{route}} completion"),
            ),
        ),
    )


def _serving() -> Section:
    share = q.largest("stillhouse_arm_share", "route, arm, upstream", ROUTES)
    return Section(
        "Who serves",
        (
            listing(
                "Who is on which arm",
                "Upstreams that routes are split over now, with the share of traffic that each is assigned.",
                "percentunit",
                Query(f"{share} > 0", "Share"),
                {"route": "Route", "arm": "Arm", "upstream": "Upstream"},
                link=TO_ENGINE,
            ),
            lines(
                "Replicas by upstream",
                "Replicas that routers may ask: engines by heartbeat, a plain URL counts as one.",
                "short",
                Query(q.largest("stillhouse_upstream_replicas", "upstream"), "{{upstream}}"),
                width=6,
                thresholds=((0.0, RED), (1.0, "green")),
                link=TO_ENGINE,
            ),
            lines(
                "Controller",
                "1 while one rollout controller holds the lease; seconds of its ticks.",
                "short",
                Query(q.largest("stillhouse_rollout_controller_leader", ""), "leader"),
                Query(q.quantile(0.95, "stillhouse_rollout_tick_seconds", ""), "tick p95, s"),
                width=6,
            ),
        ),
    )


def _drops() -> Section:
    return Section(
        "Drops, help and trouble",
        (
            lines(
                "Request log",
                "Rows a second written, lost, and kept without texts (a detector failed); rows waiting.",
                "short",
                Query(q.rate("stillhouse_log_rows_total", ""), "written/s"),
                Query(q.rate("stillhouse_log_dropped_total", ""), "lost/s"),
                Query(q.rate("stillhouse_log_unredacted_total", ""), "texts withheld/s"),
                Query(q.total("stillhouse_log_queue", ""), "waiting"),
            ),
            lines(
                "Fallbacks and retries",
                "Requests a second that another arm was asked for, or that were tried again.",
                "reqps",
                Query(q.rate("stillhouse_fallbacks_total", "route", ROUTES), "{{route}} fallback"),
                Query(q.rate("stillhouse_retries_total", "route", ROUTES), "{{route}} retry"),
                thresholds=ANY_IS_BAD,
            ),
            lines(
                "Replicas left alone",
                "Times a minute that a replica failed so often that its breaker opened.",
                "short",
                Query("60 * " + q.rate("stillhouse_ejections_total", "upstream"), "{{upstream}}"),
                thresholds=ANY_IS_BAD,
            ),
            lines(
                "Shadows not sent",
                "Shadow and mirrored requests that a budget or a bound on their number held back.",
                "reqps",
                Query(
                    q.rate("stillhouse_shadows_dropped_total", "route, reason", ROUTES),
                    "{{route}} {{reason}}",
                ),
                thresholds=ANY_IS_BAD,
            ),
            lines(
                "State store and feedback",
                "Failed visits to the state store, and ids that feedback cannot join any more.",
                "short",
                Query(q.rate("stillhouse_state_errors_total", ""), "state errors/s"),
                Query(q.rate("stillhouse_served_ids_dropped_total", ""), "ids lost/s"),
                thresholds=ANY_IS_BAD,
            ),
            lines(
                "Log uploads",
                "Segments a minute sent to the remote folder, by result; none without router.log.upload.",
                "short",
                Query("60 * " + q.rate("stillhouse_log_uploads_total", "result"), "{{result}}"),
            ),
        ),
    )
