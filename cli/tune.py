"""`stillhouse tune`: engine settings for a route, measured on its own logged traffic.

Parses and prints; the search is in serve.tuning. Knows nothing about how an engine is started.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from cli.options import Config, Log
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from serve.config import EngineSection, ServeConfig
    from serve.tuning.search import Target, Trial
    from serve.tuning.traffic import Traffic

EPILOG = """Every candidate runs beside the default engine, and turns of the same requests alternate between
them. Interrupt it at any time: what was measured is kept in --out, and the same command goes on. The settings
file is taken by `settings:` in an engine section or in `students`. docs/guides/tune.md explains."""
_INTERRUPTED = 130


def tune(
    route: Annotated[str, typer.Argument(help="The route whose logged requests are asked again.")],
    upstream: Annotated[
        str | None, typer.Option(help="Declared engine to tune. Default: the route's upstream.")
    ] = None,
    p95_ms: Annotated[
        float | None, typer.Option(min=1, help="Target: milliseconds that 95 % of the requests stay below.")
    ] = None,
    of: Annotated[
        Literal["e2e", "ttft", "tpot"],
        typer.Option(help="What the target is of: whole request, first token, each further token."),
    ] = "e2e",
    rows: Annotated[int, typer.Option(min=4, help="Most logged requests to use, the latest ones.")] = 500,
    requests: Annotated[int, typer.Option(min=8, help="Requests of a turn.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the final comparison.")] = 3,
    log: Log = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: RUN_DIR/tune.")] = None,
    config: Config = None,
) -> None:
    """Find the engine settings with the most requests a second of ROUTE within a p95 latency.

    Tries compile or eager, threads and binding, batch limits, block size, prefix caching, chunked prefill and
    cache size on a real engine each, combines what helped, and writes a settings file, a table and a plot.
    Without --p95-ms the target is the default settings' own p95 at the concurrency that the log shows.
    """
    from serve.config import load_serve_config
    from serve.tuning.traffic import traffic_of

    settings = load_serve_config(config)
    section = engine_of(settings, route, upstream)
    folder = log or settings.run_dir / "requests"
    traffic = traffic_of(folder, route, rows, vocabulary=vocabulary_of(section.model))
    at = (out or settings.run_dir / "tune") / route
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _tune(section, traffic, at, of, p95_ms, requests, rounds)
    except KeyboardInterrupt:
        typer.echo("\nStopped. Run the same command again to go on from here.", err=True)
        raise typer.Exit(_INTERRUPTED) from None


def engine_of(settings: ServeConfig, route: str, upstream: str | None) -> EngineSection:
    """The engine section behind a route. Raises: ConfigError when there is none of ours."""
    if route not in settings.routes:
        raise ConfigError(f"no route {route!r}; there are: {', '.join(sorted(settings.routes))}.")
    name = upstream or settings.routes[route].upstream
    section = settings.upstreams.get(name)
    if section is None or section.engine is None:
        engines = sorted(n for n, u in settings.upstreams.items() if u.engine is not None)
        raise ConfigError(
            f"--upstream: {name!r} is no engine of ours; there are: {', '.join(engines) or 'none'}."
        )
    return section.engine


def vocabulary_of(model: str) -> int:
    """Tokens of a local model's vocabulary; 0 when its files are not here."""
    from serve.engine.folders import local_model

    folder = local_model(model)
    try:
        about = {} if folder is None else json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(about.get("vocab_size", 0))
    except (OSError, ValueError) as err:
        raise ConfigError(f"{model}: its config.json cannot be read ({err}).") from err


def _tune(
    section: EngineSection,
    traffic: Traffic,
    at: Path,
    of: Literal["e2e", "ttft", "tpot"],
    p95_ms: float | None,
    requests: int,
    rounds: int,
) -> None:
    from serve.tuning import engines, report
    from serve.tuning.load import turn
    from serve.tuning.search import Tuner, singles
    from serve.tuning.traffic import lengths

    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    say(lengths(traffic.work))
    base = section.options()
    run = lambda options, log: engines.running(section.model, options, log)  # noqa: E731
    ask = lambda url, work, at_once: turn(url, engines.MODEL, work, at_once)  # noqa: E731
    target = report.target_of(base, traffic, at, of, p95_ms, run, ask, say)
    tuner = Tuner(base, traffic.work, target, at, run, ask, requests, rounds, say)
    longest = max(one.prompt_tokens + one.completion_tokens for one in traffic.work)
    final, trials = tuner.search(singles(base, os.cpu_count() or 1, longest))
    written = report.write(at, target, final, trials)
    _print(target, final, trials)
    typer.echo(f"written: {', '.join(str(path) for path in written)}")
    if final.changes:
        typer.echo(f"To use it: `settings: {written[0]}` in the engine's section, then `stillhouse up`.")


def _print(target: Target, final: Trial, trials: list[Trial]) -> None:
    table = Table("settings", "requests × rounds", "req/s", "default", "gain")
    for one in trials:
        row = [one.name, f"{one.requests} × {one.rounds}"]
        if one.error is not None:
            table.add_row(*row, "-", "-", "did not run")
            continue
        style = "bold" if one is final else ""
        table.add_row(*row, f"{one.rate:.2f}", f"{one.base_rate:.2f}", f"{one.gain:.2f} ×", style=style)
    console = Console(highlight=False)
    console.print(f"req/s while the p95 of {target.of} is at most {1000 * target.p95_s:.0f} ms")
    console.print(table)
    if final.changes:
        console.print(f"Chosen: {final.name}: {final.gain:.2f} × the default's req/s.", markup=False)
    else:
        console.print("The default settings are the best of those tried.")
