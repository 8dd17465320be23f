"""`stillhouse distill`: run, resume or look at a distillation job from the terminal.

Parses and prints; the work is in pipeline.py, imported only when a job runs, so that --help is instant.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from contracts.errors import ConfigError, GateError, StillhouseError

if TYPE_CHECKING:
    from distill_jobs.config import DistillConfig
    from distill_jobs.pipeline import PipelineResult
    from distill_jobs.progress import Event

_LINE_EVERY_S = 10.0
_INTERRUPTED = 130
_REFUSED = 3  # 2 is what a wrong command line exits with

EPILOG = """A job works in a folder of its own (workdir). Kill it at any moment and run the same command
again: finished stages are skipped, and the stage it was in goes on from its last unit of work.
`WORKDIR/progress.json` always says where a job is. Exit codes: 0 published, 1 an error, 3 a gate refused the
student, 130 stopped with Ctrl-C."""


def distill(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/distill-support.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a field, e.g. --set train.epochs=2. Repeatable."
        ),
    ] = None,
    workdir: Annotated[
        Path | None, typer.Option(help="Folder of the job; overrides the file's workdir.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="Run this stage alone: collect, augment, teach, train, quantize, evaluate or publish."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which stages are finished, and do nothing.")
    ] = False,
    override_gate: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Publish a student that failed its gates, and say why."),
    ] = None,
) -> None:
    """Turn logged traffic into a small quantized student, and publish it when it passes its gates.

    collect -> teach -> train -> quantize -> evaluate -> gate -> publish
    """
    console = Console(stderr=True, highlight=False)
    with ending(console):
        config = read_config(config_path, overrides or [], workdir)
        if dry_run:
            _print_plan(console, config)
            return
        result = _run(console, config, stage, override_gate)
    _print_result(console, result)


def read_config(path: Path, overrides: list[str], workdir: Path | None) -> DistillConfig:
    """The file with `--set` and `--workdir` over it; values of --set are YAML."""
    from contracts.config import load_config
    from distill_jobs.config import DistillConfig

    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r}: write KEY=VALUE, e.g. --set train.epochs=2.")
        values[key] = yaml.safe_load(text)
    if workdir is not None:
        values["workdir"] = str(workdir)
    return load_config(path, DistillConfig, values)


def _run(
    console: Console, config: DistillConfig, stage: str | None, override_gate: str | None
) -> PipelineResult:
    from distill_jobs.pipeline import run_pipeline
    from distill_jobs.tracking.tracker import tracked

    # A scheduler says SIGTERM where a person says Ctrl-C; both must end the workers.
    signal.signal(signal.SIGTERM, as_interrupt)

    def say(text: str) -> None:
        console.print(text, markup=False)

    with tracked(config, say):
        return run_pipeline(
            config, only=stage, override_gate=override_gate, listener=_Lines(console), say=say
        )


@contextmanager
def ending(console: Console) -> Iterator[None]:
    """How a command of jobs ends: Ctrl-C and what is wrong are told in words, with an exit code each."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nStopped. Run the same command again to go on from here.")
        raise typer.Exit(_INTERRUPTED) from None
    except StillhouseError as err:
        console.print(f"[red]{type(err).__name__}[/red]: ", end="")
        console.print(str(err), markup=False)
        raise typer.Exit(_REFUSED if isinstance(err, GateError) else 1) from None


def as_interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler: what Ctrl-C does."""
    raise KeyboardInterrupt


class _Lines:
    """Progress as lines: one when a stage starts or ends, one every ten seconds (or in place, on a
    terminal).
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._state = ("", "")

    def __call__(self, event: Event) -> None:
        changed = self._state != (event.stage, event.state)
        self._state = (event.stage, event.state)
        in_place = self._console.is_terminal and event.state == "running"
        if not changed and not in_place and time.monotonic() - self._last < _LINE_EVERY_S:
            return
        self._last = time.monotonic()
        line = f"{event.stage:9} {event.state:8}"
        if event.total > 1 or event.state == "running":
            line += f" {event.done}/{event.total} {event.unit}" if event.total else ""
            line += f", about {event.eta_s:.0f} s to go" if event.eta_s is not None else ""
        elif event.state == "done":
            line += f" {event.seconds:.1f} s"
        self._console.print(f"{line:78}", end="\r" if in_place else "\n", markup=False)


def _print_plan(console: Console, config: DistillConfig) -> None:
    from distill_jobs.pipeline import plan

    table = Table("stage", "state", "folder")
    for row in plan(config):
        table.add_row(*row)
    console.print(table)


def _print_result(console: Console, result: PipelineResult) -> None:
    evaluated = result.manifests.get("evaluate")
    if evaluated is not None:
        table = Table("metric", "value", "interval")
        for name, value in sorted(evaluated.metrics.items()):
            interval = evaluated.intervals.get(name)
            shown = "" if interval is None else f"{interval[0]:,.4g} to {interval[1]:,.4g}"
            table.add_row(name, "not measured" if value is None else f"{value:,.4g}", shown)
        console.print(table)
    if result.ref is None:
        console.print(f"Finished: {', '.join(result.manifests)}.")
        return
    if result.gates is not None and result.gates.overridden_by:
        console.print(f"The gates were overridden: {result.gates.overridden_by}", markup=False)
    console.print(
        f"Published {result.ref}. Put it before users with: stillhouse rollout start ROUTE {result.ref}"
    )


def main() -> None:
    """`python -m distill_jobs.cli CONFIG`, for a checkout without the console script."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=EPILOG)(distill)
    app(args=sys.argv[1:])


if __name__ == "__main__":
    main()
