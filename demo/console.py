"""What the demo prints: a line per step with its time, bars on long ones, a table at the end.

Knows nothing of what the steps do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table


class Step:
    """A running step; `note` is shown beside its name when it ends."""

    def __init__(self) -> None:
        self.text = ""

    def note(self, text: str) -> None:
        """Say what came of it."""
        self.text = text


class Bar:
    """A progress bar of one step."""

    def __init__(self, progress: Progress, total: int | None, label: str) -> None:
        self._progress, self._label = progress, label
        self._task = progress.add_task(label, total=total, note="")

    def to(self, done: float, note: str = "", total: float | None = None) -> None:
        """Move to `done`."""
        self._progress.update(self._task, completed=done, note=note, **({"total": total} if total else {}))


class Console:
    """Prints to stdout; plain lines when it is not a terminal."""

    def __init__(self) -> None:
        self._rich = Rich(highlight=False)
        self._started = time.monotonic()

    @contextmanager
    def step(self, label: str) -> Iterator[Step]:
        """A step without a bar."""
        started, step = time.monotonic(), Step()
        if not self._rich.is_terminal:
            self._line("…", label, "", None)
            yield step
        else:
            with self._rich.status(label):
                yield step
        self._line("✓", label, step.text, time.monotonic() - started)

    @contextmanager
    def progress(self, label: str, total: int | None = None) -> Iterator[Bar]:
        """A step with a bar; its last note is kept."""
        started = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        if not self._rich.is_terminal:
            self._line("…", label, "", None)
        bar_progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._rich,
            transient=True,
            disable=not self._rich.is_terminal,
        )
        with bar_progress:
            bar = Bar(bar_progress, total, label)
            yield bar
        task = bar_progress.tasks[0]
        self._line("✓", label, str(task.fields["note"]), time.monotonic() - started)

    def say(self, text: str) -> None:
        """One line within a step."""
        self._rich.print(f"[dim]        {text}[/dim]")

    def failed(self, text: str) -> None:
        """Why the demo ends early."""
        self._rich.print(f"[red]✗ {text}[/red]", soft_wrap=True)

    def finished(self, facts: dict[str, Any], out: Path, problems: list[str]) -> None:
        """The result as a table, and where the report is."""
        table = Table(title="teacher → student", title_justify="left")
        for column in ("", "parameters", "accuracy", "tokens/s served", "bytes"):
            table.add_column(column, justify="right" if column else "left")
        teacher, student, quantized = facts["teacher"], facts["student"], facts["quantized"]
        table.add_row("teacher", *_cells(teacher, teacher["tokens_per_s"]))
        table.add_row("student bf16", *_cells(student, student["tokens_per_s"]))
        table.add_row(
            f"student {quantized['format']}", *_cells({**student, **quantized}, quantized["tokens_per_s"])
        )
        self._rich.print(table)
        for rollout in facts["rollouts"]:
            self._rich.print(f"{rollout['model']}: [bold]{rollout['decision']}[/bold]: {rollout['reason']}")
        requests = facts["traffic"]
        self._rich.print(
            f"{requests['requests']:,} requests, {requests['failed']} failed; {facts['seconds']:.0f} s"
        )
        self._rich.print(f"report: {out / 'report.html'}   figures: {out / 'summary.json'}")
        for problem in problems:
            self.failed(problem)

    def _line(self, mark: str, label: str, note: str, seconds: float | None) -> None:
        at = time.monotonic() - self._started
        took = f" [dim]({seconds:.0f} s)[/dim]" if seconds is not None else ""
        self._rich.print(
            f"[dim]{at:5.0f} s[/dim] {mark} {label}{took}{': ' + note if note else ''}", soft_wrap=True
        )


def _cells(model: dict[str, Any], tokens_per_s: float) -> list[str]:
    return [
        f"{model['params']:,}",
        f"{model['accuracy']:.1%}",
        f"{tokens_per_s:,.0f}",
        f"{model['bytes']:,}" if model.get("bytes") else "",
    ]
