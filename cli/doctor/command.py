"""`stillhouse doctor`: looks at everything that a stack stands on, and says what to do.

Knows which checks there are and how their findings are shown; each check is in a module beside this one.
"""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cli.doctor import host, network, state
from cli.doctor.finding import Check, Finding, Level, Patient, examine, fail, ok
from contracts.errors import StillhouseError
from serve.config import find_config, load_serve_config
from serve.stack.record import read_record

HOST_CHECKS: tuple[tuple[str, Check], ...] = (
    ("python", host.python),
    ("packages", host.packages),
    ("cpu", host.processor),
    ("engine build", host.engine_build),
    ("memory", host.memory),
)
STACK_CHECKS: tuple[tuple[str, Check], ...] = (
    ("run_dir", host.run_folder),
    ("ports", host.ports),
    ("secrets", host.secrets),
    ("state store", state.store),
    ("clock", state.clock),
    ("controller", state.controller),
    ("routers", state.routers),
    ("keys", state.keys),
    ("engines", network.engines),
    ("upstreams", network.upstreams),
    ("registry", network.registry),
    ("request log", network.request_log),
)
_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red", Level.SKIP: "dim"}


def run(config_path: str | None, json_out: bool, limit_s: float) -> None:
    """Print all findings. Exit status 1 when one of them is a failure."""
    found = findings(config_path, limit_s)
    if json_out:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
    else:
        _print(found)
    if any(one.level is Level.FAIL for one in found):
        raise typer.Exit(1)


def findings(config_path: str | None, limit_s: float) -> list[Finding]:
    """Everything there is to say. A wrong configuration is a finding; the machine is looked at anyway."""
    try:
        path = find_config(config_path)
        config = load_serve_config(path)
    except StillhouseError as err:
        broken = fail("config", str(err), "correct it; 'stillhouse up --help' says where it is looked for.")
        return [broken, *examine(None, HOST_CHECKS, limit_s)]
    record = read_record(config)
    patient = Patient(config, record)
    first = [ok("config", f"{path}: {len(config.routes)} routes, {len(config.upstreams)} upstreams")]
    if record is not None and not record.supervised:
        what = f"a stack ended without cleaning up (pid {record.pid}, {record.phase}: {record.detail})"
        first.append(fail("stack", what, "'stillhouse down' cleans up, 'stillhouse up' starts again."))
    elif record is not None:
        first.append(ok("stack", f"{record.phase} at {record.url}"))
    return first + examine(patient, HOST_CHECKS + STACK_CHECKS, limit_s)


def _print(found: list[Finding]) -> None:
    table = Table(Column("check", no_wrap=True), Column("", no_wrap=True), "what", "what to do")
    for one in found:
        colour = _COLOURS[one.level]
        table.add_row(one.check, f"[{colour}]{one.level}[/]", escape(one.what), escape(one.fix))
    console = Console(highlight=False)
    console.print(table)
    counts = {level: sum(one.level is level for one in found) for level in Level}
    console.print(", ".join(f"{n} {level}" for level, n in counts.items() if n))
