"""Every panel and every variable of the six dashboards has data from a real stack, asked as Grafana asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import promql_parser
import pytest

from tests.integration.dashboards_rig import (
    Extras,
    Flywheel,
    Prometheus,
    end_ab_test,
    jobs,
    start_ab_test,
    traffic,
)
from tests.integration.stack_rig import LiveStack
from tests.k8s.dashboard_queries import Target, choices, chosen, dashboards, filled, intervals, targets

pytestmark = [pytest.mark.integration, pytest.mark.whole, pytest.mark.timeout(900)]

PATIENCE_S = 240.0
TARGETS = {"stillhouse": 1, "engines": 3, "flywheel": 1, "extras": 1}
PREFERRED = {"route": "support", "place": "support", "currency": "USD", "baseline": "teacher"}
"""What a person would choose where a dashboard shows one of several."""


class Watched(NamedTuple):
    """The stack with everything that is scraped, and the server that scrapes it."""

    stack: LiveStack
    extras: Extras
    flywheel: Flywheel
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(
    stack: LiveStack, prometheus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """Made once for the module's tests; what was started is ended whatever happens, the A/B test first."""
    folder = tmp_path_factory.mktemp("dashboards")
    with ExitStack() as ended:
        extras = Extras(folder / "extras")
        ended.callback(extras.close)
        flywheel = Flywheel(folder / "flywheel")
        ended.callback(flywheel.close)
        server = Prometheus(prometheus, folder / "prometheus", jobs(stack, extras, flywheel))
        ended.callback(server.close)
        ended.callback(end_ab_test, stack)
        start_ab_test(stack, folder / "student")
        yield Watched(stack, extras, flywheel, server)


def values_of(server: Prometheus, dashboard: str) -> dict[str, str]:
    """The variables of a dashboard as they are when it opens, each asked with those before it put in."""
    values = intervals()
    for choice in choices():
        if choice.dashboard != dashboard:
            continue
        found = server.series(filled(choice.selector, values), choice.label)
        preferred = PREFERRED.get(choice.name, "")
        one = preferred if preferred in found else next(iter(found), "")
        values[choice.name] = chosen(found) if choice.many else one
    return values


def selectors(expr: str) -> list[str]:
    """Every selector of an expression: `or`, `+` and joins must not hide one that finds nothing."""
    found: list[str] = []

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node.prettify())

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def empty(server: Prometheus, left: list[Target]) -> list[Target]:
    """Queries that have no point yet, or of whose selectors one finds no series."""
    values = {uid: values_of(server, uid) for uid in dashboards()}
    still = []
    for target in left:
        expr = filled(target.expr, values[target.dashboard])
        found = all(server.points(f"count({s})", instant=False) for s in selectors(expr))
        if not found or not server.points(expr, target.instant):
            still.append(target)
    return still


def test_every_panel_has_data(watched: Watched) -> None:
    """100 %: two arms answer, an A/B test runs, engines, routers, controller and flywheel are scraped; every
    query of every panel, variables put in, has at least one number, and none of its selectors is empty."""
    server, left, sent = watched.prometheus, list(targets()), 0
    asked, deadline = len(left), time.monotonic() + PATIENCE_S
    while left and time.monotonic() < deadline:
        traffic(watched.stack, watched.extras, 16, sent)
        sent += 16
        if server.up() == TARGETS:
            left = empty(server, left)
    named = "\n".join(f"  {target.name}" for target in left)
    where = f"targets that answer: {server.up()}\n{watched.flywheel.said()}"
    assert not left, f"{len(left)} of {asked} queries have no data:\n{named}\n{where}"
    assert asked > 120


def test_every_variable_has_values(watched: Watched) -> None:
    """A choice without values leaves a dashboard empty; both arms and all three engines are there."""
    server = watched.prometheus
    for uid in dashboards():
        values = values_of(server, uid)
        for choice in choices():
            if choice.dashboard == uid:
                assert values[choice.name], f"{uid}: variable {choice.name} has no values"
    assert values_of(server, "stillhouse-route")["arm"].split("|")[:2] == ["canary", "stable"]
    assert len(values_of(server, "stillhouse-engine")["replica"].split("|")) == 3


def test_figures_are_the_stacks(watched: Watched) -> None:
    """Not only any number: shares, replicas and prices are what this stack was told."""
    server = watched.prometheus

    def value(query: str) -> float:
        found = server.ask("query", query=query)["result"]
        assert len(found) == 1, f"{query}: {found}"
        return float(found[0]["value"][1])

    here = 'job="stillhouse"'
    for arm in ("stable", "canary"):
        assert value(f'stillhouse_arm_share{{{here},route="support",arm="{arm}"}} > 0') == 0.5
    assert value(f'stillhouse_upstream_replicas{{{here},upstream="teacher"}}') == 2
    assert value(f"stillhouse_router_processes{{{here}}}") == 2
    assert value(f'stillhouse_price{{{here},upstream="teacher",per="completion_token"}}') == pytest.approx(
        8e-6
    )
    student = watched.stack.last_rollout().spec.candidate.name
    assert value(f'stillhouse_price{{{here},upstream="{student}",per="hour"}}') == 0.5
    assert value('stillhouse_flywheel_train_step{job="flywheel"}') == 6
    assert value('count(vllm:num_requests_running{upstream="teacher"})') == 2
