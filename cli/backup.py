"""`stillhouse backup` and `restore`: the state store into one file, and back. Knows nothing of the file."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table

from serve.config import load_serve_config
from serve.state import backup as state_backup
from serve.state.archive import Manifest
from serve.state.tables import shown

console = Console(highlight=False)


def backup(config: str | None, state_url: str | None, place: str, json_out: bool) -> None:
    """Write a backup and say what is in it, and what is not."""
    url = state_url or load_serve_config(config).state_url
    made = state_backup.backup(url, place)
    _tell(f"Backed up {shown(url)} (schema {made.schema_version}) to {place}.", made, json_out)


def restore(config: str | None, state_url: str | None, place: str, force: bool, json_out: bool) -> None:
    """Restore a backup and say what came back."""
    url = state_url or load_serve_config(config).state_url
    made = state_backup.restore(url, place, force=force)
    _tell(f"Restored {place} of {made.made_at} into {shown(url)}.", made, json_out)


def _tell(head: str, made: Manifest, json_out: bool) -> None:
    if json_out:
        typer.echo(json.dumps(made.model_dump(mode="json"), indent=2))
        return
    console.print(head, markup=False, soft_wrap=True)
    rows = Table("table", "rows")
    for name, part in sorted(made.parts.items()):
        rows.add_row(name, str(part.rows))
    console.print(rows)
    console.print("Not in it:")
    for what, how in made.not_in_it.items():
        console.print(f"  {what}: {how}", markup=False, soft_wrap=True)
