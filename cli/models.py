"""`stillhouse models`: what the registry holds, and a student's model card.

Parses and prints; the registry knows. Knows nothing about how a student was made.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

from cli.options import Config, Json

if TYPE_CHECKING:
    from registry.store import Registry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Published students. A REF is name:3, name@champion, or name for the latest version.",
)
Ref = Annotated[str, typer.Argument(metavar="REF", help="name:3, name@champion, or name (latest).")]
Uri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow tracking URI, instead of the stack's registry.")
]


@app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    json_out: Json = False,
    config: Config = None,
    tracking_uri: Uri = None,
) -> None:
    """Versions with their aliases, newest first."""
    registry = _registry(config, tracking_uri)
    rows = []
    for model in [name] if name else registry.list_models():
        aliases = registry.aliases(model)
        for record in reversed(registry.history(model)):
            held = sorted(a for a, version in aliases.items() if version == record.version)
            gates = record.evaluation.gates.verdict.value if record.evaluation else "-"
            rows.append((record, held, gates))
    if json_out:
        found = [r.model_dump(mode="json") | {"aliases": a, "gates": g} for r, a, g in rows]
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(Column("model", no_wrap=True), "aliases", "precision", "MB", "gates", "made")
    for record, held, gates in rows:
        made = datetime.fromtimestamp(record.created_at).strftime("%Y-%m-%d %H:%M")
        size = f"{record.artifact.bytes / 1e6:,.1f}"
        table.add_row(record.ref, ", ".join(held), record.artifact.precision, size, gates, made)
    Console(highlight=False).print(table)


@app.command()
def card(
    ref: Ref,
    raw: Annotated[bool, typer.Option("--raw", help="Markdown as it is stored, e.g. for a file.")] = False,
    config: Config = None,
    tracking_uri: Uri = None,
) -> None:
    """The model card: what it is for, figures, limitations, lineage, how to serve it."""
    registry = _registry(config, tracking_uri)
    record = registry.get(ref)
    text = registry.card(record.ref)
    if raw:
        typer.echo(text, nl=False)
        return
    console = Console()
    console.print(f"Model card of {record.ref}", style="bold", highlight=False)
    _, _, body = text.removeprefix("---\n").partition("\n---\n")
    console.print(Markdown(body or text))


@app.command()
def download(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    config: Config = None,
    tracking_uri: Uri = None,
) -> None:
    """The artifact's files, their digest verified, as vLLM and transformers load them."""
    typer.echo(str(_registry(config, tracking_uri).download(ref, folder)))


@app.command()
def track(
    workdir: Annotated[Path, typer.Argument(metavar="WORKDIR", help="A distillation's folder.")],
) -> None:
    """Send to MLflow what a job could not send itself, e.g. because the server was down."""
    from distill_jobs.tracking.sync import sync_workdir

    typer.echo(f"MLflow run {sync_workdir(workdir)}")


def _registry(config: str | None, tracking_uri: str | None) -> Registry:
    from registry.mlflow_store import open_registry

    if tracking_uri is not None:
        return open_registry(tracking_uri)
    from serve.config import load_serve_config

    return open_registry(load_serve_config(config).registry_uri)
