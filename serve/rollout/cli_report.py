"""`stillhouse rollout report` and `board`: what a rollout showed, as files; which student wins, as a table.

Reads the state store and the request log; changes nothing but the files it is asked to write.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from contracts.config import write_atomic
from contracts.errors import ConfigError, NotFoundError
from serve.rollout.cli_stack import StackHandle, open_stack
from serve.rollout.report import board as boards
from serve.rollout.report.gather import EXAMPLES_EACH, Sources, gather
from serve.rollout.report.markdown import markdown
from serve.rollout.report.page import page

console = Console()

Config = Annotated[
    str | None, typer.Option("--config", envvar="STILLHOUSE_CONFIG", help="The stack's configuration file.")
]


def register(app: typer.Typer) -> None:
    """Add these commands to the rollout commands."""
    app.command()(report)
    app.command()(board)


def report(
    route: Annotated[str | None, typer.Argument(help="The route: its active or else latest rollout.")] = None,
    rollout_id: Annotated[str | None, typer.Option("--id", help="One rollout by its id.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files; default: <run_dir>/reports/<id>.")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, max=20, help="Worst examples of each kind; 0 leaves all texts out.")
    ] = EXAMPLES_EACH,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    config: Config = None,
) -> None:
    """Write what a rollout showed, finished or running: report.html, report.md and report.json.

    The page needs nothing else and works offline. Examples quote the request log as far as it keeps texts.
    """
    stack = open_stack(config)
    chosen = rollout_id or latest(stack, route)
    sources = Sources(stack.request_log, stack.prices, stack.student_price)
    made = gather(stack.rollouts, chosen, sources, examples=examples)
    folder = out or stack.reports / chosen
    try:
        write_atomic(folder / "report.html", page(made))
        write_atomic(folder / "report.md", markdown(made))
        write_atomic(folder / "report.json", made.model_dump_json(indent=1) + "\n")
    except OSError as err:
        raise ConfigError(f"--out {folder}: cannot be written ({err}).") from err
    console.print(Text(made.sentence))
    console.print(Text(f"{folder / 'report.html'} (and report.md, report.json)"))
    if open_page:
        webbrowser.open((folder / "report.html").resolve().as_uri())


def board(
    route: Annotated[str, typer.Argument(help="The route whose judged pairs are counted.")],
    judge: Annotated[
        str | None, typer.Option(help="Only this judge's pairs; needed when several judged.")
    ] = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    config: Config = None,
) -> None:
    """Rank everything that ever answered ROUTE by judged pairs, over all its rollouts (Bradley-Terry)."""
    made = boards.board(open_stack(config).rollouts, route, judge)
    if json_out:
        typer.echo(made.model_dump_json(indent=2))
        return
    console.print(_table(made))
    console.print(Text(made.said, style="dim"))


def latest(stack: StackHandle, route: str | None) -> str:
    """The active rollout of a route, else its latest; without a route the latest of all.

    Raises: NotFoundError when there never was one.
    """
    found = stack.rollouts.active(route) or stack.rollouts.history(route)
    if not found:
        known = ", ".join(sorted(stack.traffic.splits())) or "none"
        where = "no rollout yet" if route is None else f"route {route!r} never had a rollout"
        raise NotFoundError(f"{where}; routes: {known}.")
    return found[-1].spec.id


def _table(made: boards.Board) -> Table:
    table = Table(
        header_style="bold", title=f"{made.route}: judged pairs by {made.judge}", title_justify="left"
    )
    for name in ("", "model", "Elo", "95 %", "beats the first", "games", "won", "tied", "lost"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for place, row in enumerate(made.rows, start=1):
        figures = (row.games, row.won, row.tied, row.lost)
        interval = f"{row.low:+.0f} to {row.high:+.0f}"
        wins = f"{100 * row.win_share:.0f} %"
        table.add_row(str(place), Text(row.model), f"{row.elo:+.0f}", interval, wins, *map(str, figures))
    return table
