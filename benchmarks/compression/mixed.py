"""Mixed precision against uniform INT4 at the same bytes, both by GPTQ, on the model with outliers, served.

Without outliers INT4 loses 0.02 % of perplexity, less than two calibrations differ by. The budget is the size
of the uniform artifact's files, headers, scales and all. Bars: no byte more, strictly less perplexity. Knows
nothing about how layers are chosen (distill_jobs/quantizing/mixed.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.compression.formats import compared
from benchmarks.compression.outliers import planted
from benchmarks.results import Bar, at_most

UNIFORM, MIXED = "gptq-w4a16-g128", "gptq-mixed-g128"


def run(threads: int, folder: Path, quick: bool) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows and bars."""
    model, out = planted(folder), folder / "mixed"
    base, (uniform,) = compared(model, out, (UNIFORM,), threads, quick)
    _, (_, mixed) = compared(model, out, (UNIFORM, MIXED), threads, quick, uniform.bytes)
    rows = [{"part": "mixed", **one.model_dump(exclude={"artifact"})} for one in (base, uniform, mixed)]
    rows[-1]["plan"] = _plan(out / MIXED / "plan.json")
    quotient = (mixed.perplexity or 0.0) / (uniform.perplexity or 1.0)
    return rows, [
        at_most("mixed precision, bytes / uniform INT4", (mixed.bytes or 0) / (uniform.bytes or 1), 1, " ×"),
        Bar(
            what="mixed precision at the bytes of uniform INT4, perplexity, served",
            value=quotient, bar="< 1 ×", ok=mixed.refused is None and 0 < quotient < 1,
        ),
    ]  # fmt: skip


def _plan(file: Path) -> dict[str, int]:
    """How many layers have each precision."""
    found: dict[str, int] = {}
    for unit in json.loads(file.read_text(encoding="utf-8"))["units"]:
        found[unit["chosen"]] = found.get(unit["chosen"], 0) + len(unit["layers"])
    return found
