"""Copies the committed results' bars into the READMEs, between two markers; a test holds them to it.

The Chinese README takes the demo's last words from the English one, too.

Usage: python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.results import RESULTS, Result

README = Path(__file__).resolve().parent.parent / "README.md"
CHINESE = README.with_name("README.zh-CN.md")
RESULTS_BLOCK, DEMO_BLOCK = "results", "demo"


def table() -> str:
    """The bars of every committed result as Markdown."""
    parts = []
    for file in sorted(RESULTS.glob("*.json")):
        result = Result.model_validate_json(file.read_text())
        machine = result.hardware
        named = ", ".join([*machine.get("gpus", []), machine["cpu"]])
        where = f"{named}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        parts.append(f"`{result.command}` on {where} (`benchmarks/results/{file.name}`):\n")
        parts.append("| what | measured | bar |\n|---|---|---|")
        parts += [
            f"| {b.what} | {_number(b.value)}{'' if b.ok else ' (missed)'} | {b.bar} |" for b in result.bars
        ]
        parts.append("")
    return "\n".join(parts)


def rendered(file: Path = README) -> str:
    """A README with its blocks as they should be."""
    text = _with_block(file.read_text(encoding="utf-8"), RESULTS_BLOCK, f"\n{table()}")
    if file == README:
        return text
    return _with_block(text, DEMO_BLOCK, block(README.read_text(encoding="utf-8"), DEMO_BLOCK))


def block(text: str, name: str) -> str:
    """What is between a block's two markers."""
    return text.split(f"<!-- {name}:start -->")[1].split(f"<!-- {name}:end -->")[0]


def _with_block(text: str, name: str, content: str) -> str:
    head, rest = text.split(f"<!-- {name}:start -->")
    tail = rest.split(f"<!-- {name}:end -->")[1]
    return f"{head}<!-- {name}:start -->{content}<!-- {name}:end -->{tail}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


if __name__ == "__main__":
    for readme in (README, CHINESE):
        if "--check" not in sys.argv:
            readme.write_text(rendered(readme), encoding="utf-8")
        elif rendered(readme) != readme.read_text(encoding="utf-8"):
            sys.exit(f"{readme.name} is out of date: run me")
