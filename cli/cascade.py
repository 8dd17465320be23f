"""`stillhouse cascade …`: a cascade's threshold, found on logged traffic.

Asks the student with the router's own client, in the router's own words. Parses and prints; the arithmetic is
in serve.cascade.calibrate. Knows nothing about rollouts.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.options import Config, Json, Log
from contracts.cascade import Signal
from contracts.errors import ConfigError, EngineError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.traffic import Cascade
    from serve.cascade.calibrate import Calibration
    from serve.cascade.replay import Answered, Row, Score
    from serve.config import ServeConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Cascades and their thresholds.",
)
_OF_LOGPROBS = [s for s in Signal if s.of_logprobs]


@app.callback()
def _cascade() -> None:
    """A student first, the teacher when it is unsure."""


@app.command()
def calibrate(
    route: Annotated[str, typer.Argument(help="The route whose logged requests are asked again.")],
    cascade: Annotated[str, typer.Argument(help="A declared upstream that is a cascade.")],
    target: Annotated[float, typer.Option(help="Share of the second's quality that must be kept.")] = 0.99,
    confidence: Annotated[float, typer.Option(help="How sure that must be.")] = 0.95,
    signal: Annotated[
        list[Signal] | None,
        typer.Option(help="Signal to try; several may be given. Default: those of log-probabilities."),
    ] = None,
    grader: Annotated[
        str | None,
        typer.Option(help="Grader of single answers that says what is right. Default: what the second said."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most requests to ask, the latest ones.")] = 5000,
    at_once: Annotated[int, typer.Option(min=1, help="Requests running at once.")] = 16,
    log: Log = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: RUN_DIR/cascades.")
    ] = None,
    json_out: Json = False,
    config: Config = None,
) -> None:
    """Find the threshold of CASCADE with the fewest calls of its second upstream that keep its quality.

    Takes the latest requests of ROUTE that the second upstream answered, asks the first about them, and tests
    thresholds from the strictest on until the promise (--target, --confidence) cannot be shown any more.
    Writes the frontier as JSON and SVG. Refuses when the log holds too few requests.
    """
    from serve.cascade.calibrate import calibrate as find
    from serve.cascade.replay import items_of, rows_of
    from serve.cascade.report import write
    from serve.config import load_serve_config

    settings = load_serve_config(config)
    of = _cascade_of(settings, route, cascade)
    wanted = list(dict.fromkeys(signal or _OF_LOGPROBS))
    kept = settings.router_config().log
    assert kept is not None  # the stack always keeps one
    folder = log or Path(kept.dir)
    asked = rows_of(folder, route, of.then.name, wanted, rows)
    grade = None if grader is None else _score(settings, grader, "--grader")
    answers = asyncio.run(_ask(settings, route, of, asked, wanted, at_once))
    items, left_out = items_of(asked, answers, grade)
    found = find(items, wanted, target, confidence)
    written = write(found, out or settings.run_dir / "cascades", f"{route}-{cascade}")
    if json_out:
        typer.echo(found.model_dump_json(indent=2))
        return
    _print(found, cascade, left_out)
    typer.echo(f"written: {written[0]} and {written[1].name}")


def _cascade_of(settings: ServeConfig, route: str, name: str) -> Cascade:
    """The declared cascade. Raises: NotFoundError listing what there is."""
    if route not in settings.routes:
        raise NotFoundError(f"no route {route!r}; there are: {', '.join(sorted(settings.routes))}.")
    cascades = {n: u.cascade for n in settings.upstreams if (u := settings.upstream(n)).cascade is not None}
    found = cascades.get(name)
    if found is None:
        raise NotFoundError(
            f"no cascade {name!r}; there are: {', '.join(sorted(cascades)) or 'none'}. Declare one in "
            "'upstreams'; its threshold may be anything before it was calibrated."
        )
    return found


def _score(settings: ServeConfig, name: str, option: str) -> Score:
    """A configured grader as a function. Raises: ConfigError for one that cannot be called here."""
    from serve.grading.graders import single_graders

    graders = {g.name: g.score for g in single_graders(settings.graders)}
    if name not in graders:
        known = ", ".join(sorted(graders)) or "none"
        raise ConfigError(f"{option}: {name!r} is no grader of single answers without a judge: {known}.")
    return graders[name]


async def _ask(
    settings: ServeConfig,
    route: str,
    of: Cascade,
    rows: Sequence[Row],
    wanted: Sequence[Signal],
    at_once: int,
) -> list[Answered | None]:
    from serve.cascade.replay import First
    from serve.router.client import HttpClient
    from serve.router.pool import Pools
    from serve.state.tables import open_state
    from serve.state.traffic import TrafficState

    score = None
    if Signal.GRADER in wanted:
        if of.grader is None:
            raise ConfigError("--signal grader: the cascade names no grader; set its 'signal' and 'grader'.")
        score = _score(settings, of.grader, "--signal grader")
    router = settings.router_config()
    pools = Pools(router)
    if of.first.app is not None:
        pools.apply(TrafficState(open_state(settings.state_url)).endpoints())
    http = HttpClient(router.timeouts.connect_s)
    parameters = settings.routes[route].parameters
    try:
        return await First(of.first, of, http, pools, parameters).answers(rows, wanted, at_once, score)
    except* EngineError as err:
        first = err.exceptions[0]
        raise EngineError(f"{first} Nothing was written.") from first
    finally:
        http.close()


def _print(found: Calibration, cascade: str, left_out: int) -> None:
    from serve.cascade.report import shown

    console = Console(highlight=False)
    console.print(
        f"{found.rows} requests ({left_out} left out), {found.tested} test thresholds; "
        f"first alone {found.first:.4f}, second alone {found.then:.4f}."
    )
    for frontier in found.frontiers:
        table = Table(
            "threshold", "second answers", "kept", "kept at least", "p", box=None, title=frontier.signal
        )
        for point in shown(frontier):
            low = "" if point.kept_low is None else f"{100 * point.kept_low:.2f} %"
            kept, calls = f"{100 * point.kept:.2f} %", f"{100 * point.calls:.1f} %"
            style = "bold" if point is frontier.best() else "" if point.certified else "dim"
            table.add_row(f"{point.threshold:.5g}", calls, kept, low, f"{point.p_value:.2g}", style=style)
        console.print(table)
    best = found.best
    console.print(
        f"[bold]{cascade}: signal: {found.signal}, threshold: {best.threshold:.6g}[/]: the second answers "
        f"{100 * best.calls:.1f} % of the requests, and with confidence {100 * found.confidence:g} % at "
        f"least {100 * found.target:g} % of its quality is kept."
    )
