"""`stillhouse errors`: error analysis of a finished job from the terminal.

Parses and prints; the work is in errors/, imported only when it runs, so that --help is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

EPILOG = """A request is lost when the teacher is right and the student is not. Slices (by class, lengths,
script, tags, words, and pairs of them) are tested against all other requests and corrected for how many were
looked at. The report says which data to collect, shows the worst answers side by side, and draws the
confusion matrix when evaluate.classes says what an answer's class is."""


def errors(
    workdir: Annotated[Path, typer.Argument(metavar="WORKDIR", help="Folder of a job that was evaluated.")],
    model: Annotated[str, typer.Option(help="Whose errors: student or quantized.")] = "student",
    against: Annotated[str, typer.Option(help="Held against: teacher, student or champion.")] = "teacher",
    out: Annotated[Path | None, typer.Option(help="Folder of the report; default WORKDIR/errors.")] = None,
    least: Annotated[int, typer.Option(min=2, help="Requests a slice must have.")] = 10,
    level: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Share of false findings allowed among the slices.")
    ] = 0.05,
    examples: Annotated[int, typer.Option(min=0, help="Worst answers to show.")] = 12,
    exponent: Annotated[
        float,
        typer.Option(min=0.05, max=3, help="How errors fall with rows, n^-c; a study's fit knows better."),
    ] = 0.5,
) -> None:
    """Find where a student loses to its teacher: slices, classes, examples, and the data that would help."""
    from distill_jobs.studies.errors.analysis import analyse
    from distill_jobs.studies.errors.report import headline, write_report

    analysis = analyse(workdir, model, against, least, level, examples, exponent)
    report = write_report(analysis, out or workdir / "errors")
    console = Console(highlight=False)
    console.print(headline(analysis), markup=False)
    if analysis.found.slices:
        table = Table("slice", "requests", "lost", "q", "collect")
        for one, more in zip(analysis.found.slices, analysis.suggestions, strict=True):
            table.add_row(one.name, str(one.requests), str(one.lost), f"{one.q:.2g}", f"+{more.more:,}")
        console.print(table)
    console.print(f"The report is in {report}", markup=False)
