"""Benchmarks of several parts: each is measured on its own, and stands in the one result of this hardware
until it is measured again.

Knows nothing about what a part measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import Bar, Result, head, result_file, write

Found = tuple[list[dict[str, Any]], list[Bar]]
"""A part's rows and bars."""
_HIDDEN = {"part", "refused", "largest"}
"""Of a row, what has no column: it is said elsewhere, or too long."""


def record(benchmark: str, part: str, found: Found, parts: Sequence[str]) -> list[str]:
    """Put a part's rows, with the commit they were measured at, and its bars in place of those it had in the
    result; the parts that the result lacks."""
    rows, bars = _known(benchmark)
    commit = head()
    rows[part] = [{**row, "part": part, "commit": commit} for row in found[0]]
    bars[part] = [bar.model_copy(update={"part": part}) for bar in found[1]]
    command = f"make bench BENCH={benchmark}"
    write(
        benchmark, command, *([one for name in parts for one in kept.get(name, [])] for kept in (bars, rows))
    )
    return [name for name in parts if name not in rows]


def _known(benchmark: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[Bar]]]:
    """Rows and bars of this hardware's result, by part."""
    rows: dict[str, list[dict[str, Any]]] = {}
    bars: dict[str, list[Bar]] = {}
    file = result_file(benchmark)
    if file.exists():
        result = Result.model_validate_json(file.read_text())
        for row in result.rows:
            rows.setdefault(row["part"], []).append(row)
        for bar in result.bars:
            bars.setdefault(bar.part, []).append(bar)
    return rows, bars


def show(console: Console, title: str, found: Found) -> None:
    """A part's rows as a table of what they share, what was refused, then the bars."""
    rows, bars = found
    columns = [key for key in rows[0] if key not in _HIDDEN]
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console.print(table)
    for row in rows:
        if row.get("refused"):
            console.print(f"{row['name']} was refused: {row['refused']}", markup=False)
    for bar in bars:
        console.print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_cell(one) for one in value[:4])
    return "" if value is None else str(value)
