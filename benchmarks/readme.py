"""Copies the committed results' bars into the README, between its two markers; a test holds it to them.

Usage: python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.results import RESULTS, Result

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- results:start -->", "<!-- results:end -->"


def table() -> str:
    """The bars of every committed result as Markdown."""
    parts = []
    for file in sorted(RESULTS.glob("*.json")):
        result = Result.model_validate_json(file.read_text())
        machine = result.hardware
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        parts.append(f"`{result.command}` on {where} (`benchmarks/results/{file.name}`):\n")
        parts.append("| what | measured | bar |\n|---|---|---|")
        parts += [
            f"| {b.what} | {_number(b.value)}{'' if b.ok else ' (missed)'} | {b.bar} |" for b in result.bars
        ]
        parts.append("")
    return "\n".join(parts)


def rendered() -> str:
    """The README with its results block as it should be."""
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(START)
    return f"{head}{START}\n{table()}{END}{rest.split(END)[1]}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if rendered() == README.read_text(encoding="utf-8") else "README is out of date: run me")
    README.write_text(rendered(), encoding="utf-8")
