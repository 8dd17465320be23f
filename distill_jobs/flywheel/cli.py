"""`stillhouse flywheel`: run the daemon, look at its queue, start, cancel and pause from a terminal.

Commands only leave requests in the flywheel's store; the daemon acts at its next look. Parses and prints.
"""

from __future__ import annotations

import getpass
import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from contracts import logs
from contracts.config import load_config

if TYPE_CHECKING:
    from distill_jobs.flywheel.config import FlywheelConfig
    from distill_jobs.flywheel.store import Run, Store

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Distil by itself: watch routes' logs, and start a distillation when they call for one.

    Triggers: rows logged, drift of the requests or of the student's grades, bad feedback, a schedule. Serving
    keeps priority: runs are stopped under pressure and go on when it is over.
    """,
)

Config = Annotated[
    Path,
    typer.Option("--config", envvar="STILLHOUSE_FLYWHEEL", help="The flywheel's configuration file."),
]
DEFAULT = Path("configs/flywheel.yaml")
_HOUR_S = 3600.0


@app.command()
def run(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="e.g. configs/flywheel.yaml")],
) -> None:
    """Watch, until SIGTERM or Ctrl-C. Runs at work then end softly, and go on when it is started again."""
    from distill_jobs.flywheel.daemon import Daemon

    logs.start(logs.LogConfig(), "flywheel")
    Daemon(_read(config_path)).run()


@app.command()
def status(
    config: Config = DEFAULT,
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Runs to show, newest first.")] = 10,
) -> None:
    """Routes and what they wait for, the queue, and the last runs."""
    found = _read(config)
    facts = collect(found, _store(found), runs)
    if json_out:
        typer.echo(json.dumps(facts, indent=2))
        return
    _print(facts)


@app.command()
def trigger(
    route: Annotated[str, typer.Argument(help="The route to distil now.")], config: Config = DEFAULT
) -> None:
    """Ask for a run of ROUTE now, whatever its triggers, cooldown and quiet hours say; the budget holds."""
    store = _store(_read(config))
    store.request(route, by=getpass.getuser())
    _say(store, f"A run of route {route} is asked for.")


@app.command()
def cancel(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="Its name or number, as 'status' shows it.")],
    config: Config = DEFAULT,
) -> None:
    """End a run for good. Its workdir stays; `stillhouse distill WORKDIR/flywheel/distill.json` goes on."""
    store = _store(_read(config))
    found = store.find(run_name)
    store.cancel(found, by=getpass.getuser())
    _say(store, f"Run {found.name} will be cancelled.")


@app.command()
def pause(
    route: Annotated[str | None, typer.Argument(help="Only this route; all when left out.")] = None,
    config: Config = DEFAULT,
) -> None:
    """Start nothing; a run at work ends softly and waits. Logs go on being read."""
    store = _store(_read(config))
    store.pause([route] if route else list(store.routes()), by=getpass.getuser())
    _say(store, f"Paused: {route or 'all routes'}.")


@app.command()
def resume(
    route: Annotated[str | None, typer.Argument(help="Only this route; all when left out.")] = None,
    config: Config = DEFAULT,
) -> None:
    """Undo 'pause': what waits goes on in its workdir."""
    store = _store(_read(config))
    store.pause([route] if route else list(store.routes()), by=None)
    _say(store, f"Resumed: {route or 'all routes'}.")


def collect(config: FlywheelConfig, store: Store, limit: int) -> dict[str, Any]:
    """Everything that `status` shows, as plain data."""
    beat = store.last_beat()
    now = time.time()
    spent = store.spent(now)
    alive = _alive(beat, config)
    return {
        "daemon": {
            "alive": alive,
            "pid": beat[0] if beat and alive else None,
            "seen_at": beat[1] if beat else None,
            "pressure": beat[2] if beat and alive else "",
        },
        "spent_24h": {"hours": round(spent.seconds / _HOUR_S, 3), "teacher_tokens": spent.tokens},
        "routes": [
            {
                "route": r.route,
                "new_rows": r.watch.now.usable - r.watch.base.usable,
                "paused_by": r.paused_by,
                "failures": r.failures,
                "looks": [look.model_dump() | {"says": look.sentence} for look in r.watch.last],
                "says": r.said,
            }
            for r in store.routes().values()
        ],
        "runs": [_run_facts(run) for run in store.latest(limit)],
    }


def _run_facts(run: Run) -> dict[str, Any]:
    from distill_jobs.flywheel.job import stage_of

    return {
        "id": run.id,
        "name": run.name,
        "route": run.route,
        "state": run.state.value,
        "trigger": run.trigger,
        "reason": run.reason,
        "stage": stage_of(run.workdir),
        "why": run.why,
        "hours": round(run.worked_s / _HOUR_S, 3),
        "teacher_tokens": run.tokens,
        "attempt": run.attempt,
        "queued_at": run.queued_at,
        "ended_at": run.ended_at,
        "ref": run.ref,
        "hook": run.hook,
        "pid": run.pid,
        "workdir": run.workdir,
    }


def _alive(beat: tuple[int, float, str] | None, config: FlywheelConfig) -> bool:
    from distill_jobs.flywheel.daemon import LOCK
    from distill_jobs.locks import is_locked

    return beat is not None and is_locked(config.dir / LOCK)


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    daemon, spent = facts["daemon"], facts["spent_24h"]
    state = f"[green]running[/] (process {daemon['pid']})" if daemon["alive"] else "[red]not running[/]"
    console.print(f"flywheel {state}; 24 h: {spent['hours']:g} h, {spent['teacher_tokens']} teacher tokens")
    if daemon["pressure"]:
        console.print(f"serving needs the machine: {daemon['pressure']}", markup=False)
    routes = Table("route", "new rows", "state", "says")
    for r in facts["routes"]:
        held = (
            f"paused by {r['paused_by']}"
            if r["paused_by"]
            else f"{r['failures']} failed"
            if r["failures"]
            else ""
        )
        routes.add_row(r["route"], str(r["new_rows"]), held, r["says"])
    console.print(routes)
    runs = Table(Column("run", no_wrap=True), "state", "trigger", "at", "hours", "what")
    for run_ in facts["runs"]:
        at = datetime.fromtimestamp(run_["queued_at"]).strftime("%m-%d %H:%M")
        what = run_["ref"] or run_["stage"] or (run_["why"].splitlines() or [""])[0]
        name = f"{run_['name']} ({run_['id']})"
        runs.add_row(name, run_["state"], run_["trigger"], at, f"{run_['hours']:g}", what)
    console.print(runs)


def _read(path: Path) -> FlywheelConfig:
    from distill_jobs.flywheel.config import FlywheelConfig

    return load_config(path, FlywheelConfig)


def _store(config: FlywheelConfig) -> Store:
    from distill_jobs.flywheel.store import Store

    store = Store(config.dir)
    store.know_routes(list(config.routes), time.time())
    return store


def _say(store: Store, text: str) -> None:
    console = Console(highlight=False)
    console.print(text, markup=False)
    beat = store.last_beat()
    if beat is None:
        console.print("No flywheel has run here yet; start it with: stillhouse flywheel run CONFIG")
