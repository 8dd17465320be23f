"""`stillhouse rollout …`: start, watch and steer rollouts from a terminal.

A typer sub-application that the main CLI mounts. Talks to the state store only; the controller acts.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from contracts.errors import ConfigError, NotFoundError
from contracts.rollout import RolloutSpec
from serve.rollout import cli_report, cli_watch, view
from serve.rollout.cli_plan import plan
from serve.rollout.cli_stack import StackHandle, open_stack
from serve.rollout.messages import messages_table
from serve.rollout.policy import RolloutPolicy, ab_policy
from serve.rollout.replay import replay
from serve.rollout.start import ask, check_model_ref, pick_policy, start_rollout
from serve.rollout.start_abn import start_abn
from serve.state.rollouts import StoredRollout

app = typer.Typer(
    no_args_is_help=True,
    help="""Move a route onto a student, step by step, on evidence.

    A rollout deploys the model, warms it and ramps it (1, 5, 10, 25, 50 %). Each step needs evidence from
    sequential tests on errors, latency and answer quality that the student is no worse than the stable arm by
    more than a margin. All shown: promoted. Harm shown at any time: rolled back at once. Neither: it holds.
    """,
)
console = Console()

Route = Annotated[str, typer.Argument(help="The route: the public model name that clients ask for.")]
MaybeRoute = Annotated[str | None, typer.Argument(help="Only this route; all routes when left out.")]
Config = Annotated[
    str | None, typer.Option("--config", envvar="STILLHOUSE_CONFIG", help="The stack's configuration file.")
]
Why = Annotated[str, typer.Option("--reason", help="Why: goes into the audit trail.")]
Which = Annotated[
    str | None,
    typer.Option(
        "--model", help="Which student of an A/B/n test: name:version, as 'rollout status' shows it."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


app.command()(plan)


@app.command()
def start(
    route: Route,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…",
            help="Registry reference: name:version, name@alias or name (latest). Several: an A/B/n test.",
        ),
    ],
    policy: Annotated[str | None, typer.Option(help="Rollout policy of the configuration.")] = None,
    reason: Why = "",
    ab: Annotated[
        float | None,
        typer.Option(
            "--ab", help="An A/B test instead of a ramp: this share for each MODEL, until a person decides."
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Declared upstream that serves MODEL, as a cascade that asks it first. Default: deploy it.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Do not wait for the cooldown after a rollback, nor for a judge's check."
        ),
    ] = False,
    force_quarantined: Annotated[
        bool, typer.Option("--force-quarantined", help="Try a model again that was thrown back before.")
    ] = False,
    config: Config = None,
) -> None:
    """Start moving ROUTE onto MODEL, or an A/B/n test of several. Follow it with 'rollout watch ROUTE'."""
    for model in models:
        check_model_ref(model)
    if len(models) > 1 and ab is None:
        raise ConfigError("several models make an A/B/n test; say --ab WEIGHT, the share that each gets.")
    if len(models) > 1 and on is not None:
        raise ConfigError("--on: names the upstream of one MODEL; several are deployed.")
    stack = open_stack(config)
    picked, forced = pick_policy(stack.policies, policy), (force, force_quarantined)
    if ab is not None and len(models) > 1:
        specs = _start_abn(stack, picked, route, models, ab, reason, forced)
    else:
        specs = [
            _start_one(
                stack, picked if ab is None else ab_policy(picked, ab), route, models[0], reason, forced, on
            )
        ]
    spec = specs[0]
    steps = " → ".join(f"{100 * s.weight:g}" for s in spec.steps)
    for each in specs:
        console.print(f"Rollout [bold]{each.id}[/] of {each.model_ref} on route {route} accepted.")
    ramp = f"Ramp {steps} → 100 %" if ab is None else f"A/B test at {steps} %"
    if len(specs) > 1:
        rest = 100 * (1 - sum(s.steps[0].weight for s in specs))
        ramp = f"A/B/n test of {len(specs)} students at {steps} % each, {rest:g} % stay with the stable arm"
    console.print(f"{ramp}, guardrails: {', '.join(m.key for m in spec.metrics)}.")
    console.print(f"Follow it with: stillhouse rollout watch {route}")


@app.command()
def status(route: MaybeRoute = None, json_out: Json = False, config: Config = None) -> None:
    """Where the active rollouts are, and why. Without one, the latest of the route."""
    stack = open_stack(config)
    found = _current(stack, route)
    if json_out:
        typer.echo(json.dumps([view.as_json(r) for r in found], indent=2))
        return
    console.print(_panels(found, route))


@app.command()
def pause(route: Route, model: Which = None, reason: Why = "", config: Config = None) -> None:
    """Keep the canary's weight where it is. Harm is still judged; 'resume' goes on."""
    _ask(route, "pause", reason, model, config)


