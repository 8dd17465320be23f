"""`stillhouse rollout watch`: rollouts followed live in a terminal, or line by line into a pipe.

Reads the state store again and again; changes nothing. Knows nothing about what is drawn (view).
"""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from serve.rollout import view
from serve.rollout.cli_report import latest
from serve.rollout.cli_stack import StackHandle, open_stack
from serve.state.rollouts import StoredRollout

console = Console()
REPLICA_MAX_AGE_S = 30.0
"""Replicas that have not been seen for this long are not shown."""

Config = Annotated[
    str | None, typer.Option("--config", envvar="STILLHOUSE_CONFIG", help="The stack's configuration file.")
]


def register(app: typer.Typer) -> None:
    """Add this command to the rollout commands."""
    app.command()(watch)


def watch(
    route: Annotated[
        str | None, typer.Argument(help="Only this route; all active rollouts when left out.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 1.0,
    config: Config = None,
) -> None:
    """Follow the rollout live until it is decided (Ctrl-C stops watching, not the rollout).

    Into a pipe or a file it writes one line for every change instead. NO_COLOR is obeyed.
    """
    stack = open_stack(config)
    shown = {r.spec.id for r in stack.rollouts.active(route)}
    if not shown and route is not None:
        shown = {latest(stack, route)}
    try:
        if console.is_terminal:
            _draw(stack, route, shown, interval)
        else:
            _tell(stack, route, shown, interval)
    except KeyboardInterrupt:
        console.print("Stopped watching; the rollout goes on.")


def frame(stack: StackHandle, found: list[StoredRollout], route: str | None, now: float) -> RenderableType:
    """One picture of the rollouts."""
    if not found:
        where = f" on route {route}." if route else "; 'rollout history' lists past ones."
        return Text("No active rollout" + where)
    seen = stack.traffic.endpoints(REPLICA_MAX_AGE_S)
    replicas = {app: [e.url for e in endpoints] for app, endpoints in seen.items()}
    look = view.look_of(console)
    return Group(
        *(
            view.rollout_panel(r, now, view.Live(stack.rollouts.audit(r.spec.id), replicas), look)
            for r in found
        )
    )


def _draw(stack: StackHandle, route: str | None, shown: set[str], interval: float) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            found = _found(stack, route, shown)
            live.update(frame(stack, found, route, time.time()), refresh=True)
            if _over(found):
                return
            time.sleep(interval)


def _tell(stack: StackHandle, route: str | None, shown: set[str], interval: float) -> None:
    """One line a change, then the last picture."""
    told: dict[str, str] = {}
    look = view.look_of(console)
    while True:
        found = _found(stack, route, shown)
        for r in found:
            # The counts in the reason change with every look; a change is one of phase, step or weight.
            state = f"{r.status.phase} {r.status.step} {r.status.weight}"
            if told.get(r.spec.id) != state:
                told[r.spec.id] = state
                typer.echo(f"{view.when(time.time())} {look.plain(view.line(r))}")
        if not found or _over(found):
            console.print(frame(stack, found, route, time.time()))
            return
        time.sleep(interval)


def _found(stack: StackHandle, route: str | None, shown: set[str]) -> list[StoredRollout]:
    shown |= {r.spec.id for r in stack.rollouts.active(route)}
    return [stack.rollouts.get(i) for i in sorted(shown)]


def _over(found: list[StoredRollout]) -> bool:
    return bool(found) and all(r.status.phase.terminal for r in found)
