"""`stillhouse rollout plan`: prints how long a rollout will take and what it would catch. Starts nothing."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from contracts.errors import ConfigError, NotFoundError
from contracts.rollout import RolloutSpec
from contracts.traffic import Upstream
from serve.rollout.cli_stack import StackHandle, open_stack
from serve.rollout.plan import CAUGHT, MetricPlan, Plan, Traffic, expected, make_plan, read_traffic
from serve.rollout.policy import RolloutPolicy
from serve.rollout.start import pick_policy

console = Console()


def plan(
    route: Annotated[str, typer.Argument(help="The route: the public model name that clients ask for.")],
    policy: Annotated[str | None, typer.Option(help="Rollout policy of the configuration.")] = None,
    minutes: Annotated[float, typer.Option(min=1, help="Longest rollout that is simulated.")] = 240.0,
    per_minute: Annotated[
        float | None, typer.Option(help="Requests a minute to expect; default: what the request log shows.")
    ] = None,
    errors: Annotated[
        float, typer.Option(help="With --per-minute: the stable arm's share of errors.")
    ] = 0.01,
    runs: Annotated[int, typer.Option(min=20, help="Simulated rollouts a row.")] = 100,
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    config: Annotated[
        str | None,
        typer.Option("--config", envvar="STILLHOUSE_CONFIG", help="The stack's configuration file."),
    ] = None,
) -> None:
    """How long a rollout on ROUTE would take at its traffic, and how small a difference it would notice."""
    stack = open_stack(config)
    seen = expected(per_minute, errors) if per_minute is not None else _seen(stack, route)
    of = _spec(pick_policy(stack.policies, policy), route)
    if json_out:
        typer.echo(make_plan(of, seen, minutes, runs).model_dump_json(indent=2))
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=1.0)
        made = make_plan(
            of,
            seen,
            minutes,
            runs,
            told=lambda what, share: progress.update(task, completed=share, description=what),
        )
    for line in sentences(made):
        console.print(line)
    console.print(_table(made))


def sentences(made: Plan) -> list[str]:
    """The plan for people."""
    traffic = made.traffic
    said = [f"{made.route}: {traffic.per_minute:.3g} requests a minute ({traffic.source})."]
    if made.median_min is None:
        said.append(
            f"A student as good as stable: {made.promoted:.0%} of {made.runs} simulated rollouts "
            f"were promoted within {made.minutes:g} min. Give it more traffic, higher first weights or wider "
            "margins."
        )
    else:
        p90 = f"{made.p90_min:.0f} min" if made.p90_min is not None else f"more than {made.minutes:g} min"
        said.append(
            f"A student as good as stable is promoted after {made.median_min:.0f} min (median), p90 {p90}; "
            f"thrown back wrongly: {made.rolled_back:.1%} of {made.runs} simulated rollouts."
        )
    if made.silent:
        said.append(
            f"[yellow]In {made.silent:.0%} the canary got no request before no_data_deadline_s and was "
            "thrown back for that: raise the first steps' weights or the deadline.[/]"
        )
    if made.unknown:
        said.append(
            f"[yellow]Nothing is known about {', '.join(made.unknown)}: the rollout will wait for their "
            "data, which this plan cannot foresee.[/]"
        )
    return said


def _table(made: Plan) -> Table:
    title = f"detectable: the least difference tried of which {CAUGHT:.0%} are thrown back"
    table = Table(
        "metric", "stable", "margin", "detectable", "found after (median, p90)", "tried", title=title
    )
    for metric in made.metrics:
        hit = next((c for c in metric.tried if c.excess == metric.detectable), None)
        found = "-" if hit is None else f"{hit.median_min:.0f} min, {hit.p90_min:.0f} min"
        table.add_row(
            metric.metric,
            f"{metric.base:.3g}",
            f"{metric.margin:g}",
            f"none within {made.minutes:g} min" if metric.detectable is None else f"+{metric.detectable:g}",
            found,
            _tried(metric),
        )
    return table


def _tried(metric: MetricPlan) -> str:
    return ", ".join(f"+{c.excess:g}: {c.rolled_back:.0%}" for c in metric.tried)


def _seen(stack: StackHandle, route: str) -> Traffic:
    if stack.traffic.get_split(route) is None:
        known = ", ".join(sorted(stack.traffic.splits())) or "none; start the stack with 'stillhouse up'"
        raise NotFoundError(f"no route {route!r}; there are: {known}.")
    if stack.request_log is None or not stack.request_log.is_dir():
        raise ConfigError(
            "plan: this host has no request log to read traffic from; say what to expect with --per-minute"
        )
    return read_traffic(stack.request_log, route, time.time())


def _spec(policy: RolloutPolicy, route: str) -> RolloutSpec:
    """A rollout of nobody in particular: the plan only needs its rules."""
    shared = {name: getattr(policy, name) for name in RolloutPolicy.model_fields}
    nobody = Upstream(name="student", model="student", url="http://student")
    return RolloutSpec(
        id="plan", route=route, model_ref="student:1", candidate=nobody, created_at=0.0, **shared
    )