@app.command()
def resume(route: Route, model: Which = None, reason: Why = "", config: Config = None) -> None:
    """Go on with a paused rollout."""
    _ask(route, "resume", reason, model, config)


@app.command()
def approve(route: Route, model: Which = None, reason: Why = "", config: Config = None) -> None:
    """Let the rollout leave a step that waits for a person.

    That is: for an approval, after a sample-ratio mismatch, or because an objective got worse.
    """
    _ask(route, "approve", reason, model, config)


@app.command()
def promote(route: Route, model: Which = None, reason: Why = "", config: Config = None) -> None:
    """Give the canary all traffic now, before the tests are done; while it is watched: end the watch now.

    Shown harm and the policy's schedule still stop it; approvals and confirming hooks do not.
    """
    _ask(route, "promote", reason, model, config)


@app.command()
def abort(route: Route, model: Which = None, reason: Why = "", config: Config = None) -> None:
    """End the rollout: weight zero, canary drained and removed. The model is not quarantined.

    While it is watched after its promotion: take the promotion back.
    """
    _ask(route, "abort", reason, model, config)


@app.command()
def history(
    route: MaybeRoute = None,
    rollout_id: Annotated[
        str | None, typer.Option("--id", help="Show one rollout with its audit trail.")
    ] = None,
    looks: Annotated[
        bool, typer.Option("--looks", help="With --id: every look, not only what moved.")
    ] = False,
    json_out: Json = False,
    config: Config = None,
) -> None:
    """All rollouts and how they ended; with --id one of them in detail."""
    stack = open_stack(config)
    if rollout_id is None:
        found = stack.rollouts.history(route)
        if json_out:
            typer.echo(json.dumps([view.as_json(r) for r in found], indent=2))
        else:
            console.print(view.history_table(found) if found else "No rollouts yet.")
        return
    one, trail = stack.rollouts.get(rollout_id), stack.rollouts.audit(rollout_id)
    messages = stack.outbox.of(rollout_id)
    if json_out:
        entries = [e.model_dump(mode="json") for e in trail]
        told = [m.model_dump(mode="json", exclude={"hook": {"url"}}) for m in messages]
        typer.echo(json.dumps({**view.as_json(one), "audit": entries, "messages": told}, indent=2))
        return
    console.print(view.rollout_panel(one), view.audit_table(trail, transitions_only=not looks))
    if messages:
        console.print(messages_table(messages))


@app.command("replay")
def replay_command(
    rollout_id: Annotated[str, typer.Argument(help="The rollout's id, as 'rollout history' lists it.")],
    json_out: Json = False,
    config: Config = None,
) -> None:
    """Take every decision again from the audit trail, compare bit for bit; exit code 1 when one differs."""
    stack = open_stack(config)
    found = replay(stack.rollouts.get(rollout_id), stack.rollouts.audit(rollout_id))
    if json_out:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        console.print(found.sentence())
    if not found.exact:
        raise typer.Exit(1)


cli_watch.register(app)
cli_report.register(app)


def _start_one(
    stack: StackHandle,
    policy: RolloutPolicy,
    route: str,
    model: str,
    reason: str,
    forced: tuple[bool, bool],
    on: str | None,
) -> RolloutSpec:
    return start_rollout(
        stack.rollouts,
        stack.traffic,
        stack.open_registry(),
        policy,
        route,
        model,
        reason=reason,
        force=forced[0],
        force_quarantined=forced[1],
        sources=stack.sources,
        on=on,
    )


def _start_abn(
    stack: StackHandle,
    policy: RolloutPolicy,
    route: str,
    models: list[str],
    weight: float,
    reason: str,
    forced: tuple[bool, bool],
) -> list[RolloutSpec]:
    return start_abn(
        stack.rollouts,
        stack.traffic,
        stack.open_registry(),
        policy,
        route,
        models,
        weight,
        reason=reason,
        force=forced[0],
        force_quarantined=forced[1],
        sources=stack.sources,
    )


def _ask(route: str, verb: str, reason: str, model: str | None, config: str | None) -> None:
    stored = ask(open_stack(config).rollouts, route, verb, reason=reason, model=model)
    console.print(f"Asked to {verb} {stored.spec.id}; the controller does it at its next tick.")


def _current(stack: StackHandle, route: str | None) -> list[StoredRollout]:
    """The active rollouts, else the latest finished one of the route."""
    found = stack.rollouts.active(route)
    if not found and route is not None:
        found = stack.rollouts.history(route)[-1:]
        if not found:
            known = ", ".join(sorted(stack.traffic.splits())) or "none"
            raise NotFoundError(f"route {route!r} never had a rollout; routes: {known}.")
    return found


def _panels(found: list[StoredRollout], route: str | None) -> RenderableType:
    if not found:
        return Text(
            "No active rollout" + (f" on route {route}." if route else "; 'rollout history' lists past ones.")
        )
    return Group(*(view.rollout_panel(r) for r in found))
