"""Splits of the world as files of OpenAI requests: what `evaluate` measures on and `collect` keeps out.

Knows the form {"request": {...}} and nothing of who reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo.world.cases import case


def requests(split: str = "evaluation", count: int = 500, start: int = 0) -> Iterator[dict[str, Any]]:
    """Rows {"request": OpenAI chat body}; its metadata names the case, so that answers can be graded."""
    for index in range(start, start + count):
        one = case(split, index)
        message = {"role": "user", "content": one.text}
        yield {"request": {"messages": [message], "metadata": {"case": one.id}}}


def write(path: Path, split: str = "evaluation", count: int = 500) -> Path:
    """The same rows as a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in requests(split, count)))
    return path
