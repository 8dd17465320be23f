"""`stillhouse speculate`: does a student, or n-gram look-up, speed its teacher up on a route's traffic.

Parses and prints; the measuring is in serve.tuning.speculate. Knows nothing about how an engine drafts.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.options import Config, Json, Log
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from contracts.speculative import Speculative
    from serve.tuning.speculate import Drafted

EPILOG = """The output's distribution is the model's own whatever drafts; only speed changes. Acceptance is
vLLM's own count of proposed tokens that were kept. Exit codes: 0 a setting was written, 1 an error, 3 nothing
is faster. docs/guides/speculative.md explains the figures."""
_INTERRUPTED, _NOTHING = 130, 3


def speculate(
    route: Annotated[str, typer.Argument(help="The route whose logged requests are asked again.")],
    draft: Annotated[
        str | None,
        typer.Option(help="A student: its folder, or registry:NAME:VERSION. None: n-grams alone."),
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Declared engine that is sped up. Default: the route's upstream.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Counts of proposed tokens to try, comma-separated.")] = "2,4,6",
    by: Annotated[
        str | None, typer.Option(help="Path in a request's body that names its task, e.g. metadata.task.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    rows: Annotated[int, typer.Option(min=4, help="Most logged requests to use, the latest ones.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 3,
    log: Log = None,
    out: Annotated[
        Path | None, typer.Option(help="Settings file to write. Default: RUN_DIR/speculate/ROUTE.yaml.")
    ] = None,
    json_out: Json = False,
    config: Config = None,
) -> None:
    """Measure acceptance and speed-up of speculative decoding by task, and write the fastest setting.

    Asks the latest requests of ROUTE, greedily, of the plain engine and of one that drafts, turn by turn, and
    counts the answers that are the same. Refuses a draft with another vocabulary before an engine starts.
    """
    from cli.tune import engine_of
    from serve.config import load_serve_config
    from serve.drafts import resolved
    from serve.engine.drafts import check_draft
    from serve.tuning.speculate import choose, measure, name_of
    from serve.tuning.traffic import traffic_of

    settings = load_serve_config(config)
    section = engine_of(settings, route, upstream)
    base = section.options()
    ways = [resolved(way, settings.registry_uri) for way in ways_of(draft, tokens)]
    for way in ways:
        check_draft(section.model, way)
    work = traffic_of(log or settings.run_dir / "requests", route, rows, by).work
    file = out or settings.run_dir / "speculate" / f"{route}.yaml"
    console = Console(stderr=True, highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def measured(some: list[Speculative]) -> list[Drafted]:
        return measure(
            section.model, base, some, work, file.with_suffix(".logs"), concurrency=concurrency,
            rounds=rounds, say=lambda text: console.print(text, markup=False),
        )  # fmt: skip

    try:
        found = measured(ways)
        best = choose(found)
        if best is not None:
            console.print(f"once more, {name_of(best.speculative)}: the best of several is flattered …")
            best = choose(measured([best.speculative]))
    except KeyboardInterrupt:
        typer.echo("\nStopped; nothing was written, its engines have ended.", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    _finish(found, best, file, json_out)


def ways_of(draft: str | None, tokens: str) -> list[Speculative]:
    """Every way to draft that is tried. Raises: ConfigError for counts that are none."""
    from contracts.config import parse_config
    from contracts.speculative import Speculative

    try:
        counts = sorted({int(one) for one in tokens.split(",")})
    except ValueError:
        raise ConfigError(f"--tokens {tokens!r}: give whole numbers, e.g. 2,4,6.") from None
    kinds = [{"method": "ngram"}] if draft is None else [{"draft": draft}, {"method": "ngram"}]
    return [parse_config({**kind, "tokens": n}, Speculative, "--tokens") for kind in kinds for n in counts]


def _finish(found: list[Drafted], best: Drafted | None, file: Path, json_out: bool) -> None:
    import json

    from serve.engine.settings import write_settings

    if json_out:
        typer.echo(json.dumps([one.model_dump() for one in found], indent=2))
    else:
        _print(found)
    if best is None:
        typer.echo("Nothing is faster than plain decoding here; no setting was written.", err=True)
        raise typer.Exit(_NOTHING)
    why = f"stillhouse speculate: {best.speed_up:.2f} x plain decoding, acceptance {best.acceptance:.2f}."
    write_settings(file, {"speculative": best.speculative.model_dump(exclude_defaults=True)}, why)
    typer.echo(f"written: {file}. To use it: `settings: {file}` in the engine's section.", err=True)


def _print(found: list[Drafted]) -> None:
    from serve.tuning.speculate import name_of

    table = Table(
        "draft", "task", "requests", "same", "accepted", "tokens/pass", "plain tok/s", "tok/s", "speed-up"
    )
    for one in found:
        table.add_row(
            name_of(one.speculative), one.task, str(one.requests), str(one.same),
            f"{100 * one.acceptance:.1f} %", f"{one.tokens_a_pass:.2f}",
            f"{one.plain_tokens_per_s:.1f}", f"{one.tokens_per_s:.1f}",
            f"{one.speed_up:.2f} ×", style="bold" if one.task == "all" else "",
        )  # fmt: skip
    Console(highlight=False).print(table)
