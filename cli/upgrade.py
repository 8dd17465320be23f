"""`stillhouse upgrade`: what the state store's schema needs, and doing it.

Knows nothing about the steps themselves (serve.state.migrations).
"""

from __future__ import annotations

import typer

from serve.config import load_serve_config
from serve.state.migrations import SCHEMA_VERSION, Step, check_version, steps_from
from serve.state.tables import bring_up, look_at_state, open_state, shown, write_alone


def run(config: str | None, state_url: str | None, apply: bool) -> None:
    """Print what is due, or do it. Exit status 1 when something is due and was not done."""
    url = state_url or load_serve_config(config).state_url
    engine, version = look_at_state(url)
    name = shown(url)
    if version is None:
        if apply:
            open_state(url)
            typer.echo(f"{name}: was empty; its tables are made (schema {SCHEMA_VERSION}).")
        else:
            typer.echo(f"{name}: empty; whatever opens it first makes its tables.")
        return
    check_version(version)
    if not steps_from(version):
        typer.echo(f"{name}: schema {version} is this release's; nothing to do.")
        return
    if not apply:
        _tell(f"{name}: schema {version}, this release needs {SCHEMA_VERSION}:", steps_from(version))
        typer.echo("'stillhouse backup FILE' first, then 'stillhouse upgrade --apply'.")
        raise typer.Exit(1)
    with write_alone(engine) as db:
        done = bring_up(db)
    if done:
        _tell(f"{name}: upgraded from schema {version} to {SCHEMA_VERSION}:", done)
    else:
        typer.echo(f"{name}: another process upgraded it in the same moment.")


def _tell(head: str, steps: list[Step]) -> None:
    typer.echo(head)
    for step in steps:
        typer.echo(f"  {step.to - 1} → {step.to}: {step.what}")
