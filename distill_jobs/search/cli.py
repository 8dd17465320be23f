"""`stillhouse search`: the best student within a budget, from the terminal.

Parses and prints; the work is in search.py, imported only when a search runs, so that --help is instant.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from distill_jobs.cli import as_interrupt, ending

if TYPE_CHECKING:
    from distill_jobs.config import DistillConfig
    from distill_jobs.search.config import SearchConfig
    from distill_jobs.search.search import Outcome

_NONE_FITS = 3

EPILOG = """A search file names a distillation job, a budget and what to choose from:

\b
  folder: runs/searches/support
  distill: configs/distill-support.yaml
  budget: {bytes: 2500000, tokens_per_s: 2000}     # also memory_bytes, tpot_ms
  space:
    layers: [2, 4, 6]
    hidden: [128, 256]
    intermediate: [384, 768]
    precision: [w8a8, w4a16-g128, w4a16-g32]
  halving: {candidates: 27, rungs: 3, eta: 3, tokens: 2000000}

Shapes are cut out of the job's teacher (start: random makes them from scratch) and trained as the job says.
FOLDER gets report.json, front.png and winner.yaml, a job for `stillhouse distill`. Stopped or killed, the
same command goes on. Exit codes: 0 one was chosen, 1 an error, 3 all that are left are too slow, 130 stopped.
docs/guides/search.md says how to choose budget and space."""


def search(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/search-support.yaml.")
    ],
    folder: Annotated[Path | None, typer.Option(help="Folder of the search; overrides the file's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print candidates and rungs, and train none.")
    ] = False,
) -> None:
    """Find the student that loses least within a budget of bytes, memory or latency.

    Successive halving over depth, width, heads and precision; the front is plotted.
    """
    console = Console(stderr=True, highlight=False)
    signal.signal(signal.SIGTERM, as_interrupt)
    with ending(console):
        config, job = _read(config_path, folder)
        if dry_run:
            _print_plan(console, config, job)
            return
        outcome = _run(console, config, job)
    if outcome.chosen is None:
        raise typer.Exit(_NONE_FITS)


def _read(path: Path, folder: Path | None) -> tuple[SearchConfig, DistillConfig]:
    from contracts.config import load_config
    from contracts.errors import ConfigError
    from distill_jobs.config import DistillConfig
    from distill_jobs.search.config import SearchConfig

    config = load_config(path, SearchConfig, {"folder": str(folder)} if folder is not None else None)
    if not config.distill.is_file():
        raise ConfigError(f"{path}: distill: there is no file {config.distill}.")
    job = load_config(config.distill, DistillConfig)
    for name, place in (("rows", config.rows), ("held_out", config.held_out)):
        if place is not None and not place.is_dir():
            raise ConfigError(f"{path}: {name}: there is no folder {place}.")
    return config, job


def _run(console: Console, config: SearchConfig, job: DistillConfig) -> Outcome:
    from distill_jobs.search.report import write_report
    from distill_jobs.search.search import Search

    def say(text: str) -> None:
        console.print(text, markup=False)

    rows, held_out = config.rows, config.held_out
    if rows is None or held_out is None:
        rows, held_out = _taught(job, console)
    outcome = Search(config, job, rows, held_out, say).run()
    write_report(config, job, outcome)
    _print(console, config, outcome)
    return outcome


def _taught(job: DistillConfig, console: Console) -> tuple[Path, Path]:
    """The job's own rows: its stages up to teach, skipped where they are finished."""
    from distill_jobs.pipeline import order_of, run_pipeline

    order, made = order_of(job), {}
    for stage in order[: order.index("train")]:
        made = run_pipeline(job, only=stage, say=lambda text: console.print(text, markup=False)).manifests
    taught = made["teach"]
    return Path(taught.output("train")), Path(taught.output("validation"))


def _print_plan(console: Console, config: SearchConfig, job: DistillConfig) -> None:
    from transformers import AutoConfig

    from distill_jobs.keys import model_folder
    from distill_jobs.search.halving import rungs_of
    from distill_jobs.search.space import Frame, candidates

    frame = Frame.of(AutoConfig.from_pretrained(str(model_folder(job.teacher))))
    within = candidates(frame, config.space, config.budget, config.start == "cut")
    table = Table("candidate", "bytes", "memory")
    for one in within:
        table.add_row(one.name, f"{one.bytes:,}", f"{one.memory:,}")
    console.print(table)
    drawn = min(len(within), config.halving.candidates)
    for number, rung in enumerate(rungs_of(config.halving, drawn)):
        console.print(f"rung {number + 1}: {rung.candidates} candidates, {rung.tokens:,} tokens each")


def _print(console: Console, config: SearchConfig, outcome: Outcome) -> None:
    from distill_jobs.search.report import PICTURE, REPORT, WINNER, front_of

    kept = front_of(outcome.found)
    table = Table("candidate", "MB", "memory MB", "rung", "tokens", "loss", "tokens/s", "")
    for one in outcome.found:
        name = one.candidate.name
        note = "" if one.fits else "too slow"
        note = note or ("chosen" if one is outcome.chosen else "front" if name in kept else "")
        speed = "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}"
        table.add_row(
            name, f"{one.candidate.bytes / 1e6:.3f}", f"{one.candidate.memory / 1e6:.3f}", str(one.rung + 1),
            f"{one.tokens:,}", f"{one.loss:.4f}", speed, note,
        )  # fmt: skip
    console.print(table)
    folder = config.folder
    console.print(f"The report is {folder / REPORT}, the plot {folder / PICTURE}", markup=False)
    if outcome.chosen is None:
        console.print("All that reached the last rung are too slow: allow more time, or smaller students.")
    else:
        console.print(f"Distil it with: stillhouse distill {folder / WINNER}", markup=False)
