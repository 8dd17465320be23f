"""Distillation: what the flywheel waits for, what its runs do, and what they may take."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.dashboards import promql as q
from k8s.dashboards.frame import Section, Variable, dashboard
from k8s.dashboards.panels import FULL, RED, YELLOW, Panel, Query, bars, lines, number, signed, states

ROUTES = 'route=~"$route"'
FAILURES = ((1.0, YELLOW), (3.0, RED))


def build() -> Dashboard:
    """The dashboard."""
    return dashboard(
        "stillhouse-distillation",
        "The flywheel: backlog and triggers, runs and their stages, training curves, budget and pressure.",
        (Variable("route", "Route", "label_values(stillhouse_flywheel_runs, route)"),),
        (_now(), _backlog(), _work(), _budget()),
    )


def _now() -> Section:
    return Section(
        "Now",
        (
            _runs("At work", "running|stopped|ending", "Runs with processes: running, stopped or ending."),
            _runs("Waiting", "queued", "Runs that wait for room."),
            _runs("Published", "published", "Runs that ended with a published student."),
            _runs("Refused", "refused", "Runs whose student a gate refused."),
            number(
                "Failures in a row",
                "Most failed runs in a row of a chosen route; each doubles its cooldown.",
                "short",
                Query(q.largest("stillhouse_flywheel_failures_in_a_row", "", ROUTES), "failures"),
                thresholds=FAILURES,
            ),
            number(
                "Daemon's ticks",
                "Ticks a minute of the flywheel's daemon; 0 is a daemon that hangs.",
                "short",
                Query("60 * " + q.rate("stillhouse_flywheel_ticks_total", ""), "ticks/min"),
                base=RED,
                thresholds=((0.1, "green"),),
            ),
        ),
        height=4,
    )


def _backlog() -> Section:
    return Section(
        "Backlog and triggers",
        (
            lines(
                "New rows",
                "Usable rows logged since the route's last run.",
                "short",
                Query(q.largest("stillhouse_flywheel_new_rows", "route", ROUTES), "{{route}}"),
            ),
            signed(
                "Looks at the traffic",
                "Latest look: bits beyond chance, fall of the mean grade, lower bound of the bad share.",
                "short",
                Query(q.largest("stillhouse_flywheel_look", "route, kind", ROUTES), "{{route}} {{kind}}"),
            ),
            lines(
                "Runs by state",
                "All runs that the flywheel knows, ended ones included.",
                "short",
                Query(q.total("stillhouse_flywheel_runs", "state", ROUTES), "{{state}}"),
                stacked=True,
            ),
        ),
    )


def _work() -> Section:
    return Section(
        "Runs",
        (
            states(
                "Stage",
                "The stage that each route's active run is in.",
                Query(q.largest("stillhouse_flywheel_stage", "route, stage", ROUTES), "{{route}} {{stage}}"),
                width=12,
            ),
            bars(
                "Time by stage",
                "How long the finished stages of each route's latest run took.",
                "s",
                Query(
                    q.largest("stillhouse_flywheel_stage_seconds", "route, stage", ROUTES),
                    "{{route}} {{stage}}",
                ),
                width=12,
            ),
            signed(
                "Losses",
                "Training and validation loss of each route's latest run. Recipes are not comparable.",
                "short",
                Query(q.largest("stillhouse_flywheel_loss", "route, of", ROUTES), "{{route}} {{of}}"),
                width=12,
            ),
            lines(
                "Training's progress",
                "Step of the latest run's training as a share of its steps.",
                "percentunit",
                Query(
                    q.ratio(
                        q.largest("stillhouse_flywheel_train_step", "route", ROUTES),
                        q.largest("stillhouse_flywheel_train_steps", "route", ROUTES),
                    ),
                    "{{route}}",
                ),
                width=12,
                top=1,
            ),
        ),
    )


def _budget() -> Section:
    return Section(
        "Budget and pressure",
        (
            _spent(
                "Working hours in 24 h", "h", "hours", "stillhouse_flywheel_hours_in_24h", "Hours of all runs"
            ),
            _spent(
                "Teacher tokens in 24 h",
                "short",
                "teacher_tokens",
                "stillhouse_flywheel_teacher_tokens_in_24h",
                "Tokens that all runs asked the teacher for",
            ),
            lines(
                "Used of the budget",
                "Share of the day's hours and teacher tokens in use; at 1 runs yield, or do not start.",
                "percentunit",
                Query(_used("hours", "stillhouse_flywheel_hours_in_24h"), "hours"),
                Query(_used("teacher_tokens", "stillhouse_flywheel_teacher_tokens_in_24h"), "teacher tokens"),
                width=6,
                thresholds=FULL,
            ),
            lines(
                "Held back",
                "1 while serving needs the machine (all runs stop), and while a route is paused by a person.",
                "short",
                Query(q.largest("stillhouse_flywheel_pressure", ""), "pressure"),
                Query(q.largest("stillhouse_flywheel_paused", "route", ROUTES), "{{route}} paused"),
                width=6,
                top=1,
            ),
        ),
    )


def _runs(title: str, states_: str, description: str) -> Panel:
    runs = q.total("stillhouse_flywheel_runs", "", ROUTES, f'state=~"{states_}"')
    return number(title, description, "short", Query(runs, title.lower()))


def _spent(title: str, unit: str, resource: str, metric: str, what: str) -> Panel:
    bound = q.largest("stillhouse_flywheel_budget", "", f'resource="{resource}"')
    return lines(
        title,
        f"{what}, and the bound that the configuration sets; no line where it sets none.",
        unit,
        Query(q.largest(metric, ""), "used"),
        Query(bound, "bound"),
        width=6,
    )


def _used(resource: str, metric: str) -> str:
    bound = q.largest("stillhouse_flywheel_budget", "", f'resource="{resource}"')
    return q.ratio(q.largest(metric, ""), bound)
